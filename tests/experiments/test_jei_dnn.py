"""The early-exit experiment end to end on a tiny configuration; the artefacts it shows; bad settings."""

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lab.exits import ExitGates, MultiExitNetwork
from moe_lab.experiments import jei_dnn
from moe_lab.experiments.jei_config import JeiConfig
from moe_lab.experiments.jei_dnn import (
    METHODS,
    build_backbone,
    cached_features,
    gain,
    load_images,
    normalised_costs,
    run,
)
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


def test_a_high_price_sends_everybody_to_the_first_exit_and_oracles_bound_the_rest(result):
    points = pd.DataFrame(result.curves["points"]).set_index(["method", "setting"])
    assert points.loc[("jei_dnn", 50.0), "exits"][0] > 0.98
    assert points.loc[("jei_dnn", 0.0), "cost"] > points.loc[("jei_dnn", 50.0), "cost"]
    best = points.loc[("oracle_earliest", 0.0), "accuracy"]
    honest = [row for row in result.curves["points"] if not row["method"].startswith("oracle")]
    separate = [row["accuracy"] for row in honest if row["method"] != "jei_dnn"]
    assert max(separate) <= best


def test_the_artefacts_of_the_published_comparison_show(result):
    points = pd.DataFrame(result.curves["points"])
    assert (points.ece_per_batch > points.ece).mean() > 0.8


def test_a_run_stopped_in_each_of_its_three_trainings_ends_like_one_that_was_not(tmp_path, monkeypatch):
    config = tiny()
    whole = run(config, root=tmp_path / "whole", progress=False)
    for index, curve in enumerate(("backbone", "joint", "separate")):

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
        ({"dataset": "planted-pairs", "data_options": {}}, "kind 'images'"),
    ],
)
def test_bad_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny(**changes), root=tmp_path, progress=False)
