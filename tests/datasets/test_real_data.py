"""Counts on the real data, where it is (MOE_LAB_DATA); skipped elsewhere."""

import numpy as np
import pytest
import torch

from moe_lab.datasets import available, load
from moe_lab.metrics import ranking

pytestmark = pytest.mark.real_data


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not available(name), reason=f"{name} is not in the cache: `moe-lab data fetch {name}`")


@needs("ml-100k")
def test_movielens_100k_has_the_specified_counts():
    data = load("ml-100k")
    assert data.sizes == {"train": 157_500, "valid": 22_500, "test": 20_000}
    assert [int(split["watched"].sum()) for split in data.splits.values()] == [78_750, 11_250, 10_000]
    whole = {key: torch.cat([split[key] for split in data.splits.values()]).numpy() for key in data.train}
    assert len(np.unique(whole["user"] * 1682 + whole["item"])) == 200_000  # no pair twice, negatives are unrated
    positives = np.bincount(whole["user"][whole["has_rating"]], minlength=943)
    negatives = np.bincount(whole["user"][~whole["has_rating"]], minlength=943)
    assert positives.tolist() == negatives.tolist()  # nobody rated half of the catalogue
    assert positives.min() == 20
    assert np.array_equal(whole["has_rating"], whole["watched"] == 1)
    assert np.bincount(whole["rating"][whole["has_rating"]].astype(int)).tolist() == [
        0,
        6110,
        11370,
        27145,
        34174,
        21201,
    ]


@needs("ml-100k")
def test_popularity_alone_is_a_strong_baseline_on_movielens_100k():
    data = load("ml-100k")
    popularity = torch.bincount(data.train["item"][data.train["has_rating"]], minlength=1682)
    assert ranking.auc(popularity[data.test["item"]].float(), data.test["watched"]) == pytest.approx(0.855, abs=0.01)
    rating = data.test["rating"][data.test["has_rating"]]
    constant = data.train["rating"][data.train["has_rating"]].mean()
    assert float((rating - constant).square().mean()) == pytest.approx(1.272, abs=0.03)


@needs("ml-1m")
def test_movielens_1m_has_the_papers_counts():
    data = load("ml-1m")
    assert data.sizes == {"train": 1_574_602, "valid": 224_944, "test": 199_950}
    assert [int(split["watched"].sum()) for split in data.splits.values()] == [787_664, 112_524, 100_021]


@needs("multimnist")
def test_multimnist_has_the_papers_counts():
    data = load("multimnist")
    assert data.sizes == {"train": 100_000, "valid": 20_000, "test": 20_000}
    assert data.train["image"].shape[1:] == (1, 36, 36)
    assert data.train["image"].max() == 510
    assert set(data.train["labels"].unique().tolist()) == set(range(10))


@needs("mnist")
def test_mnist_has_the_stated_counts_and_the_known_mean():
    data = load("mnist")
    assert data.sizes == {"train": 50_000, "valid": 10_000, "test": 10_000}
    assert data.info["mean"][0] == pytest.approx(0.1307, abs=0.0005)
    assert data.info["std"][0] == pytest.approx(0.3081, abs=0.0005)
    assert data.test["label"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


@needs("cifar-10")
def test_cifar_10_has_the_stated_counts_and_is_named_after_its_pixels():
    data = load("cifar-10", n_train=4000, n_valid=600, n_test=1000)
    assert data.train["label"].bincount().tolist() == [400] * 10
    assert data.info["title"] in ("CIFAR-10", "CIFAR-10 (JPEG)")
    assert data.info["mean"] == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.02)
    assert data.info["class_names"][:3] == ("airplane", "automobile", "bird")


@needs("cifar-10-lt")
def test_cifar_10_lt_has_the_published_counts():
    data = load("cifar-10-lt", test="same_profile")
    assert data.sizes == {"train": 11_406, "valid": 1_000, "test": 2_478}
    both = data.train["label"].bincount() + data.valid["label"].bincount()
    assert both.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@needs("cifar-100-lt")
def test_cifar_100_lt_has_the_papers_counts():
    data = load("cifar-100-lt", test="same_profile")
    assert data.sizes == {"train": 9_847, "valid": 1_000, "test": 2_131}


@needs("svhn")
def test_svhn_has_the_published_counts():
    assert load("svhn").sizes == {"train": 68_257, "valid": 5_000, "test": 26_032}
