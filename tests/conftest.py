"""What all tests share: one thread, a Results folder of their own, random numbers that are always the same."""

import os
import shutil
import tempfile

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

_RUNS = pytest.StashKey[str]()


def pytest_configure(config):
    """Before workers and kernels start, so that they inherit it: the user's runs/ is neither read nor written."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if not hasattr(config, "workerinput"):
        config.stash[_RUNS] = os.environ["MOE_LAB_RUNS"] = tempfile.mkdtemp(prefix="moe_lab-tests-")


def pytest_unconfigure(config):
    if _RUNS in config.stash:
        shutil.rmtree(config.stash[_RUNS], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_draws():
    """A test draws the same numbers alone, in any order and in any process; MOE_LAB_TEST_SEED=7 tries others."""
    import torch

    torch.manual_seed(int(os.environ.get("MOE_LAB_TEST_SEED", "0")))


@pytest.fixture
def real_data():
    """`real_data(name)` skips the test, with a reason, unless the data set was downloaded."""
    from moe_lab import datasets

    def need(name: str) -> None:
        if not datasets.available(name):
            pytest.skip(f"{name} is not here: moe-lab data fetch {name}, or set MOE_LAB_DATA")

    return need
