"""Jobs on several cores: results come back, and an error does not wait for the slow ones."""

import time

import pytest

from moe_lab.experiments.parallel import in_parallel


def square(x):
    return x * x


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
