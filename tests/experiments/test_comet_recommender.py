"""The two-task recommender end to end on tiny planted data, the recording of runs, and studies of trials."""

import dataclasses
import math

import pytest
import torch

from moe_lab.batches import Batches
from moe_lab.experiments import comet_recommender, comet_tuning, record
from moe_lab.experiments.comet_recommender import build_model, load_data, predict, run, task_metrics
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.results import find_results

SMALL = {"n_users": 40, "n_items": 30, "items_per_user": 8}
TINY = RecommenderConfig.profile(
    "quick", data_options=SMALL, n_experts=4, embedding=4, hidden=8, head=8, batch_size=64, epochs=3
)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


GATES = ("softmax", "hash", "hash_balanced+", "topk", "topk+", "dselect_k+", "comet", "comet+")
NUMBERS = ("test_loss", "test_auc", "test_mse", "experts_per_example", "popularity_auc", "constant_loss", "bias_mse")


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_runs_and_reports_what_tables_need(gate, tmp_path):
    result = run(tiny(gate=gate), root=tmp_path, progress=False)
    metrics = result.metrics
    assert result.finished
    for name in NUMBERS:
        assert math.isfinite(metrics[name]), name
    assert metrics["test_loss"] == pytest.approx(0.9 * metrics["test_bce"] + 0.1 * metrics["test_mse"])
    most = {"softmax": 4, "hash": 1, "hash_balanced": 1, "topk": 2}.get(gate.removesuffix("+"))
    if most:
        assert metrics["experts_per_example"] == most
    for task in ("watch", "rating"):
        assert sum(metrics["routing"][task]["load"]) == pytest.approx(1)
        assert metrics["routing"][task]["mass_error"] < 1e-5
    assert [row["epoch"] for row in result.curves["epochs"]] == [1, 2, 3]
    assert [row["epoch"] for row in result.curves["routing"][::2]] == [0, 1, 2, 3]  # 0: before training
    assert ("permutation" in result.curves) == gate.endswith("+")


