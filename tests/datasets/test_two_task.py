"""The two-task construction: negatives, masks, splits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.datasets.splits import split_sizes, stratified_sample, stratified_split, thin
from moe_lab.datasets.two_task import rated_and_not, sample_negatives, split_rows


@st.composite
def ratings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    n_users, n_items = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    pairs = draw(st.sets(st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1)), min_size=1))
    user, item = np.array(sorted(pairs, key=lambda pair: (pair[1], pair[0]))).T
    return user, item, n_users, n_items


@given(data=ratings(), seed=st.integers(0, 1000))
def test_every_user_gets_as_many_negatives_as_the_catalogue_allows(data, seed):
    user, item, n_users, n_items = data
    other_user, other_item = sample_negatives(user, item, n_users, n_items, np.random.default_rng(seed))
    catalogue = len(set(item))
    positives = np.bincount(user, minlength=n_users)
    assert np.bincount(other_user, minlength=n_users).tolist() == np.minimum(positives, catalogue - positives).tolist()
    rated, unrated = set(zip(user, item, strict=True)), set(zip(other_user, other_item, strict=True))
    assert len(unrated) == len(other_user)  # no pair twice
    assert not rated & unrated
    assert set(other_item) <= set(item)  # an item without a single rating is not in the catalogue


def test_negatives_are_uniform_over_the_unrated_items_and_not_by_popularity():
    # user 0 rated item 0; items 1..4 were rated by 1, 2, 3, 4 others: each should be user 0's negative equally often
    user = np.array([0, *(u for popularity in range(1, 5) for u in range(1, popularity + 1))])
    item = np.array([0, *(i for i in range(1, 5) for _ in range(i))])
    drawn = [sample_negatives(user, item, 5, 5, np.random.default_rng(seed))[1][0] for seed in range(2000)]
    counts = np.bincount(drawn, minlength=5)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 500).max() < 90  # 4.6 standard deviations of Binomial(2000, 1/4)


def test_a_pair_that_is_rated_twice_is_refused():
    with pytest.raises(ValueError, match="rated twice"):
        sample_negatives(np.array([0, 0]), np.array([1, 1]), 1, 2, np.random.default_rng(0))


def test_a_rating_of_zero_is_a_rating():
    rows = rated_and_not(np.array([0, 1]), np.array([0, 0]), np.array([0.0, -3.5]), np.array([0]), np.array([1]))
    assert rows["has_rating"].tolist() == [True, True, False]
    assert rows["watched"].tolist() == [1.0, 1.0, 0.0]
    assert rows["rating"].tolist() == [0.0, -3.5, 0.0]
    assert [array.dtype.name for array in rows.values()] == ["int64", "int64", "float32", "float32", "bool"]


def test_the_papers_split_sizes_by_hand():
    # 1,000,209 + 999,287 rows: ceil(10 %) = 199,950; ceil(12.5 % of 1,799,546) = 224,944; 1,574,602 remain
    n = 1_000_209 + 999_287
    n_valid, n_test = split_sizes(n, 0.10, 0.125)
    assert (n - n_valid - n_test, n_valid, n_test) == (1_574_602, 224_944, 199_950)
    n_valid, n_test = split_sizes(556_724, 0.15, 0.15 / 0.85)
    assert (556_724 - n_valid - n_test, n_valid, n_test) == (389_706, 83_509, 83_509)


def test_the_papers_positives_per_split():
    watched = np.repeat((1.0, 0.0), (1_000_209, 999_287))
    parts = stratified_split(watched, 224_944, 199_950, np.random.default_rng(0))
    assert [int(watched[index].sum()) for index in parts] == [787_664, 112_524, 100_021]


@settings(max_examples=50)
@given(strata=st.lists(st.integers(0, 3), min_size=1, max_size=60), data=st.data())
def test_a_stratified_sample_is_within_one_row_of_the_exact_share(strata, data):
    strata = np.array(strata)
    size = data.draw(st.integers(0, len(strata)))
    sample = stratified_sample(strata, size, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert len(sample) == len(set(sample.tolist())) == size
    for stratum in set(strata.tolist()):
        exact = (strata == stratum).sum() * size / len(strata)
        assert abs((strata[sample] == stratum).sum() - exact) < 1


def test_every_row_of_a_stratum_can_be_drawn():
    drawn = [stratified_sample(np.array([0, 0, 0, 1, 1, 1]), 2, np.random.default_rng(seed)) for seed in range(200)]
    counts = np.bincount(np.concatenate(drawn), minlength=6)
    assert counts.min() > 40  # 66.7 expected


def test_splits_are_a_partition_in_random_order():
    rows = rated_and_not(np.arange(80), np.arange(80), np.ones(80), np.arange(80), np.arange(80) + 80)
    data = split_rows("x", rows, np.random.default_rng(0), {})
    items = [split["item"] for split in data.splits.values()]
    assert sorted(torch.cat(items).tolist()) == list(range(160))
    assert data.sizes == {"train": 126, "valid": 18, "test": 16}
    assert [int(split["watched"].sum()) for split in data.splits.values()] == [63, 9, 8]
    assert all(part.tolist() != sorted(part.tolist()) for part in items)


def test_thinning_keeps_the_first_rows():
    assert thin("n", np.array([4, 2, 9]), 2).tolist() == [4, 2]
    with pytest.raises(ValueError, match="n=4"):
        thin("n", np.array([4, 2, 9]), 4)
