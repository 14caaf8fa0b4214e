"""What is planted is really there, and only there."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.datasets import load
from moe_lab.datasets.planted_clusters import leaf_sides
from moe_lab.datasets.planted_recommender import reference_scores


def test_leaves_of_five_are_numbered_from_left_to_right_by_hand():
    # heap of 9 nodes: splits 0 1 2 3, leaves 4..8; left to right: 7, 8 (below 3), 4 (right of 1), 5, 6 (below 2)
    expected = [[1, 1, 0, 1], [1, 1, 0, -1], [1, -1, 0, 0], [-1, 0, 1, 0], [-1, 0, -1, 0]]
    assert leaf_sides(5).astype(int).tolist() == expected


@pytest.mark.parametrize("n_experts", [1, 2, 3, 5, 8, 9])
def test_the_planted_tree_of_hyperplanes_routes_to_the_planted_expert(n_experts):
    data = load("planted-clusters", n_experts=n_experts, siblings="scrambled", n_train=900, n_valid=300, n_test=300)
    side = data.test["features"] @ data.info["split_weight"].T  # (N, E - 1), > 0 is left
    sides = torch.from_numpy(leaf_sides(n_experts)).float()
    on_path = (side[:, None] * sides[None] >= 0).all(dim=2)
    assert (on_path.sum(dim=1) == 1).all()
    leaf = on_path.float().argmax(dim=1)
    assert (data.info["assignment"][leaf] == data.test["expert"]).float().mean() > 0.99


@pytest.mark.parametrize("functions", ["linear", "signs"])
def test_the_right_expert_explains_all_but_the_noise_and_a_wrong_one_nothing(functions):
    data = load("planted-clusters", functions=functions, siblings="scrambled", noise=0.1, n_test=4000)
    answers = data.test["features"] @ data.info["expert_weight"].T + data.info["expert_bias"]
    error = answers - data.test["target"][:, None]
    right = error[torch.arange(len(error)), data.test["expert"]]
    assert right.std().item() == pytest.approx(0.1, rel=0.05)
    neighbour = data.info["assignment"][data.test["cluster"] ^ 1]  # the sibling leaf's expert
    assert error[torch.arange(len(error)), neighbour].square().mean() > 1.0


def test_signs_of_siblings_cancel():
    data = load("planted-clusters", functions="signs")
    weight = data.info["expert_weight"]
    assert torch.equal(weight[0::2], -weight[1::2])


def test_one_linear_model_cannot_do_the_experts_work():
    data = load("planted-clusters")
    x, y = data.train["features"].double(), data.train["target"].double()
    design = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
    residual = y - design @ torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    assert residual.var() / y.var() > 0.7


def test_scrambling_changes_who_is_right_but_not_what_is_seen():
    tree, scrambled = (load("planted-clusters", siblings=kind) for kind in ("tree", "scrambled"))
    assert torch.equal(tree.info["assignment"], torch.arange(8))
    assert sorted(scrambled.info["assignment"].tolist()) == list(range(8))
    assert not torch.equal(scrambled.info["assignment"], torch.arange(8))
    assert torch.equal(scrambled.info["assignment"][scrambled.test["cluster"]], scrambled.test["expert"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_knowing_the_cluster_beats_popularity_and_a_hash_of_users_does_not(seed):
    scores = reference_scores(load("planted-recommender", seed=seed))
    assert 0.65 < scores["popularity"] < 0.80  # uniform negatives: popularity is strong
    assert scores["planted"] > scores["popularity"] + 0.08
    assert scores["hash"] < scores["popularity"]
    assert scores["planted"] < scores["oracle"] < 0.90


def test_without_taste_only_popularity_is_left():
    data = load("planted-recommender", taste=0.0, n_users=300, n_items=200)
    scores = reference_scores(data)
    assert scores["planted"] < scores["popularity"] + 0.01
    assert scores["oracle"] == pytest.approx(scores["popularity"], abs=0.03)


def test_rating_depends_on_the_cluster_of_the_user():
    data = load("planted-recommender")
    rated = data.train["has_rating"]
    rating, item, expert = (data.train[key][rated].numpy() for key in ("rating", "item", "expert"))
    assert set(np.unique(rating)) <= {1.0, 2.0, 3.0, 4.0, 5.0}

    def unexplained(group: np.ndarray) -> float:  # variance around the mean of a group
        mean = np.bincount(group, rating) / np.maximum(np.bincount(group), 1)
        return float(np.mean((rating - mean[group]) ** 2))

    assert unexplained(expert * 400 + item) < 0.6 * unexplained(item)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), n_clusters=st.integers(1, 6))
def test_planted_recommender_is_well_formed(seed, n_clusters):
    data = load("planted-recommender", seed=seed, n_users=30, n_items=20, n_clusters=n_clusters, items_per_user=6)
    for split in data.splits.values():
        assert ((split["expert"] >= 0) & (split["expert"] < n_clusters)).all()
        assert (split["has_rating"] == (split["watched"] == 1)).all()
        assert (split["rating"][~split["has_rating"]] == 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"functions": "linaer"}, "did you mean 'linear'"),
        ({"siblings": "tre"}, "did you mean 'tree'"),
        ({"n_experts": 8, "n_features": 6}, "n_features"),
        ({"spread": 0.0}, "spread"),
    ],
)
def test_bad_options_are_explained(options, says):
    with pytest.raises(ValueError, match=says):
        load("planted-clusters", **options)
