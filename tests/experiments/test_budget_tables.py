"""Tables of notebook 06 hold the numbers of their pools."""

import numpy as np

from moe_lab.experiments import budget_tables as tables
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.results import Result
from moe_lab.results.plain import to_plain
from moe_lab.tuning import Pool, expected_best, loss_behind, times_fewer_trials


def pool(shift, n=20, seed=0):
    losses = shift + np.random.default_rng(seed).random(n)
    return Pool.of(losses, losses)


POOLS = {"softmax": pool(0), "hash": pool(2), "hash+": pool(1, seed=1), "topk": pool(0, seed=2)}


def test_only_gates_that_are_there_with_and_without_plus_are_compared():
    assert tables.pairs_in(POOLS) == [("hash", "hash+")]
    row = tables.comparison(POOLS).loc["hash+ − hash"]
    gap = expected_best(POOLS["hash+"], [5])[0] - expected_best(POOLS["hash"], [5])[0]
    assert row["after 5"].startswith(f"{gap:+.4f} [")
    assert row["times fewer trials"] == "20 (of 20)"
    assert "after 5" not in tables.comparison({"hash": pool(0, 3), "hash+": pool(0, 3, 1)})


def test_worth_names_only_ratios_that_the_pool_knows():
    table = tables.worth({"hash": pool(0, 5), "topk": pool(0, 20)})
    assert table["10 times fewer"].isna().tolist() == [True, False]
    assert table["2 times fewer"]["hash"] == f"{loss_behind(pool(0, 5), 2):.4f}"


def test_a_stopped_study_knows_its_first_trials_only():
    table = tables.stopped(POOLS, (4, 20))
    first = [Pool(POOLS[name].valid[:4], POOLS[name].test[:4]) for name in ("hash", "hash+")]
    assert table[4]["hash+: times fewer"] == f"{times_fewer_trials(*first):.2g}" == "4"
    assert table[20]["hash+: times fewer"] == "20"


def test_chance_keeps_what_was_measured_beside_what_shuffling_shows():
    chance = tables.chance(POOLS, n_resamples=200)
    assert set(chance.halves) == set(POOLS)
    assert chance.observed == {"hash+": 20}
    assert (chance.heaps["hash+"] < 20).all()  # shuffled, the gap of a whole unit is gone
    shares = {gate: (np.maximum(null, 1 / null) >= 2).mean() for gate, null in chance.halves.items()}
    assert chance.twofold() == min(shares.values()) > 0
    assert chance.either_way()["topk"]["2 or more"] == f"{shares['topk']:.0%}"


def test_overview_of_a_study():
    config = TuningConfig(gates=("hash", "hash+"), n_trials=2)
    rows = [
        {"gate": gate, "trial": i, "valid_loss": loss, "test_loss": loss, "seconds": seconds}
        for gate, seconds in (("hash", 1.0), ("hash+", 2.0))
        for i, loss in enumerate((0.5, 0.7))
    ]
    study = Result("toy", to_plain(config, "config"), None, curves={"trials": rows})
    assert tables.dataset_of(study) == "planted-recommender"
    table = tables.overview(study)
    assert table["loss after 1 trial"].tolist() == ["0.6000", "0.6000"]
    assert table["seconds per trial"].to_dict() == {"hash": 1.0, "hash+": 2.0}
    assert table["test loss, best 1"]["hash"] == "0.5000"  # a single trial has no standard error
    assert table["search space"]["hash+"] == "4 x a range"
