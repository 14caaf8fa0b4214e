"""The table of trials per hour says what it measured; no timing is tested."""

from __future__ import annotations

import math
import sys

import pytest

from moe_lab.bench.many_trials import ManyTrialsBench, trials_table

TINY = {
    "data_options": {"n_users": 30, "n_items": 20, "items_per_user": 6},
    "n_experts": 3,
    "embedding": 2,
    "hidden": 4,
    "head": 4,
    "epochs": 2,
}


def test_the_table_compares_a_stack_with_single_trials_of_the_same_study():
    config = ManyTrialsBench("quick", ("hash", "comet+"), side_by_side=3, alone=2, changes=TINY)
    rows = trials_table(config)
    assert [row["gate"] for row in rows] == ["hash", "comet+"]
    for row in rows:
        assert row["trials"] == 3
        assert row["failed"] == 0
        assert row["times"] == pytest.approx(row["per_hour_stacked"] / row["per_hour_alone"])
        assert row["per_hour_stacked"] == pytest.approx(3 * 3600 / row["stack_s"])
        assert math.isnan(row["peak_gib"])  # a CPU keeps no such number


def test_trials_are_those_of_random_search():
    config = ManyTrialsBench("quick", ("comet",), side_by_side=4, alone=1, changes=TINY)
    trials = config.trials("comet")
    assert [trial.seed for trial in trials] == [0, 1, 2, 3]
    assert len({trial.learning_rate for trial in trials}) == 4


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match="pip install optuna"):
        ManyTrialsBench("quick", ("comet",), side_by_side=1, alone=1, changes=TINY).trials("comet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side_by_side": 0}, "at least one trial each way"),
        ({"gates": ("commet",)}, "did you mean 'comet'"),
        ({"recommender": "quik"}, "did you mean 'quick'"),
    ],
)
def test_a_bench_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ManyTrialsBench(**options)
