"""Names, options, determinism."""

import random

import numpy as np
import pytest
import torch

from moe_lab.datasets import Dataset, DatasetNotFound, available, load, names, options_of
from moe_lab.datasets.loading import BUILDERS
from moe_lab.datasets.registry import DATASETS

EMBEDDED = {
    "planted-recommender": {"n_users": 60, "n_items": 40, "items_per_user": 10},
    "planted-clusters": {"n_train": 80, "n_valid": 40, "n_test": 40},
    "multidigits": {"n_train": 50, "n_valid": 20, "n_test": 20},
    "digits-mixture": {"n_train": 50, "n_valid": 20, "n_test": 20},
    "planted-text": {"n_characters": 3000, "length": 16},
    "planted-judgements": {"n_train": 50, "n_valid": 20, "n_test": 20},
    "planted-pairs": {"n_train": 50, "n_valid": 20, "n_test": 20},
    "moved-digits": {"n_train": 50, "n_valid": 20, "n_test": 20},
    "planted-difficulty": {"n_train": 50, "n_valid": 20, "n_test": 20},
}


def equal(first: Dataset, second: Dataset) -> bool:
    return all(
        torch.equal(array, second.splits[split][key])
        for split, arrays in first.splits.items()
        for key, array in arrays.items()
    )


def test_every_registered_name_has_a_builder():
    assert list(BUILDERS.keys() ^ DATASETS.keys()) == []
    assert names() == list(DATASETS)


def test_embedded_data_needs_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_LAB_DATA", str(tmp_path / "nothing"))
    assert {name for name in names() if available(name)} == {*EMBEDDED, "text-file"}


@pytest.mark.parametrize("name", EMBEDDED)
def test_data_depend_on_the_seed_and_on_nothing_else(name):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    first = load(name, seed=3, **EMBEDDED[name])
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert equal(first, load(name, seed=3, **EMBEDDED[name]))
    assert not equal(first, load(name, seed=4, **EMBEDDED[name]))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    load(name, seed=5, **EMBEDDED[name])
    assert states[0] == random.getstate()  # building drew nothing from a global generator
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'multidigits'"):
        load("multidigit")
    with pytest.raises(ValueError, match="did you mean 'ml-100k'"):
        available("ml100k")


def test_a_misspelt_option_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'n_train'"):
        load("multidigits", n_trian=3)
    assert options_of("multidigits")["partners"] == 6


def test_missing_real_data_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_LAB_DATA", str(tmp_path))
    with pytest.raises(DatasetNotFound, match="moe-lab data fetch ml-1m") as caught:
        load("ml-1m")
    assert str(tmp_path / "ml-1m.zip") in str(caught.value)


def test_more_examples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 7,698 rows"):
        load("multidigits", n_train=10_000)


def test_splits_must_agree():
    rows = {"features": torch.zeros(3, 2), "target": torch.zeros(3)}
    with pytest.raises(ValueError, match="differ in length"):
        Dataset("x", "planted", rows, rows, {"features": torch.zeros(3, 2), "target": torch.zeros(2)})
    with pytest.raises(ValueError, match="train has"):
        Dataset("x", "planted", rows, {"features": torch.zeros(3, 2)}, rows)
    with pytest.raises(ValueError, match="did you mean 'planted'"):
        Dataset("x", "plantd", rows, rows, rows)
