"""Jobs on several cores: results come back, and an error does not wait for the slow ones."""

import os
import time

import pytest

from moe_lab.experiments.parallel import in_parallel, visible_cards


def square(x):
    return x * x


def card_of_this_process(_):
    time.sleep(1)  # so that both workers get a job
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def slow_or_wrong(x):
    if x == 0:
        raise RuntimeError("job 0")
    time.sleep(60)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_job_comes_back_with_its_result(n_workers):
    assert sorted(in_parallel(square, [1, 2, 3], n_workers, progress=False)) == [(1, 1), (2, 4), (3, 9)]


def test_an_error_ends_the_jobs_that_still_run():
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="job 0"):
        list(in_parallel(slow_or_wrong, [1, 0], 2, progress=False))
    assert time.monotonic() - began < 50


def test_no_worker_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        list(in_parallel(square, [1], 0, progress=False))


def test_workers_are_dealt_to_the_cards_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    assert visible_cards() == ["3", "GPU-5"]
    assert {card for _, card in in_parallel(card_of_this_process, range(4), 2, progress=False)} == {"3", "GPU-5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert {card for _, card in in_parallel(card_of_this_process, range(2), 2, progress=False)} == {"3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_cards() == []


def test_without_the_variable_all_cards_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_cards() == ["0", "1"]
