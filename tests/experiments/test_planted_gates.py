"""Gates on planted data: the run says what happened, and repeats."""

import numpy as np
import pytest
import torch

from moe_lab.datasets.planted_tiles import planted_tiles, tile
from moe_lab.experiments.planted_gates import PlantedGateConfig, load_data, run
from moe_lab.experiments.split_rate import trajectory
from moe_lab.gates import CometGate
from moe_lab.metrics.agreement import agreement, purity

SHORT = {"epochs": 2, "batch_size": 512}


def test_tiles_are_counted_column_by_column_from_below():
    assert tile(np.array([[-0.9, -0.5], [-0.9, 0.5], [-0.1, -0.5], [0.99, 0.5], [1.0, 1.0]])).tolist() == [
        0,
        1,
        2,
        7,
        7,
    ]


def test_every_tile_is_affine_up_to_the_noise():
    data = planted_tiles(3, noise=0.0)
    x, e = data.train["features"], data.train["expert"]
    answer = (x * data.info["expert_weight"][e]).sum(1) + data.info["expert_bias"][e]
    torch.testing.assert_close(answer, data.train["target"])


def test_purity_and_nmi_ignore_names_and_notice_mixing():
    planted = np.array([0, 0, 1, 1])
    assert agreement(planted, np.array([5, 5, 2, 2])) == {"purity": 1.0, "nmi": pytest.approx(1.0)}
    assert purity(planted, np.array([0, 1, 0, 1])) == 0.5
    assert purity(planted, np.array([0, 0, 0, 1])) == 0.75  # by hand: expert 0 has 2 of its 3, expert 1 its 1


@pytest.mark.parametrize("gate", ["softmax", "topk", "hash", "dselect_k", "comet"])
@pytest.mark.parametrize("dataset", ["planted-tiles", "planted-clusters"])
def test_every_gate_trains_on_both_data_sets(gate, dataset, tmp_path):
    result = run(PlantedGateConfig(gate=gate, dataset=dataset, **SHORT), root=tmp_path)
    curve = result.curves["epochs"]
    assert [row["step"] for row in curve] == [0, 4, 8]
    assert curve[-1]["valid_loss"] < curve[0]["valid_loss"]
    expected = {"softmax": 8, "topk": 2, "hash": 1}.get(gate)
    if expected:
        assert result.metrics["experts_per_token"] == expected


def test_the_same_config_gives_the_same_numbers_and_snapshots_that_rebuild_the_gate(tmp_path):
    config = PlantedGateConfig(keep_gates=True, **SHORT)
    first, second = (run(config, root=tmp_path / name) for name in "ab")
    assert first.metrics == second.metrics and first.curves == second.curves
    gate = CometGate(2, 8, 2, 1.0).eval()
    snapshot = first.curves["gates"][-1]
    gate.load_state_dict({name: torch.tensor(value) for name, value in snapshot["gate"].items()})
    valid = load_data(config).valid["features"]
    assert gate(valid).experts_per_token.float().mean() == pytest.approx(snapshot["experts_per_token"])


def test_inputs_all_positive_and_a_small_gamma_leave_one_expert(tmp_path):
    result = run(PlantedGateConfig(gamma=0.01, shift=2.0, **SHORT), root=tmp_path)
    assert result.metrics["used"] == 1 and result.curves["epochs"][1]["saturation"] == 1


def test_confusion_counts_every_token_once_per_evaluation_and_noise_changes_training_only(tmp_path):
    plain, noisy = (run(PlantedGateConfig(gate="topk", noise=noise, **SHORT), root=tmp_path) for noise in (False, True))
    tables = [np.array(row["table"]) for row in plain.curves["confusion"]]
    assert [table.sum() for table in tables] == [1024] * 3 and tables[0].shape == (8, 8)
    rows = tables[-1].max(0).sum() / 1024
    assert rows == pytest.approx(plain.curves["epochs"][-1]["purity"])
    assert np.array(plain.metrics["confusion"]).sum() == 1024
    assert noisy.curves["confusion"][0] == plain.curves["confusion"][0]  # before training: evaluation has no noise
    assert noisy.metrics["test_mse"] != plain.metrics["test_mse"]


def test_split_balance_is_returned_and_weighted(tmp_path):
    plain, balanced = (
        run(PlantedGateConfig(shift=2.0, coefficients=c, epochs=4), root=tmp_path).metrics
        for c in ({}, {"split_balance": 1.0})
    )
    assert balanced["used"] > plain["used"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"gate": "commet"}, "comet"), ({"gate": "comet+"}, "local search"), ({"dataset": "tiles"}, "planted-tiles")],
)
def test_mistakes_are_explained(changes, says):
    with pytest.raises(ValueError, match=says):
        PlantedGateConfig(**changes)


def test_profiles_are_longer_each_and_unknown_ones_are_refused():
    quick, standard, paper = (PlantedGateConfig.profile(name) for name in ("quick", "standard", "paper"))
    assert quick.epochs < standard.epochs < paper.epochs
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        PlantedGateConfig.profile("quik")


@pytest.mark.parametrize(("optimizer", "power", "rate"), [("adam", 1, 0.02), ("sgd", 2, 0.5)])
def test_gamma_is_a_learning_rate_of_the_splits(optimizer, power, rate):
    at_one = trajectory(1.0, rate, optimizer=optimizer, leaf_rate=rate)
    scaled = trajectory(5.0, rate * 5.0**power, optimizer=optimizer, leaf_rate=rate)
    unscaled = trajectory(5.0, rate, optimizer=optimizer, leaf_rate=rate)
    torch.testing.assert_close(scaled, at_one, atol=1e-10, rtol=0)
    assert (unscaled - at_one).abs().max() > 0.01
