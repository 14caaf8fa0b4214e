"""A claim of the paper is judged by the numbers of Results, and only with enough seeds."""

import math

import numpy as np
import pytest

from moe_lab.experiments.claims import COLUMNS, recommender_claims, tuning_claims
from moe_lab.experiments.compare import over_seeds, paired_difference, readable, scores
from moe_lab.experiments.vision_claims import select, vision_claims
from moe_lab.results import Result
from moe_lab.tuning import Pool


def result(gate, seed, metrics, **config):
    fixed = {"dataset": "toy", "n_experts": 8, "k": 2, "center_pixels": False, "gamma": 1.0}
    return Result("toy", {"gate": gate, "seed": seed, **fixed, **config}, None, seed=seed, metrics=metrics)


def runs(gate, values, metric="test_auc", used=8, **config):
    others = {"used_experts": used, "within_k": 1.0, "valid_loss": 1.0}
    return [result(gate, seed, {metric: value, **others}, **config) for seed, value in enumerate(values)]


def verdicts(table):
    return dict(zip(table["paper claims"], table["does it hold?"], strict=True))


def test_differences_are_paired_by_seed():
    gap = paired_difference(
        runs("topk", [0.1, 0.5, 0.9]) + runs("comet+", [0.2, 0.6, 1.0]), "test_auc", "topk", "comet+"
    )
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (gap.sign, gap.seeds) == (1, 3)


def test_two_seeds_decide_nothing():
    table = recommender_claims(runs("topk", [0.5, 0.6]) + runs("comet+", [0.7, 0.8]))
    (verdict,) = verdicts(table).values()
    assert verdict == "inconclusive (2 seeds)"


@pytest.mark.parametrize(("better", "verdict"), [(0.9, "yes, in sign"), (0.1, "no: the other way round")])
def test_a_difference_of_one_sign_in_all_seeds_is_a_verdict(better, verdict):
    table = recommender_claims(runs("hash", [0.5, 0.51, 0.52]) + runs("comet+", [better, better, better + 0.01]))
    assert tuple(table.columns) == COLUMNS
    assert verdicts(table)["comet+: AUC up to 13 % above hash (abstract)"] == verdict
    assert table["on what"][0] == "toy, 8 experts, k = 2, 3 seeds"


@pytest.mark.parametrize(("used", "verdict"), [((1, 2), "yes"), ((4, 8), "sometimes"), ((7, 8), "not here")])
def test_collapse_is_half_of_the_experts_or_fewer(used, verdict):
    table = recommender_claims([r for seed, n in enumerate(used) for r in [runs("dselect_k", [0.5] * 2, used=n)[seed]]])
    (found,) = verdicts(table).values()
    assert found == verdict


def test_tuning_claims_need_both_gates_and_an_interval_away_from_one():
    rng = np.random.default_rng(0)
    poor = rng.uniform(1, 2, 60)
    pools = {"hash": Pool.of(poor, poor), "hash+": Pool.of(poor - 0.9, poor - 0.9)}
    table = tuning_claims(pools, "toy")
    assert verdicts(table)["hash+: up to 100 times fewer trials than hash (abstract)"] == "yes, in sign"
    same = tuning_claims({"hash": pools["hash"], "hash+": pools["hash"]}, "toy")
    assert list(verdicts(same).values()) == ["inconclusive"]
    assert tuning_claims({"hash": pools["hash"]}, "toy").empty


def test_vision_claims_choose_the_setting_that_most_seeds_share_by_validation_loss():
    worse = runs("comet", [0.9] * 3, "test_accuracy", gamma=1.0)
    better = runs("comet", [0.8] * 3, "test_accuracy", gamma=10.0)
    for r in better:
        r.metrics["valid_loss"] = 0.5
    few = runs("comet", [0.99], "test_accuracy", gamma=5.0)
    assert {r.config["gamma"] for r in select(worse + better + few, "comet")} == {10.0}
    assert [r.config["gamma"] for r in select(worse + better, "comet", gamma=1.0)] == [1.0] * 3
    assert select(worse, "topk") == []


def test_vision_claims_judge_accuracy_cardinality_and_collapse():
    results = runs("topk", [0.90, 0.91, 0.92], "test_accuracy") + runs("comet+", [0.95, 0.96, 0.97], "test_accuracy")
    results += runs("comet", [0.9] * 3, "test_accuracy", used=2)
    results[-1].metrics["within_k"] = 0.5
    found = verdicts(vision_claims(results))
    assert found["comet+ beats topk (AUC, up to 13 %; abstract)"] == "yes, in sign"
    assert found["comet: at most k experts once trained"] == "no"
    assert found["comet+: at most k experts once trained"] == "yes"
    assert found["(says nothing of COMET's)"] == "yes"
    with pytest.raises(ValueError, match="one data set"):
        vision_claims(results + runs("topk", [0.9], "test_accuracy", dataset="other"))


def test_scores_put_what_needs_no_gate_on_top():
    table = scores(
        runs("topk", [0.5, 0.7]),
        ["test_auc", "used_experts"],
        one_expert=runs("softmax", [0.4], n_experts=1),
        floor={"test_auc": 0.25},
    )
    assert list(table.index) == ["(no network)", "(one expert)", "topk"]
    assert table["test_auc"].tolist() == ["0.250", "0.400", "0.600 ± 0.141"]
    assert table["used_experts"]["(no network)"] == "" and table["seeds"]["topk"] == "2"


def test_one_seed_has_no_spread_and_a_seed_counts_once():
    table = over_seeds(runs("topk", [0.5]), ["test_auc"])
    assert math.isnan(table["test_auc", "std"]["topk"]) and readable(table)["test_auc"]["topk"] == "0.500"
    with pytest.raises(ValueError, match="several Results per seed"):
        over_seeds(runs("topk", [0.5]) * 2, ["test_auc"])
    with pytest.raises(ValueError, match="no Results"):
        over_seeds([], ["test_auc"])
