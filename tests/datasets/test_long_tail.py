"""Class sizes of the published formula, and which images stay."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets.long_tail import long_tail_counts, long_tailed


@pytest.mark.parametrize(
    ("n_first", "n_classes", "imbalance", "total", "last"),
    [
        (500, 100, 0.01, 10_847, 5),  # CIFAR-100-LT, as JEI-DNN counts it
        (100, 100, 0.01, 2_131, 1),  # its test set
        (5000, 10, 0.01, 12_406, 50),  # CIFAR-10-LT, as published code for it counts
        (500, 100, 0.1, 19_573, 50),
        (5000, 10, 0.1, 20_431, 500),
        (500, 100, 1.0, 50_000, 500),
    ],
)
def test_published_sizes(n_first, n_classes, imbalance, total, last):
    counts = long_tail_counts(n_first, n_classes, imbalance)
    assert (counts.sum(), counts[0], counts[-1]) == (total, n_first, last)


def test_three_classes_by_hand():
    # 90 * 0.1^0, 90 * 0.1^(1/2) = 28.46, 90 * 0.1
    assert long_tail_counts(90, 3, 0.1).tolist() == [90, 28, 9]


@given(st.integers(1, 600), st.integers(2, 120), st.floats(0.001, 1.0))
def test_sizes_never_grow_along_the_labels_and_no_class_is_empty(n_first, n_classes, imbalance):
    if int(n_first * imbalance) == 0:
        with pytest.raises(ValueError, match="without an image"):
            long_tail_counts(n_first, n_classes, imbalance)
        return
    counts = long_tail_counts(n_first, n_classes, imbalance)
    assert len(counts) == n_classes
    assert (np.diff(counts) <= 0).all()
    assert (counts[0], counts[-1]) == (n_first, int(n_first * imbalance))


@pytest.mark.parametrize("imbalance", [0.0, -0.1, 1.01, float("nan")])
def test_an_imbalance_out_of_range_is_refused(imbalance):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        long_tail_counts(100, 10, imbalance)


def test_the_error_for_an_empty_class_names_an_imbalance_that_works():
    with pytest.raises(ValueError, match=r"take 0\.005 or more"):
        long_tail_counts(200, 10, 0.004)
    assert long_tail_counts(200, 10, 0.005)[-1] == 1
    with pytest.raises(ValueError, match="2 classes or more"):
        long_tail_counts(200, 1, 0.5)


def test_rows_have_the_sizes_keep_the_order_and_depend_on_the_generator():
    labels = np.random.default_rng(0).permutation(np.arange(600) % 3)
    rows = long_tailed(labels, 3, 0.1, np.random.default_rng(1))
    assert np.bincount(labels[rows]).tolist() == long_tail_counts(200, 3, 0.1).tolist()
    assert (np.diff(rows) > 0).all()  # the order as published, and no row twice
    assert rows.tolist() == long_tailed(labels, 3, 0.1, np.random.default_rng(1)).tolist()
    assert rows.tolist() != long_tailed(labels, 3, 0.1, np.random.default_rng(2)).tolist()


def test_every_image_of_a_thinned_class_can_stay():
    labels = np.repeat((0, 1), 6)
    kept = np.concatenate([long_tailed(labels, 2, 0.5, np.random.default_rng(seed)) for seed in range(400)])
    counts = np.bincount(kept, minlength=12)
    assert counts[:6].tolist() == [400] * 6
    assert np.abs(counts[6:] - 200).max() < 50  # 3 of 6 stay, 400 times; standard deviation 10


def test_a_class_that_is_missing_is_refused():
    with pytest.raises(ValueError, match="without an image"):
        long_tailed(np.zeros(5, dtype=np.int64), 2, 0.5, np.random.default_rng(0))
