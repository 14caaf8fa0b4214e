"""The control of the tuning study: everything is as in the trial it controls, only nothing is searched."""

import numpy as np
import pandas as pd
import pytest

from moe_lab.experiments import (
    comet_recommender,
    comet_tuning,
    comet_vision,
    recorded_studies,
    unlearned_search,
    vision_tuning,
)
from moe_lab.experiments.comet_recommender import build_model
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.experiments.vision_tuning import VisionTuningConfig
from moe_lab.gates.sinkhorn import best_assignment
from moe_lab.results import Result

CHANGES = {
    "data_options": {"n_users": 60, "n_items": 40, "items_per_user": 10},
    "n_experts": 4,
    "embedding": 4,
    "hidden": 8,
    "head": 8,
    "epochs": 2,
}
STUDY = TuningConfig(gates=("hash", "hash+"), n_trials=2, changes=CHANGES)
TRIAL = STUDY.trial("hash+", 0, {"learning_rate": 0.05, "permutation_epochs": 2.0})


def test_with_learning_left_on_it_is_the_recommender_run(tmp_path, monkeypatch):
    monkeypatch.setattr(unlearned_search, "stop_learning", lambda model: None)
    control = unlearned_search.run_trial(TRIAL, root=tmp_path)
    original = comet_recommender.run(TRIAL, root=tmp_path, progress=False)
    for name in ("valid_loss", "test_loss", "test_auc", "test_mse"):
        assert control.metrics[name] == original.metrics[name]


def test_the_permutation_hardens_to_the_one_it_was_drawn_with(tmp_path, monkeypatch):
    models = []

    def keep(*arguments):
        models.append(build_model(*arguments))
        start.append(best_assignment(models[-1].moe.gates[0].permutation.logits).tolist())
        return models[-1]

    start = []
    monkeypatch.setattr(unlearned_search, "build_model", keep)
    unlearned_search.run_trial(TRIAL, root=tmp_path)
    permutation = models[0].moe.gates[0].permutation
    assert not permutation.is_soft
    assert bool(permutation.hardened)
    assert permutation.assignment().tolist() == start[0]


def test_study_repeats_the_points_of_the_plus_gates_and_is_compared_trial_by_trial(tmp_path):
    study = comet_tuning.run(STUDY, root=tmp_path, progress=False)
    control = unlearned_search.run(STUDY, root=tmp_path, progress=False)
    points = [(row["gate"], row["trial"], row["drawn"]) for row in study.curves["trials"] if row["gate"] == "hash+"]
    assert [(row["gate"], row["trial"], row["drawn"]) for row in control.curves["trials"]] == points
    assert list(comet_tuning.pools(control)) == ["hash+"]
    table = unlearned_search.compare(study, control)
    differences = [
        row["test_loss"] - other["test_loss"]
        for row, other in zip(study.curves["trials"][2:], control.curves["trials"], strict=True)
    ]
    assert table["learning"]["hash+"] == pytest.approx(sum(differences) / 2)
    assert table["pairs"]["hash+"] == 2


def test_a_control_in_stacks_has_the_losses_of_one_trial_at_a_time(tmp_path):
    """Without dropout, whose masks a stack takes from elsewhere; the second search does not end."""
    config = TuningConfig(gates=("hash", "hash+", "comet+"), n_trials=2, changes={**CHANGES, "dropout": 0.0})
    found = {}
    for name, stack_size in (("single", 1), ("stacked", 2)):
        comet_tuning.plan(config, root=tmp_path / name)
        found[name] = unlearned_search.run(config, root=tmp_path / name, progress=False, stack_size=stack_size)
    single, stacked = (found[name].curves["trials"] for name in ("single", "stacked"))
    assert [(row["gate"], row["trial"]) for row in stacked] == [
        ("hash+", 0),
        ("hash+", 1),
        ("comet+", 0),
        ("comet+", 1),
    ]
    for row, other in zip(stacked, single, strict=True):
        assert row.keys() == other.keys()
        assert row["drawn"] == other["drawn"]
        for name in ("valid_loss", "test_loss", "test_auc", "test_mse"):
            assert row[name] == pytest.approx(other[name], rel=1e-3)
    study = comet_tuning.run(config, root=tmp_path / "stacked", progress=False, stack_size=2)  # trials of its own
    assert [row["gate"] for row in study.curves["trials"]] == ["hash", "hash", "hash+", "hash+", "comet+", "comet+"]
    learned = [row["test_loss"] for row in study.curves["trials"][2:]]
    assert learned != [row["test_loss"] for row in stacked]


IMAGES = VisionTuningConfig(gates=("hash", "hash+"), n_trials=2)


def test_on_images_with_learning_left_on_it_is_the_vision_run(tmp_path, monkeypatch):
    trial = IMAGES.trial("hash+", 0, {"learning_rate": 0.01, "permutation_epochs": 5.0})
    control = unlearned_search.run_trial(trial, root=tmp_path / "control")
    original = comet_vision.run(trial, root=tmp_path, progress=False)
    monkeypatch.setattr(unlearned_search, "stop_learning", lambda model: None)
    same = unlearned_search.run_trial(trial, root=tmp_path / "same")
    for metrics in (same.metrics, original.metrics):
        metrics.pop("steps_per_second")
    assert same.metrics == original.metrics
    assert control.metrics["test_loss"] != original.metrics["test_loss"]


