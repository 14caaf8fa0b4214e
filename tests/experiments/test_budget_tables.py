"""Tables of notebook 06 hold the numbers of their pools."""

import numpy as np
import pandas as pd
import pytest

from moe_lab.experiments import budget_tables as tables
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.results import Result
from moe_lab.results.plain import to_plain
from moe_lab.tuning import Pool, difference_interval, expected_best, loss_behind, times_fewer_trials


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


def test_verdicts_by_the_loss_and_by_the_ratio_a_row_per_pair_and_study():
    same, few = {"topk": pool(0), "topk+": pool(0)}, {"hash": pool(1, 4), "hash+": pool(0, 4, 1)}
    table = tables.verdicts({"long": POOLS, "short": few, "same": same}, n_resamples=200)
    assert list(table.index) == ["hash+ − hash, long", "hash+ − hash, short", "topk+ − topk, same"]
    assert table["trials"].tolist() == [20, 4, 20]
    gap = difference_interval(POOLS["hash"], POOLS["hash+"], 20, 200)
    assert table.loc["hash+ − hash, long", "after all"] == f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
    assert table["loss told apart"].tolist() == ["lower", "lower", "no"]
    assert table["ratio told apart"][["hash+ − hash, long", "topk+ − topk, same"]].tolist() == ["fewer", "no"]
    assert table["times fewer trials"].tolist() == ["20", "4", "1"]
    assert table.loc["hash+ − hash, short", "after 5"] == table.loc["hash+ − hash, short", "after all"]
    turned = {"hash": POOLS["hash+"], "hash+": POOLS["hash"]}
    row = tables.verdicts({"turned": turned}, n_resamples=200).iloc[0]
    assert row[["loss told apart", "ratio told apart", "as many by chance"]].tolist() == ["higher", "more", "100 %"]


def by_hand(**losses):
    rows = [
        {"gate": gate, "trial": i, "drawn": {"learning_rate": i + 1.0}, "valid_loss": loss, "test_loss": loss}
        for gate, of in losses.items()
        for i, loss in enumerate(of)
    ]
    return Result("toy", {"gates": list(losses)}, None, curves={"trials": rows})


def test_the_same_points_trained_again_are_compared_trial_by_trial():
    nan = float("nan")
    first, second = by_hand(hash=[1.0, 3.0, nan], topk=[1.0]), by_hand(hash=[1.5, 3.1, 2.0, 9.0], comet=[0.0])
    table = tables.trained_again(first, second)
    assert list(table.index) == ["hash"]
    assert table.loc["hash"].tolist() == [2, "+0.3000 ± 0.2000", f"{0.4 / 2**0.5:.4f}", f"{2**0.5:.4f}"]
    second.curves["trials"][1]["drawn"] = {"learning_rate": 0.5}
    with pytest.raises(ValueError, match="different points"):
        tables.trained_again(first, second)


def test_first_trials_are_the_study_as_it_was():
    first = tables.first_trials(POOLS, 3)
    pd.testing.assert_series_equal(pd.Series(first["hash"].test), pd.Series(POOLS["hash"].test[:3]))
    assert {len(pool.valid) for pool in first.values()} == {3}
