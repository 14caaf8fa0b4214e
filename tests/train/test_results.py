"""Result: exact, found again, never half written, honest about what is missing."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.atomic import atomic_file
from moe_lab.results import Result, find_results, run_cached
from moe_lab.results.plain import dumps, fingerprint, loads


@dataclass(frozen=True)
class Config:
    profile: str = "quick"
    gate: str = "comet"
    seed: int = 0
    gamma: float = 0.1
    sizes: tuple[int, ...] = (256, 256)
    inner: dict = field(default_factory=lambda: {"a": 1})


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(plain_values)
def test_json_gives_back_every_bit_and_is_valid_for_strict_readers(value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = dumps(value)
    assert same(loads(text), value)
    json.loads(text, parse_constant=refuse)


@given(st.dictionaries(st.text(), plain_values, max_size=4))
def test_the_fingerprint_ignores_the_order_of_keys(value):
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


def test_the_fingerprint_sees_every_real_difference_and_no_other():
    assert fingerprint({"gamma": 1}) == fingerprint({"gamma": 1.0})
    assert fingerprint(Config()) == fingerprint(vars(Config())) == fingerprint({**vars(Config()), "sizes": [256, 256]})
    others = [True, 1, 1.0000000000000002, "1", None, [1], math.nan, math.inf, -math.inf]
    assert len({fingerprint({"gamma": value}) for value in others}) == len(others)
    # a fixed value: should it ever change, nobody finds any of their finished runs again
    assert fingerprint({"b": [1, 2.5], "a": "x"}) == "0acd2d90f0cd"


def test_a_finished_result_reads_back_equal(tmp_path):
    result = Result.open("study", Config(gamma=0.1 + 0.2), root=tmp_path)
    result.log("epochs", epoch=1, loss=torch.tensor(0.1), auc=np.float64(math.nan), load=torch.tensor([0.25, 0.75]))
    result.finish({"loss": np.float32(0.1), "per_task": {"watch": math.inf}})
    read = Result.load(result.path)
    assert read.config["gamma"] == 0.1 + 0.2 and read.config["sizes"] == [256, 256] and read.seed == 0
    assert read.curves["epochs"][0]["loss"] == torch.tensor(0.1).item()
    assert math.isnan(read.curves["epochs"][0]["auc"]) and read.metrics["per_task"]["watch"] == math.inf
    assert (read.environment, read.wall_seconds, read.started) == (
        result.environment,
        result.wall_seconds,
        result.started,
    )
    assert result.path.parent == tmp_path / "study" and result.path.name.startswith("quick-comet-seed0-")


def test_what_cannot_be_saved_is_refused_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"config\.inner\.gate is a Linear"):
        Result.open("study", Config(inner={"gate": torch.nn.Linear(1, 1)}), root=tmp_path)
    with pytest.raises(ValueError, match=r"curve 'epochs'\.f is a function"):
        Result.open("study", Config(), root=tmp_path).log("epochs", f=lambda: 1)
    with pytest.raises(ValueError, match="lower case"):
        Result.open("../study", Config(), root=tmp_path)


def test_a_finished_run_is_computed_once_unless_asked(tmp_path):
    calls = []

    def compute(result):
        calls.append(torch.rand(()).item())
        result.log("epochs", epoch=len(result.curves.get("epochs", [])))
        return {"draw": calls[-1]}

    first = run_cached("study", Config(), compute, root=tmp_path)
    torch.rand(5)
    again = run_cached("study", Config(), compute, root=tmp_path)
    assert len(calls) == 1 and again.metrics == first.metrics and again.finished
    fresh = run_cached("study", Config(), compute, root=tmp_path, recompute=True)
    assert len(calls) == 2 and calls[0] == calls[1], "seeded with config.seed before it computes"
    assert fresh.curves["epochs"] == [{"epoch": 0}] and len(list(tmp_path.rglob("*.json"))) == 1
    run_cached("study", Config(seed=1), compute, root=tmp_path)
    assert len(calls) == 3 and calls[2] != calls[0]


def test_an_unfinished_run_keeps_its_rows_and_its_time(tmp_path):
    first = Result.open("study", Config(), root=tmp_path)
    first.log("trials", trial=0)
    first.wall_seconds = 100.0
    first.save()
    again = Result.open("study", Config(), root=tmp_path)
    assert again.status == "running" and again.curves == {"trials": [{"trial": 0}]} and again.started == first.started
    assert 100.0 <= again.finish({}).wall_seconds < 110.0


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(KeyboardInterrupt(), "interrupted", ""), (RuntimeError("no memory"), "failed", "RuntimeError: no memory")],
)
def test_what_stopped_a_run_is_written_down_and_goes_on_up(tmp_path, error, status, text):
    def compute(result):
        result.log("trials", trial=0)
        raise error

    with pytest.raises(type(error)):
        run_cached("study", Config(), compute, root=tmp_path)
    (path,) = tmp_path.rglob("*.json")
    read = Result.load(path)
    assert (read.status, read.error, len(read.curves["trials"])) == (status, text, 1)
    assert run_cached("study", Config(), lambda result: {"a": 1}, root=tmp_path).finished


def test_recompute_leaves_nothing_of_the_old_run_behind(tmp_path):
    old = Result.open("study", Config(), root=tmp_path)
    old.log("epochs", epoch=1)
    old.save()
    for suffix in (".ckpt", ".ckpt.previous", ".second.ckpt"):
        old.path.with_suffix(suffix).write_bytes(b"old")
    neighbour = Result.open("study", Config(seed=1), root=tmp_path)
    neighbour.checkpoint_path.write_bytes(b"not yours")
    new = Result.open("study", Config(), root=tmp_path, recompute=True)
    assert new.curves == {} and new.path == old.path and Result.load(new.path).curves == {}
    assert [file.name for file in tmp_path.rglob("*.ckpt*")] == [neighbour.checkpoint_path.name]


@pytest.mark.parametrize("content", ["", "{", '{"schema": "other/1"}', "[]", '{"schema": "moe_lab.result/1"}'])
def test_a_damaged_file_is_named_and_recompute_gets_over_it(tmp_path, content):
    path = Result.open("study", Config(), root=tmp_path).path
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name}.*recompute=True"):
        Result.open("study", Config(), root=tmp_path)
    with pytest.warns(UserWarning, match=path.name):
        assert find_results(root=tmp_path) == []
    assert Result.open("study", Config(), root=tmp_path, recompute=True).status == "running"


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "f") as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def write_many(root: Path, worker: int) -> None:
    for number in range(10):
        result = Result.open("study", {"seed": number, "worker": worker % 2}, root=root)  # two workers per run
        for row in range(3):
            result.log("rows", row=row)
            result.save()
        result.finish({"sum": worker % 2 + number})


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    results = find_results("study", tmp_path)
    assert len(results) == 20 and all(r.metrics["sum"] == r.config["worker"] + r.config["seed"] for r in results)
    assert len(list((tmp_path / "study").iterdir())) == 20