def test_a_finished_run_is_found_again_and_not_trained(tmp_path, monkeypatch):
    first = run(tiny(), root=tmp_path, progress=False)
    monkeypatch.setattr(comet_recommender, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run(tiny(), root=tmp_path, progress=False).metrics == first.metrics


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    config = tiny(gate="comet+")
    whole = run(config, root=tmp_path / "whole", progress=False)
    original, calls = comet_recommender.predict, []

    def stop_in_second_epoch(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(comet_recommender, "predict", stop_in_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(config, root=tmp_path / "parts", progress=False)
    monkeypatch.setattr(comet_recommender, "predict", original)
    resumed = run(config, root=tmp_path / "parts", progress=False)
    timing = {"steps_per_second"}
    assert {k: v for k, v in resumed.metrics.items() if k not in timing} == {
        k: v for k, v in whole.metrics.items() if k not in timing
    }
    assert resumed.curves["routing"] == whole.curves["routing"]
    assert resumed.curves["permutation"] == whole.curves["permutation"]


def test_only_gates_differ_between_runs_of_one_seed():
    models = [build_model(tiny(gate=gate), 40, 30, 5) for gate in ("softmax", "comet", "hash")]
    shared = [{name: value for name, value in model.state_dict().items() if ".gates." not in name} for model in models]
    for other in shared[1:]:
        assert shared[0].keys() == other.keys()
        assert all(torch.equal(shared[0][name], other[name]) for name in shared[0])


def test_training_does_not_look_at_test_rows(tmp_path, monkeypatch):
    """Scrambling the test rows changes test metrics and nothing else."""
    before = run(tiny(), root=tmp_path / "a", progress=False)
    data = load_data(tiny())
    flipped = dataclasses.replace(data, test={**data.test, "watched": 1 - data.test["watched"]})
    monkeypatch.setattr(comet_recommender, "load_data", lambda config: flipped)
    after = run(tiny(), root=tmp_path / "b", progress=False)
    for name in ("valid_loss", "best_epoch", "test_mse"):
        assert after.metrics[name] == before.metrics[name]
    assert after.metrics["test_auc"] == pytest.approx(1 - before.metrics["test_auc"])


def test_the_restored_model_is_the_best_epochs(tmp_path):
    result = run(tiny(epochs=6, learning_rate=0.05), root=tmp_path, progress=False)
    rows = result.curves["epochs"]
    assert result.metrics["valid_loss"] == min(row["valid_loss"] for row in rows)
    assert rows[result.metrics["best_epoch"] - 1]["valid_loss"] == result.metrics["valid_loss"]


def test_predictions_do_not_depend_on_the_evaluation_batch():
    config = tiny()
    data = load_data(config)
    model = build_model(config, 40, 30, 5).eval()
    rows = {"user": data.valid["user"], "item": data.valid["item"]}
    (a, b, routing), (c, d, same) = (predict(model, Batches(rows, size).epoch(0), 2) for size in (7, 1000))
    assert torch.allclose(a, c, atol=1e-6)
    assert torch.allclose(b, d, atol=1e-6)
    assert routing["watch"]["histogram"] == same["watch"]["histogram"]
    assert task_metrics(config, a, b, data.valid)["auc"] == pytest.approx(task_metrics(config, c, d, data.valid)["auc"])


def test_coefficients_follow_the_gate():
    assert tiny(gate="comet", entropy_weight=0.5).coefficients() == {"watch": 0.9, "rating": 1 - 0.9, "entropy": 0.5}
    assert "code_mass" in tiny(gate="dselect_k", n_experts=5).coefficients()
    assert "code_mass" not in tiny(gate="dselect_k", n_experts=8).coefficients()
    assert tiny(gate="hash+").coefficients()["permutation"] == 1e-4


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"gate": "commet"}, "comet"),
        ({"watch_weight": 1.5}, "share"),
        ({"learning_rate": 0.0}, "positive"),
        ({"gate": "topk+", "permutation_epochs": 0.0}, "'topk'"),
        ({"epochs": 0}, "at least 1"),
        ({"entropy_weight": -1.0}, "negative"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(changes, hint):
    with pytest.raises(ValueError, match=hint):
        tiny(**changes)


def test_misspelt_profiles_and_fields_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        RecommenderConfig.profile("quik")
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        RecommenderConfig.profile("quick", learnin_rate=1.0)


def test_the_paper_profile_has_the_papers_number_of_parameters():
    config = RecommenderConfig.profile("paper", gate="comet")
    model = build_model(config, 6040, 3952, 3076)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_495_614


def _study(**changes):
    fixed = {name: getattr(TINY, name) for name in ("data_options", "n_experts", "embedding", "hidden", "head")}
    return TuningConfig(gates=("hash", "topk"), n_trials=3, changes={**fixed, "epochs": 1}, **changes)


def test_a_study_goes_on_after_an_interruption_without_repeating_trials(tmp_path, monkeypatch):
    original, done = comet_tuning._one_trial, []

    def stop_at_fourth(job):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job[0].gate)
        return original(job)

    monkeypatch.setattr(comet_tuning, "_one_trial", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        comet_tuning.run(_study(), root=tmp_path, progress=False)
    assert done == ["hash", "topk", "hash"]  # gates advance together
    monkeypatch.setattr(comet_tuning, "_one_trial", lambda job: done.append(job[0].gate) or original(job))
    result = comet_tuning.run(_study(), root=tmp_path, progress=False)
    assert len(done) == 6
    assert [(row["gate"], row["trial"]) for row in result.curves["trials"]] == [
        (gate, trial) for gate in ("hash", "topk") for trial in range(3)
    ]
    pools = comet_tuning.pools(result)
    assert pools["topk"].test.tolist() == [row["test_loss"] for row in result.curves["trials"][3:]]


def test_a_planned_study_needs_no_sampler(tmp_path, monkeypatch):
    comet_tuning.plan(_study(), root=tmp_path)
    monkeypatch.setattr(comet_tuning, "draw_trials", lambda *a, **k: pytest.fail("drawn again"))
    result = comet_tuning.run(_study(), root=tmp_path, progress=False)
    assert all(row["drawn"]["learning_rate"] > 0 for row in result.curves["trials"])


def test_a_diverged_trial_is_kept_as_nan_and_the_study_goes_on(tmp_path):
    config = _study()
    planned = comet_tuning.plan(config, root=tmp_path)
    planned.curves["plan"][0]["drawn"]["learning_rate"] = 1e30
    planned.save()
    result = comet_tuning.run(config, root=tmp_path, progress=False)
    assert math.isnan(result.curves["trials"][0]["test_loss"])
    assert math.isfinite(result.curves["trials"][1]["test_loss"])


def test_recorded_copies_are_thin_finished_and_equal_in_their_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RecommenderConfig, "profile", classmethod(lambda cls, name, **changes: tiny(**changes)))
    folders = ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "runs")]
    record.main(["--what", "recommender", "--gates", "hash", "--seeds", "0", "1", "--commit", "abc", *folders])
    main_runs = {"watch_weight": 0.9, "n_experts": 4}
    copies = find_results("comet_recommender", root=tmp_path / "out", **main_runs)
    originals = find_results("comet_recommender", root=tmp_path / "runs", **main_runs)
    assert [copy.seed for copy in copies] == [0, 1]
    assert copies[0].metrics == originals[0].metrics
    assert "histogram" not in copies[0].curves["routing"][0]
    assert "0.9" in capsys.readouterr().out


def test_thinning_keeps_first_and_last_epoch(tmp_path):
    result = run(tiny(gate="hash", epochs=7), root=tmp_path / "runs", progress=False)
    copy = record.thinned(result, tmp_path / "out", most_rows=3)
    assert [row["epoch"] for row in copy.curves["epochs"]] == [1, 3, 6, 7]
    assert [row["epoch"] for row in copy.curves["routing"]] == [0, 0, 1, 1, 3, 3, 6, 6, 7, 7]
