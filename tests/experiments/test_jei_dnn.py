"""The early-exit experiment end to end on a tiny configuration; the artefacts it shows; bad settings."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lab.exits import ExitGates, MultiExitNetwork
from moe_lab.exits.joint import JointExits
from moe_lab.exits.policies import confidence
from moe_lab.experiments import jei_backbone, jei_baselines, jei_dnn, jei_score
from moe_lab.experiments.jei_backbone import (
    Augment,
    augmentation,
    build_backbone,
    cached_features,
    finetune,
    load_images,
    normalised_costs,
    train_backbone,
)
from moe_lab.experiments.jei_baselines import METHODS
from moe_lab.experiments.jei_config import JeiConfig
from moe_lab.experiments.jei_dnn import run
from moe_lab.experiments.jei_score import gain
from moe_lab.experiments.record import main
from moe_lab.experiments.recordings import RECORDINGS
from moe_lab.metrics.conformal import STRATEGIES
from moe_lab.results import Result
from moe_lab.train import fit


def tiny(**changes) -> JeiConfig:
    small = {
        "data_options": {"n_train": 300, "n_valid": 240, "n_test": 200},
        "width": 16,
        "heads": 2,
        "layers": 3,
        "backbone_epochs": 2,
        "prices": (0.0, 1.0, 50.0),
        "warmup": 40,
        "phase_steps": 20,
        "final_gate_steps": 60,
        "steps": 200,
        "module_rate": 1.0,  # few steps
        "n_thresholds": 5,
        "rhos": (0.3, 1.0, 3.0),
        "alphas": (0.05, 0.2),
    }
    return JeiConfig.profile("quick", **{**small, **changes})


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tiny(dataset="planted-difficulty"), root=tmp_path_factory.mktemp("runs"), progress=False)


def test_every_method_has_points_on_the_whole_test_set(result):
    points = pd.DataFrame(result.curves["points"])
    assert set(points.method) == set(METHODS)
    costs = np.array(result.metrics["costs"])
    assert (np.diff(costs) > 0).all() and costs[-1] == 1
    for row in result.curves["points"]:
        assert sum(row["exits"]) == pytest.approx(1)
        assert row["cost"] == pytest.approx(float(np.dot(row["exits"], costs)))
        assert 0 <= row["accuracy"] <= 1 and 0 < row["set_size"] <= 10
    static = points[points.method == "static"].sort_values("setting")
    assert static.accuracy.tolist() == pytest.approx(result.metrics["exit_accuracy"])
    assert static.accuracy.iloc[-1] == pytest.approx(result.metrics["backbone_accuracy"])


def test_thresholds_are_as_many_as_asked_for_and_the_constant_rate_control_has_modules_of_its_own(result):
    points = pd.DataFrame(result.curves["points"])
    count = points.method.value_counts()
    assert count["shared"] == count["constant_shared"] == 5 and count["constant"] == count["geometric"] == 3
    constant, separate = (pd.DataFrame(result.curves[name]) for name in ("constant", "separate"))
    assert constant.step.max() == separate.step.max() == result.config["steps"]
    assert (constant.train_gates == 0).all() and (separate.train_gates > 0).any()
    assert constant.lr.nunique() == 1 and separate.lr.is_monotonic_decreasing
    assert constant.valid_now.iloc[-1] != separate.valid_now.iloc[-1]


def test_a_high_price_sends_everybody_to_the_first_exit_and_oracles_bound_the_rest(result):
    points = pd.DataFrame(result.curves["points"]).set_index(["method", "setting"])
    assert points.loc[("jei_dnn", 50.0), "exits"][0] > 0.98
    assert points.loc[("jei_dnn", 0.0), "cost"] > points.loc[("jei_dnn", 50.0), "cost"]
    best = points.loc[("oracle_earliest", 0.0), "accuracy"]
    honest = [row for row in result.curves["points"] if not row["method"].startswith("oracle")]
    others = ("jei_dnn", "boosted", "boosted_shared", "weighted", "weighted_shared")  # have modules of their own
    assert max(row["accuracy"] for row in honest if row["method"] not in others) <= best


def test_the_artefacts_of_the_published_comparison_show(result):
    points = pd.DataFrame(result.curves["points"])
    assert (points.ece_per_batch > points.ece).mean() > 0.8


def test_curves_say_more_of_the_learned_points_and_of_thresholds_as_dear(result):
    points = pd.DataFrame(result.curves["points"]).set_index(["method", "setting"])
    by_exit = pd.DataFrame(result.curves["by_exit"])
    assert {"jei_dnn", "geometric", "shared"} == set(by_exit.method)
    for (method, setting), rows in by_exit.groupby(["method", "setting"]):
        assert rows.share.sum() == pytest.approx(1)
        assert (rows.share * rows.accuracy).sum() == pytest.approx(points.loc[(method, setting), "accuracy"])
    sets = pd.DataFrame(result.curves["conformal"])
    assert set(sets.strategy) == set(STRATEGIES)
    usual = sets[(sets.strategy == "gated") & (sets.alpha == 0.05)].set_index(["method", "setting"])
    assert usual.set_size.to_dict() == pytest.approx(points.loc[usual.index, "set_size"].to_dict())
    for _, rows in sets.groupby(["method", "setting", "strategy"]):
        assert (rows.sort_values("alpha").set_size.diff().dropna() <= 0).all()  # nested
    for _, rows in pd.DataFrame(result.curves["reliability"]).groupby(["method", "setting"]):
        assert rows.share.sum() == pytest.approx(1)


def test_every_price_has_the_weights_of_its_own_best_evaluation(result):
    assert len(result.metrics["best_steps"]) == 3 and set(result.metrics["best_steps"]) <= {100, 200}
    best = [row["valid_loss"] for row in result.curves["joint"]]
    assert best == sorted(best, reverse=True)


def test_a_run_stopped_in_each_of_its_trainings_ends_like_one_that_was_not(tmp_path, monkeypatch):
    config = tiny(finetune_epochs=2, augment=True, warmup_patience=1, gate_inputs="margin")
    whole = run(config, root=tmp_path / "whole", progress=False)
    for index, curve in enumerate(("backbone", "finetune", "joint", "separate", "boosted", "weighted")):

        def stopped(model, train, loss, *, curve_to_stop=curve, **options):
            calls = []

            def failing(model, batch):
                calls.append(1)
                if options["curve"] == curve_to_stop and len(calls) > 6:
                    raise RuntimeError("power cut")
                return loss(model, batch)

            return fit(model, train, failing, **options)

        root = tmp_path / str(index)
        with monkeypatch.context() as patch:
            patch.setattr(jei_dnn, "fit", stopped)
            patch.setattr(jei_backbone, "fit", stopped)
            with pytest.raises(RuntimeError, match="power cut"):
                run(config, root=root, progress=False)
        resumed = run(config, root=root, progress=False)
        assert {k: v for k, v in resumed.metrics.items() if k != "seconds"} == {
            k: v for k, v in whole.metrics.items() if k != "seconds"
        }
        assert resumed.curves["points"] == whole.curves["points"]


def test_cached_features_are_what_a_network_with_exits_computes():
    torch.manual_seed(0)
    config = tiny()
    data = load_images(config)
    backbone = build_backbone(config, data).eval()
    cached = cached_features(backbone, data.test, torch.device("cpu"))
    heads = [torch.nn.Sequential(backbone.pool, torch.nn.Linear(16, 10)) for _ in range(2)]
    costs, _ = normalised_costs(backbone, data)
    blocks = list(backbone.blocks)
    last = torch.nn.Sequential(backbone.pool, backbone.head)
    network = MultiExitNetwork(blocks, [*heads, last], ExitGates(2), stem=backbone.stem, costs=costs)
    logits, _ = network.eval()(data.test["image"])
    torch.testing.assert_close(heads[1][1](cached["features"][:, 1]), logits[:, 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cached["last"], logits[:, 2], atol=1e-5, rtol=1e-4)
    early, masked = network.predict(data.test["image"]), network.predict_masked(data.test["image"])
    assert (early.exits != masked.exits).sum() <= 1  # near-ties may fall either way


def test_each_part_of_the_validation_images_serves_one_purpose(tmp_path, monkeypatch):
    config = tiny(prices=(0.1,), rhos=(1.0,), alphas=(0.1,))
    seen: dict[str, list] = {"trained": [], "thresholds": [], "calibration": [], "temperature": []}

    def spy(module, name, purpose, pick):
        original = getattr(module, name)

        def spied(*arguments, **options):
            seen[purpose].append(pick(*arguments))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, spied)

    monkeypatch.setattr(jei_baselines, "CONFIDENCES", ("probability",))
    spy(jei_dnn, "baselines", "trained", lambda config, costs, trained: trained)
    spy(jei_baselines, "geometric_thresholds", "thresholds", lambda sure, rho: sure)
    spy(jei_score, "exit_quantiles", "calibration", lambda p, labels, exits, alpha: labels)
    spy(jei_dnn, "exit_temperatures", "temperature", lambda logits, labels: labels)
    run(config, root=tmp_path, progress=False)
    valid = load_images(config).valid
    labels = {name: valid["label"][valid["part"] == index] for name, index in jei_dnn.PARTS.items()}
    trained = seen.pop("trained")[0]
    known = [confidence(parts["thresholds"][0]) for parts in trained.values()]
    assert all(torch.equal(parts["thresholds"][1], labels["thresholds"]) for parts in trained.values())
    assert seen["thresholds"] and all(any(torch.equal(sure, own) for own in known) for sure in seen["thresholds"])
    for purpose in ("calibration", "temperature"):
        assert seen[purpose] and all(torch.equal(found, labels["calibration"]) for found in seen[purpose])


def test_models_are_chosen_by_loss_and_cost_and_weights_come_from_the_first_part(tmp_path, monkeypatch):
    kept, weighed = [], []
    keep_best, weights_from = JointExits.keep_best, JointExits.weights_from
    monkeypatch.setattr(
        JointExits, "keep_best", lambda self, values, **o: kept.append(values) or keep_best(self, values, **o)
    )
    monkeypatch.setattr(
        JointExits, "weights_from", lambda self, *known: weighed.append(known[2]) or weights_from(self, *known)
    )
    config = tiny(prices=(0.0, 1000.0), rhos=(1.0,), alphas=(0.1,))
    run(config, root=tmp_path, progress=False)
    of_prices = [values for values in kept if len(values) == 2]  # the other training has one run
    assert of_prices and all(values[1] > 1000 * 0.3 > values[0] for values in of_prices)  # the first exit costs over .3
    valid = load_images(config).valid
    assert weighed and all(torch.equal(labels, valid["label"][valid["part"] == 0]) for labels in weighed)


@pytest.mark.parametrize("body", ["cnn", "t2t_7"])
def test_other_bodies_run_end_to_end(body, tmp_path):
    few = {"n_train": 60, "n_valid": 60, "n_test": 40}
    result = run(tiny(body=body, data_options=few, backbone_epochs=1), root=tmp_path, progress=False)
    assert result.metrics["n_exits"] == {"cnn": 6, "t2t_7": 7}[body]
    assert np.all(np.diff(result.metrics["costs"]) > 0)


def test_images_may_be_enlarged_on_the_way_in():
    torch.manual_seed(0)
    data = load_images(tiny())
    small, large = (build_backbone(tiny(resize=side), data) for side in (None, 32))
    assert small(data.test["image"][:2]).shape == large(data.test["image"][:2]).shape == (2, 10)
    assert normalised_costs(large, data)[1] > 3 * normalised_costs(small, data)[1]  # four times as many tokens


def test_augmented_copies_follow_the_images_as_they_are(tmp_path):
    config = tiny(augment=True, feature_copies=3, backbone_epochs=1)
    data, cpu = load_images(config), torch.device("cpu")
    body = train_backbone(config, data, Result.open("jei_dnn", config, root=tmp_path), cpu, False)
    augment = augmentation(config, data, cpu)
    plain = cached_features(body, data.train, cpu)
    copies = cached_features(body, data.train, cpu, augment=augment, copies=3)
    n = len(plain["label"])
    assert len(copies["label"]) == 3 * n and torch.equal(copies["features"][:n], plain["features"])
    assert torch.equal(copies["label"].reshape(3, n), plain["label"].expand(3, n))
    assert (copies["features"][n : 2 * n] - plain["features"]).abs().max() > 0.1
    assert not torch.equal(copies["features"][n : 2 * n], copies["features"][2 * n :])


def test_runs_that_differ_in_their_exits_share_a_backbone(tmp_path, monkeypatch):
    trained = []
    real = jei_backbone.train_backbone
    monkeypatch.setattr(jei_backbone, "train_backbone", lambda *a, **o: trained.append(1) or real(*a, **o))
    first = run(tiny(mode="expected"), root=tmp_path, progress=False)
    second = run(tiny(mode="single"), root=tmp_path, progress=False)
    assert len(trained) == 1
    assert first.curves["backbone"] == second.curves["backbone"]
    assert first.metrics["backbone_accuracy"] == second.metrics["backbone_accuracy"]
    (weights,) = (tmp_path / jei_backbone.BACKBONE).glob("*.pt")
    weights.unlink()  # recorded Results come without
    again = run(tiny(mode="single"), root=tmp_path, recompute=True, progress=False)
    assert len(trained) == 2 and weights.is_file()
    assert again.curves["points"] == second.curves["points"]
    run(tiny(mode="single", seed=1), root=tmp_path, progress=False)
    assert len(trained) == 3


def test_recording_trains_a_backbone_once_before_the_runs_and_not_for_finished_ones(tmp_path, monkeypatch):
    configs = [tiny(mode=mode, seed=seed) for seed in (0, 1) for mode in ("expected", "single")]
    monkeypatch.setitem(RECORDINGS, "exits", dataclasses.replace(RECORDINGS["exits"], configs=lambda _: configs))
    trained = []
    real = jei_backbone.train_backbone
    monkeypatch.setattr(jei_backbone, "train_backbone", lambda *a, **o: trained.append(1) or real(*a, **o))
    where = ["--what", "exits", "--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")]
    main([*where, "--shared-only"])
    assert len(trained) == 2 and not (tmp_path / "out").exists()
    main(where)
    assert len(trained) == 2 and len(list((tmp_path / "out" / "jei_dnn").glob("*.json"))) == 4
    for weights in (tmp_path / "scratch").rglob("*.pt"):
        weights.unlink()
    main(where)
    assert len(trained) == 2


def test_nothing_is_augmented_in_evaluation():
    x = torch.randn(4, 1, 16, 16)
    augment = Augment(0, True, torch.device("cpu"))
    assert torch.equal(augment.eval()(x), x) and not torch.equal(augment.train()(x), x)


def test_fine_tuning_trains_the_body_for_all_exits(tmp_path):
    bodies, result, cpu = [], None, torch.device("cpu")
    for epochs in (0, 3):
        config = tiny(finetune_epochs=epochs)
        torch.manual_seed(0)
        result = Result.open("jei_dnn", config, root=tmp_path)
        data = load_images(config)
        body = train_backbone(config, data, result, cpu, False)
        bodies.append(finetune(config, data, body, result, False) if epochs else body)
    frozen, tuned = (body.blocks[0].feed_forward.layers[0].weight for body in bodies)
    assert not torch.equal(frozen, tuned) and not tuned.requires_grad
    losses = [row["train_loss"] for row in result.curves["finetune"]]
    assert losses[-1] < losses[0] and len(losses) == 3


def test_gain_is_the_mean_distance_to_the_interpolated_baseline():
    points = pd.DataFrame(
        [
            {"method": "geometric", "cost": 0.2, "accuracy": 0.4},
            {"method": "geometric", "cost": 0.6, "accuracy": 0.8},
            {"method": "jei_dnn", "cost": 0.4, "accuracy": 0.7},
            {"method": "jei_dnn", "cost": 0.5, "accuracy": 0.7},
            {"method": "jei_dnn", "cost": 0.9, "accuracy": 0.0},  # outside: no baseline there
        ]
    )
    assert gain(points, "geometric") == pytest.approx(((0.7 - 0.6) + (0.7 - 0.7)) / 2)
    assert gain(points[~points.cost.isin([0.4, 0.5])], "geometric") is None
    assert gain(points, "geometric", between=(0.45, 1.0)) == pytest.approx(0)
    assert gain(points, "nobody") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "release"}, "did you mean 'released'"),
        ({"balance": "per layer"}, "did you mean 'per_layer'"),
        ({"prices": ()}, "at least one"),
        ({"prices": (-1.0,)}, "not negative"),
        ({"layers": 1}, "one exit is no choice"),
        ({"steps": 50}, "leave no gate phase"),
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"patch": 5}, "do not tile"),
        ({"body": "t2t"}, "did you mean 't2t_7'"),
        ({"gate_inputs": "marginal"}, "did you mean 'margin'"),
        ({"warmup_loss": "means"}, "did you mean 'mean'"),
        ({"n_thresholds": 0}, "at least 1"),
        ({"weighted": "cifar10"}, "did you mean 'cifar'"),
        ({"feature_copies": 2}, "set augment=True"),
        ({"pretrained": "weights.pth"}, "those of a T2T body"),
        ({"finetune_epochs": -1}, "must not be negative"),
        ({"warmup_patience": 0}, "at least 1 evaluation"),
        ({"dataset": "planted-pairs", "data_options": {}}, "kind 'images'"),
    ],
)
def test_bad_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny(**changes), root=tmp_path, progress=False)
