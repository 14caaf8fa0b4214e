"""Threads, device, seeds, environment."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from moe_lab import runtime
from moe_lab.runtime import configure_threads, environment, pick_device, seed_everything


@pytest.fixture(autouse=True)
def fresh_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(runtime, "_chosen_threads", None)
    for variable in ("MOE_LAB_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (64, 4)])
def test_the_default_leaves_cores_free_and_is_one_on_small_machines(monkeypatch, cores, threads):
    monkeypatch.setattr(runtime, "_cpu_count", lambda: cores)
    assert configure_threads() == threads == torch.get_num_threads()


def test_argument_beats_own_variable_beats_openmp_variable(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert configure_threads() == 2
    monkeypatch.setattr(runtime, "_chosen_threads", None)
    monkeypatch.setenv("MOE_LAB_THREADS", "3")
    assert configure_threads() == 3
    assert configure_threads(1) == 1
    assert configure_threads() == 1, "a later call without a number (fit's) must not undo the user's choice"


@pytest.mark.parametrize("value", ["0", "many", "-1", "1.5"])
def test_a_senseless_number_of_threads_is_named_with_its_source(monkeypatch, value):
    monkeypatch.setenv("MOE_LAB_THREADS", value)
    with pytest.raises(ValueError, match="MOE_LAB_THREADS"):
        configure_threads()
    with pytest.raises(ValueError, match="at least 1"):
        configure_threads(0)


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="sees 0 CUDA devices; use 'auto' or 'cpu'"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="did you mean 'cuda'"):
        pick_device("cudda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda" and pick_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        pick_device("cuda:2")


def test_one_seed_for_all_generators():
    def draws(seed):
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws(3) == draws(3)
    assert all(a != b for a, b in zip(draws(3), draws(4), strict=True))
    with pytest.raises(ValueError, match="seed"):
        seed_everything(-1)


def test_the_environment_is_plain_and_says_what_a_number_needs():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "python", "torch", "numpy", "moe_lab", "device", "cpu_count", "threads", "commit", "dirty",
    }  # fmt: skip
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads() and found["device"]


def test_commit_and_dirty_flag_are_those_of_the_checkout_and_none_outside(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)

    def look():
        runtime._commit.cache_clear()
        return environment()["commit"], environment()["dirty"]

    monkeypatch.setattr(runtime, "project_root", lambda: tmp_path)
    try:
        assert look() == (None, None)
        (tmp_path / "moe_lab").mkdir()
        (tmp_path / "moe_lab" / "gate.py").write_text("1")
        (tmp_path / "notebook").write_text("1")
        git("init"), git("add", "."), git("commit", "-m", "first")
        head = git("rev-parse", "HEAD").stdout.strip()
        (tmp_path / "notebook").write_text("run again")
        assert look() == (head, False)
        (tmp_path / "moe_lab" / "gate.py").write_text("2")
        assert look() == (head, True)
    finally:
        runtime._commit.cache_clear()


def test_a_process_of_its_own_gets_the_variable_from_its_environment():
    script = "import torch; from moe_lab.runtime import configure_threads as c; print(c(), torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "MOE_LAB_THREADS": "2"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "2"], done.stderr
