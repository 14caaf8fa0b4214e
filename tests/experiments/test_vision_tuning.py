"""Random search on images: the same study as on the recommender, on other trials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_lab.experiments import comet_tuning, vision_tuning
from moe_lab.experiments.vision_tuning import GATES, VisionTuningConfig

SMALL = {
    "data_options": {"digit_size": 8, "n_train": 64, "n_valid": 30, "n_test": 30},
    "n_experts": 4,
    "channels": (2,),
    "dense": (4,),
    "head": (4,),
    "batch_size": 32,
    "epochs": 2,
}


def study(**changes):
    return VisionTuningConfig(gates=("hash", "comet+"), n_trials=3, changes=SMALL, **changes)


def losses(result):
    return [[row[name] for name in ("trial", "valid_loss", "test_loss", "test_accuracy")] for row in _rows(result)]


def _rows(result):
    return result.curves["trials"]


def test_a_study_in_stacks_has_the_rows_and_pools_of_a_study_of_single_trials(tmp_path):
    single = vision_tuning.run(study(), root=tmp_path / "single", progress=False)
    stacked = vision_tuning.run(study(), root=tmp_path / "stacked", progress=False, stack_size=2)
    assert [row["gate"] for row in _rows(stacked)] == 3 * ["hash"] + 3 * ["comet+"]
    assert [row.keys() for row in _rows(stacked)] == [row.keys() for row in _rows(single)]
    np.testing.assert_allclose(losses(stacked), losses(single), rtol=1e-3, atol=1e-6)
    assert stacked.environment["trials_side_by_side"] == 2
    assert "trials_side_by_side" not in single.environment
    pools = comet_tuning.pools(stacked)
    assert list(pools) == ["hash", "comet+"]
    assert len(pools["hash"].test) == 3


def test_a_longer_study_begins_with_the_trials_of_a_shorter_one(tmp_path):
    short = vision_tuning.run(study(), root=tmp_path, progress=False, stack_size=3)
    config = VisionTuningConfig(gates=("hash", "comet+"), n_trials=5, changes=SMALL)
    long = vision_tuning.run(config, root=tmp_path, progress=False, stack_size=3)
    assert [row for row in _rows(long) if row["trial"] < 3] == _rows(short)


def test_the_search_takes_its_share_of_the_epochs():
    config = VisionTuningConfig.profile("standard")
    drawn = {"learning_rate": 1e-3, "gamma": 0.01, "entropy_weight": 0.1, "permutation_epochs": 10}
    trial = config.trial("comet+", 7, drawn)
    assert (trial.gate, trial.seed, trial.epochs, trial.permutation_epochs) == ("comet+", 7, 5, 2.0)
    assert (trial.dataset, trial.n_experts, trial.k, trial.watched_images) == ("multimnist", 16, 4, 0)
    assert drawn["permutation_epochs"] == 10
    paper = VisionTuningConfig.profile("paper")
    assert (paper.n_trials, paper.trial("comet+", 0, drawn).permutation_epochs) == (500, 10)
    assert tuple(paper.gates) == GATES
    assert VisionTuningConfig().dataset == "multimnist"


def test_a_diverged_trial_is_kept_as_nan(tmp_path):
    planned = vision_tuning.plan(study(), root=tmp_path)
    for row in planned.curves["plan"]:
        if row["trial"] == 1:
            row["drawn"]["learning_rate"] = 1e30
    planned.save()
    for stack_size in (3, 1):
        rows = _rows(vision_tuning.run(study(), root=tmp_path, progress=False, stack_size=stack_size))
        assert [math.isnan(row["test_loss"]) for row in rows] == 2 * [False, True, False]
        planned.curves.pop("trials", None)
        planned.save()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_trials": 0}, "n_trials must be at least 1"),
        ({"gates": ("komet",)}, "did you mean 'comet'"),
        ({"vision": "fast"}, "fast"),
        ({"search_scale": 0}, "search_scale must be positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VisionTuningConfig(**changes)


def test_a_stack_of_no_trial_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stack_size must be at least 1"):
        vision_tuning.run(study(), root=tmp_path, stack_size=0)
