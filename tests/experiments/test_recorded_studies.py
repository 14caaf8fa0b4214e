"""Studies of a CPU and of a GPU are told apart and shown beside each other; all here are written by hand."""

from __future__ import annotations

import dataclasses

import pytest

from moe_lab.experiments import comet_summary, comet_tuning, unlearned_search, vision_tuning
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.experiments.recorded_studies import (
    best_accuracy,
    control_of,
    cpu_study,
    gpu_study,
    machine,
    on_gpu,
    side_by_side,
    vision_study,
)
from moe_lab.experiments.vision_tuning import VisionTuningConfig
from moe_lab.results import Result

GATES = ("hash", "hash+", "topk", "topk+")


def study(root, experiment, config, *, better=0.0, beside=1, **more):
    """Trial i of the g-th gate has validation loss 1 - i / 100 and test loss 2 + g - i / 100, less ``better``."""
    result = Result.open(experiment, config, root=root)
    for place, gate in enumerate(config.gates):
        for index in range(config.n_trials):
            losses = {"valid_loss": 1 - index / 100, "test_loss": 2 + place - index / 100 - better}
            extra = {name: values(index) for name, values in more.items()}
            drawn = {"learning_rate": 1e-3}
            result.log("trials", gate=gate, trial=index, drawn=drawn, **losses, **extra, seconds=1.0)
    result.environment = {"device": "a chip", "torch": "2.11.0+cu130", "commit": "c"}
    if beside > 1:
        result.environment["trials_side_by_side"] = beside
    return result.finish({"trials": 1})


def tuning(n_trials, **changes):
    return TuningConfig.profile("standard", gates=GATES, n_trials=n_trials, changes={"epochs": 8, **changes})


def test_the_longest_study_of_either_machine_is_found(tmp_path):
    assert cpu_study(root=tmp_path) is gpu_study(root=tmp_path) is vision_study(root=tmp_path) is None
    assert cpu_study(root=tmp_path / "no such folder") is None
    study(tmp_path, comet_tuning.EXPERIMENT, TuningConfig(n_trials=60))  # planted data
    for n, changes in ((3, {}), (4, {}), (5, {"device": "cuda"}), (9, {"device": "cuda:0"})):
        study(tmp_path, comet_tuning.EXPERIMENT, tuning(n, **changes))
    for n in (2, 6):
        study(tmp_path, vision_tuning.EXPERIMENT, VisionTuningConfig.profile("standard", gates=GATES, n_trials=n))
    small, large = cpu_study(root=tmp_path), gpu_study(root=tmp_path)
    assert (small.config["n_trials"], large.config["n_trials"]) == (4, 9)
    assert (on_gpu(small), on_gpu(large)) == (False, True)
    assert cpu_study("quick", root=tmp_path).config["n_trials"] == 60
    assert gpu_study("quick", root=tmp_path) is None
    assert vision_study(root=tmp_path).config["n_trials"] == 6
    assert control_of(small, root=tmp_path) is None
    assert control_of(None, root=tmp_path) is None
    study(tmp_path, unlearned_search.EXPERIMENT, tuning(9, device="cuda:0"))
    assert control_of(large, root=tmp_path).config == large.config


def test_both_stand_in_one_table_by_gate(tmp_path):
    small = study(tmp_path, comet_tuning.EXPERIMENT, tuning(4))
    config = dataclasses.replace(tuning(40, device="cuda"), gates=("topk", "comet"))
    large = study(tmp_path, comet_tuning.EXPERIMENT, config, better=0.5, beside=40)
    large.curves["trials"][0] |= {"valid_loss": float("nan"), "test_loss": float("nan")}
    table = side_by_side({"CPU": small, "GPU": large}, "ml-100k")
    assert list(table.index) == [*GATES, "comet"]
    assert table.loc["hash", "CPU: trials"] == "4"
    assert table.loc["hash+", "CPU: best 5 %"] == "2.9700"  # one trial: no error
    assert table.loc["hash", "GPU: best 5 %"] == table.loc["comet", "CPU: trials"] == ""
    assert table.loc["topk", "GPU: trials"] == "40 (1 diverged)"
    assert table.loc["comet", "GPU: best 5 %"] == "2.1150 ± 0.0050"  # 2.5 - 0.39, 2.5 - 0.38 at the second place
    assert table.loc["comet", "GPU: after 1 trial"] == "2.3050"
    assert table.loc["comet", "search space"] == "30 x a range"
    assert machine(large) == "a chip, PyTorch 2.11.0, 40 trials side by side"
    assert machine(small) == "a chip, PyTorch 2.11.0"