def test_a_control_on_images_is_one_of_its_study_alone_and_in_stacks(tmp_path):
    found = {}
    for name, stack_size in (("single", 1), ("stacked", 2)):
        found[name] = unlearned_search.run(IMAGES, root=tmp_path / name, progress=False, stack_size=stack_size)
    single, stacked = (found[name].curves["trials"] for name in ("single", "stacked"))
    assert [(row["gate"], row["trial"]) for row in stacked] == [("hash+", 0), ("hash+", 1)]
    for row, other in zip(stacked, single, strict=True):
        assert row.keys() == other.keys() and {"valid_loss", "test_loss", "test_accuracy"} <= row.keys()
        assert row["drawn"] == other["drawn"]
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-3)
    study = vision_tuning.run(IMAGES, root=tmp_path / "stacked", progress=False, stack_size=2)
    table = unlearned_search.compare(study, found["stacked"])
    learned = [row["test_loss"] for row in study.curves["trials"] if row["gate"] == "hash+"]
    assert table["learning"]["hash+"] == pytest.approx(np.mean(learned) - np.mean([r["test_loss"] for r in stacked]))
    assert recorded_studies.control_of(study, root=tmp_path / "stacked").config == study.config


def by_hand(config, **losses):
    rows = [{"gate": gate, "trial": i, "test_loss": loss} for gate, of in losses.items() for i, loss in enumerate(of)]
    return Result(
        "toy", config, None, curves={"trials": [row | {"gate": row["gate"].replace("_", "+")} for row in rows]}
    )


def test_numbers_by_hand_and_diverged_trials_leave_their_pair():
    config = {"gates": ["hash", "hash+"]}
    nan = float("nan")
    study = by_hand(config, hash=[5.0, 7.0, nan], hash_=[3.0, 5.0, 4.0])
    table = unlearned_search.compare(study, by_hand(config, hash_=[3.5, nan, 4.0])).loc["hash+"]
    assert table[["without", "learned", "unlearned", "plus"]].tolist() == [6.0, 4.0, 3.75, -2.0]
    assert table["plus_error"] == pytest.approx((1 + 1 / 3) ** 0.5)  # variances 2/2 and 1/3
    assert (table["learning"], table["learning_error"], table["pairs"]) == (-0.25, 0.25, 2)
    assert table["left"] == 2.25 / 2.5  # over the two pairs
    assert table["left_low"] < table["left"] < table["left_high"]
    text = unlearned_search.readable(table.to_frame().T.rename_axis("gate"))
    assert text["learned minus not learned"]["hash+"] == "-0.2500 ± 0.2500"


def test_the_interval_of_what_is_left_has_its_truth_inside_about_as_often_as_it_says():
    rng, truth, studies = np.random.default_rng(0), 0.6, 300
    inside = 0
    for _ in range(studies):
        without, point = 10 + rng.normal(size=60), rng.normal(size=60)
        learned, unlearned = 8 + point, 10 - 2 * truth + point + 0.3 * rng.normal(size=60)
        left = unlearned_search._left(without, learned, unlearned, n_resamples=400)
        inside += left.low <= truth <= left.high
    assert 0.90 <= inside / studies <= 0.99


def test_trials_are_grouped_by_the_length_of_their_soft_phase():
    config = {"gates": ["hash", "hash+"]}
    study = by_hand(config, hash=[5.0, 7.0], hash_=[3.0, 5.0, 4.0, 2.0])
    control = by_hand(config, hash_=[3.5, 5.0, float("nan"), 3.0])
    for row in control.curves["trials"]:
        row["drawn"] = {"permutation_epochs": 1 + row["trial"] % 2}
    table = unlearned_search.by_soft_epochs(study, control, "hash+")
    assert table.index.tolist() == [1, 2]
    assert table[["without", "learned", "unlearned", "learning"]].to_numpy().tolist() == [
        [6.0, 3.5, 3.5, -0.5],
        [6.0, 3.5, 4.0, -0.5],
    ]
    assert table["pairs"].tolist() == [1, 2]
    study.config["search_scale"] = control.config["search_scale"] = 0.1  # epochs are a tenth of what was drawn
    assert unlearned_search.by_soft_epochs(study, control, "hash+").index.tolist() == [0.1, 0.2]
    with pytest.raises(ValueError, match=r"topk\+ with and without"):
        unlearned_search.by_soft_epochs(study, control, "topk+")


def test_sentences_tell_apart_what_lies_two_standard_errors_apart():
    row = {"learning_error": 0.5, "plus": -3.0, "plus_error": 1.0, "left": 0.63, "pairs": 40.0}
    row |= {"left_low": 0.43, "left_high": 0.74}
    rows = {
        "hash+": {**row, "learning": -2.0},
        "topk+": {**row, "learning": 2.0, "plus": -1.0},
        "comet+": {**row, "learning": 0.5, "plus": 3.0},
    }
    better, worse, apart = unlearned_search.sentences(pd.DataFrame(rows).T)
    assert better.startswith("hash+: learned permutations are better than random ones by 2.0000 ± 0.5000 (40 pairs)")
    assert better.endswith('63 % [43, 74] of what "+" gains is left if nothing is learned.')
    assert worse.startswith("topk+: learned permutations are worse")
    assert worse.endswith('"+" gains nothing that can be told from chance.')
    assert apart.startswith("comet+: learned and random permutations cannot be told apart (+0.5000 ± 0.5000")
    assert apart.endswith('"+" is behind the gate without it by 3.0000 ± 1.0000.')


def test_other_studies_and_studies_without_search_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not the same points"):
        unlearned_search.compare(by_hand({"seed": 0}), by_hand({"seed": 1}))
    with pytest.raises(ValueError, match="a gate with local search"):
        unlearned_search.run(TuningConfig(gates=("hash", "topk"), n_trials=1, changes=CHANGES), root=tmp_path)