def test_of_images_the_accuracy_is_that_of_the_trials_that_validate_best(tmp_path):
    config = VisionTuningConfig.profile("standard", gates=("hash",), n_trials=5)
    found = study(
        tmp_path, vision_tuning.EXPERIMENT, config, test_accuracy=lambda index: 0.9 + index * (5 - index) / 100
    )
    table = side_by_side({"GPU": found}, "multimnist")
    assert list(table.columns) == ["search space", "trials", "best 5 %", "after 1 trial", "accuracy, best 5 %"]
    assert table.loc["hash", "accuracy, best 5 %"] == "0.9400"  # of trial 4; trials 2 and 3 have more
    config = VisionTuningConfig.profile("standard", gates=("hash",), n_trials=40)
    found = study(tmp_path, vision_tuning.EXPERIMENT, config, test_accuracy=lambda index: 0.5 + index / 100)
    found.curves["trials"][39] |= dict.fromkeys(("valid_loss", "test_loss", "test_accuracy"), float("nan"))  # diverged
    top = best_accuracy(found)["hash"]
    assert (top.n, top.mean) == (2, pytest.approx(0.875))  # trials 37 and 38
    assert top.standard_error == pytest.approx(0.005)
    assert best_accuracy(study(tmp_path, comet_tuning.EXPERIMENT, tuning(4))) == {}


def test_the_readmes_tables_show_both_machines_as_soon_as_both_are_there(tmp_path, monkeypatch):
    without = comet_summary._study_tables()
    large = study(tmp_path, comet_tuning.EXPERIMENT, tuning(40, device="cuda"), beside=40)
    config = VisionTuningConfig.profile("standard", gates=GATES, n_trials=5)
    images = study(tmp_path, vision_tuning.EXPERIMENT, config)
    monkeypatch.setattr(comet_summary, "gpu_study", lambda: large)
    monkeypatch.setattr(comet_summary, "vision_study", lambda: images)
    text = "\n".join(comet_summary._study_tables())
    assert "GPU: a chip, PyTorch 2.11.0, 40 trials side by side" in text
    assert "CPU: best 5 %" in text and "GPU: best 5 %" in text
    assert "Random search on MultiMNIST" in text and "5 epochs each" in text
    assert without[without.index("CPU:") + 1] in text  # its control
    assert "\nCPU:\n" in text and "\nGPU:\n" not in text  # whose control it is
    claims = comet_summary.comet_summary()[0]
    assert "multimnist, a chip, 5 trials per gate" in claims
    assert "ml-100k, 40 trials per gate" in claims and "ml-100k, a chip, 40 trials per gate" in claims


def test_the_readmes_tables_have_the_gpus_control_beside_that_of_the_cpu(tmp_path, monkeypatch):
    config = tuning(9, device="cuda")
    large = study(tmp_path, comet_tuning.EXPERIMENT, config)
    control = study(tmp_path, unlearned_search.EXPERIMENT, dataclasses.replace(config, gates=("hash+", "topk+")))
    control.config = large.config
    real = comet_summary.control_of
    monkeypatch.setattr(comet_summary, "gpu_study", lambda: large)
    monkeypatch.setattr(comet_summary, "control_of", lambda study: control if study is large else real(study))
    parts = comet_summary._study_tables()
    gpu = parts.index("GPU:")
    assert parts[gpu - 2] == "CPU:" and parts[gpu + 1].count("| 9 |") == 2


@pytest.mark.parametrize("missing", ["tuning_study", "unlearned_control"])
def test_what_the_readme_rests_on_is_recorded(missing):
    assert getattr(comet_summary, missing)().finished
