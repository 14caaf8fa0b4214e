"""The vision experiment, end to end on a tiny configuration, and what it measures."""

import dataclasses
import json

import pytest
import torch
from same_run import without_time

from moe_lab.datasets import Dataset
from moe_lab.experiments import comet_vision, vision_data
from moe_lab.experiments.comet_vision import build_model, run
from moe_lab.experiments.vision_config import BASELINES, VisionConfig
from moe_lab.experiments.vision_data import constant_baseline, image_keys, load_data, mean_image, task_names
from moe_lab.train import fit


def tiny(**changes) -> VisionConfig:
    options = {"digit_size": 8, "n_train": 96, "n_valid": 40, "n_test": 30}
    settings = {"data_options": options, "n_experts": 5, "channels": (3,), "dense": (6,), "head": (5,)}
    small = {**settings, "batch_size": 32, "epochs": 2, "watched_images": 3}
    return VisionConfig.profile("quick", **{**small, **changes})


@pytest.mark.parametrize("gate", ["softmax", "topk+", "hash", "dselect_k", "comet", "comet+", *BASELINES])
def test_every_gate_trains_on_two_tasks_and_its_weights_sum_to_one(gate, tmp_path):
    result = run(tiny(gate=gate), root=tmp_path, progress=False)
    n_experts = {"one_expert": 1, "expert_per_task": 2}.get(gate, 5)
    assert result.finished
    for task in ("top_left", "bottom_right"):
        weights = torch.tensor(result.metrics["class_weights"][task])
        seen = weights.sum(1) > 0  # a class may be absent from 30 images
        assert weights.shape == (10, n_experts)
        if gate != "dselect_k":  # 5 is no power of two: some codes mean no expert
            torch.testing.assert_close(weights[seen].sum(1), torch.ones(int(seen.sum())), atol=1e-3, rtol=0)
    accuracy = (result.metrics["test_accuracy_top_left"] + result.metrics["test_accuracy_bottom_right"]) / 2
    assert result.metrics["test_accuracy"] == pytest.approx(accuracy)
    assert [row["epoch"] for row in result.curves["routing"]] == [0, 0, 1, 1, 2, 2]
    assert ("permutation" in result.curves) == gate.endswith("+")


def test_a_mixture_is_one_task_with_one_gate(tmp_path):
    config = tiny(dataset="digits-mixture")
    result = run(config, root=tmp_path, progress=False)
    assert set(result.metrics["routing"]) == {"digit"}
    by_domain = torch.tensor(result.metrics["domain_weights"]["digit"])
    torch.testing.assert_close(by_domain.sum(1), torch.ones(2), atol=1e-3, rtol=0)
    assert config.coefficients(("digit",))["digit"] == 1.0
    assert build_model(config, load_data(config), 3).moe.gates[0].in_features == 64


def test_a_finished_run_is_read_back_and_not_computed_again(tmp_path, monkeypatch):
    first = run(tiny(), root=tmp_path, progress=False)
    monkeypatch.setattr(comet_vision, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run(tiny(), root=tmp_path, progress=False)
    assert json.dumps(without_time(again)) == json.dumps(without_time(first))


def test_a_run_stopped_in_its_first_epoch_ends_like_one_that_was_not(tmp_path, monkeypatch):
    whole = run(tiny(gate="comet+"), root=tmp_path / "whole", progress=False)

    def stopped_after_four_steps(model, train, loss, **options):
        calls = []

        def failing(model, batch):
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("power cut")
            return loss(model, batch)

        return fit(model, train, failing, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comet_vision, "fit", stopped_after_four_steps)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tiny(gate="comet+"), root=tmp_path / "cut", progress=False)
    resumed = run(tiny(gate="comet+"), root=tmp_path / "cut", progress=False)
    assert without_time(resumed) == without_time(whole)


def test_hash_keys_depend_on_the_pixels_alone():
    images = torch.randint(0, 511, (500, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    keys = image_keys(images, 1000)
    torch.manual_seed(12)
    order = torch.randperm(500)
    assert torch.equal(image_keys(images[order], 1000), keys[order])
    assert torch.equal(image_keys(images.long(), 1000), keys)
    assert keys.min() >= 0 and keys.max() < 1000


def test_hash_keys_are_the_same_numbers_on_every_machine_and_one_pixel_changes_them():
    image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    other = image.clone()
    other[0, 0, 1, 1] += 1
    keys = image_keys(torch.cat((image, other)), 65536).tolist()
    multiplier = torch.randint(1, 2**31 - 1, (9,), generator=torch.Generator().manual_seed(20_230_606)).tolist()
    assert keys[0] == sum(pixel * m for pixel, m in enumerate(multiplier)) % (2**31 - 1) % 65536
    assert keys[0] != keys[1]


def test_hash_keys_spread_evenly():
    images = torch.randint(0, 256, (4000, 1, 5, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    counts = torch.bincount(image_keys(images, 8), minlength=8)
    assert (counts - 500).abs().max() < 5 * 500**0.5


def test_both_tasks_hash_an_image_to_the_same_expert(tmp_path):
    result = run(tiny(gate="hash"), root=tmp_path, progress=False)
    assert result.metrics["experts_run"] == 1.0 == result.metrics["experts_per_example"]


def test_the_baselines_do_not_look_at_the_image(tmp_path):
    alone, per_task = (run(tiny(gate=gate), root=tmp_path, progress=False) for gate in BASELINES)
    assert (alone.metrics["experts_run"], per_task.metrics["experts_run"]) == (1.0, 2.0)
    assert alone.metrics["same_set"] == per_task.metrics["same_set"] == 1.0
    assert per_task.metrics["routing"]["bottom_right"]["importance"] == [0.0, 1.0]


def test_the_constant_baseline_by_hand():
    train = {"labels": torch.tensor([[0, 1], [0, 1], [0, 0], [1, 0]])}
    test = {"labels": torch.tensor([[0, 1], [1, 0]])}
    found = constant_baseline(train, test, 2)
    # task 0: frequencies 3/4, 1/4, one test label each; task 1: 1/2, 1/2; half of each task's answers are right
    expected = ((torch.tensor([3 / 4, 1 / 4]).log().mean() + torch.tensor(0.5).log()) / -2).item()
    assert found["constant_loss"] == pytest.approx(expected)
    assert found["constant_accuracy"] == 0.5


def test_centring_takes_away_exactly_the_mean_training_image_from_the_gates_alone():
    config = tiny(center_pixels=True)
    data = load_data(config)
    model, raw = build_model(config, data, 3), build_model(tiny(), data, 3)
    seen = {}
    for name, built in (("centred", model), ("raw", raw)):
        built.moe.gates[0].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        built(data.train["image"])
    torch.testing.assert_close(seen["raw"] - seen["centred"], mean_image(data).expand(96, -1))
    torch.testing.assert_close(seen["centred"].mean(0), torch.zeros(100), atol=1e-5, rtol=0)


def test_raw_pixels_push_a_split_one_way_and_centred_pixels_do_not():
    """Why trees freeze: with x >= 0, one step of equal size in all weights moves every image's z the same way."""
    data = load_data(tiny())
    pixels = data.train["image"].flatten(1) / 255
    step = torch.full((100,), 0.01)
    assert bool(((pixels @ step) > 0).all())
    moved = (pixels - mean_image(data)) @ step
    assert 0.2 < (moved > 0).float().mean() < 0.8


def test_watched_rows_end_with_the_restored_model(tmp_path):
    result = run(tiny(), root=tmp_path, progress=False)
    final = [row for row in result.curves["watched"] if row["final"]]
    assert [row["task"] for row in final] == ["top_left", "bottom_right"]
    assert torch.tensor(final[0]["weights"]).shape == (3, 5)
    leaves = torch.tensor(final[0]["leaves"])
    torch.testing.assert_close(leaves.sum(1), torch.ones(3, 2), atol=0.004, rtol=0)  # rounded to three digits
    best = result.metrics["best_epoch"]
    same = [row for row in result.curves["watched"] if row["epoch"] == best and not row["final"]]
    assert [row["weights"] for row in same] == [row["weights"] for row in final]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "commet"}, "comet"),
        ({"dataset": "multimnst"}, "multimnist"),
        ({"n_expert": 4}, "n_experts"),
        ({"epochs": 0}, "at least 1"),
        ({"gate": "topk+", "permutation_epochs": 0.0}, "permutation_epochs"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig.profile("quick", **changes)


def test_profiles_follow_the_data_set():
    assert VisionConfig.profile("paper").n_experts == 16
    assert VisionConfig.profile("standard", dataset="multifashion").n_experts == 5
    mixture = VisionConfig.profile("paper", dataset="mnist-svhn")
    assert (mixture.n_experts, mixture.k, mixture.dense) == (8, 2, (50,))
    assert VisionConfig.profile("standard", dataset="mnist-svhn", k=3).k == 3


def test_the_papers_multimnist_model_has_the_size_counted_by_hand():
    config = dataclasses.replace(VisionConfig.profile("paper"), device="cpu")
    labels, image = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1, 36, 36, dtype=torch.int16)
    split = {"image": image, "labels": labels, "key": labels[:, 0]}
    data = Dataset("multimnist", "vision", split, split, split, info={"n_tasks": 2, "n_classes": 10, "scale": 255})
    expert = (25 * 10 + 10) + (250 * 20 + 20) + (720 * 50 + 50) + (50 * 50 + 50)
    head = 2 * (50 * 50 + 50) + (50 * 10 + 10)
    gate = (2 * 16 - 1) * 4 * (1296 + 1)
    n_parameters = sum(parameter.numel() for parameter in build_model(config, data, 1).parameters())
    assert n_parameters == 16 * expert + 2 * head + 2 * gate


def test_task_names_are_positions_for_two_tasks():
    assert (task_names(1), task_names(2)) == (("digit",), ("top_left", "bottom_right"))


def test_runs_that_differ_in_gate_share_the_data():
    vision_data._load.cache_clear()
    assert load_data(tiny(gate="hash")) is load_data(tiny(gate="comet", seed=3))


def test_real_multimnist_has_the_papers_sizes(real_data):
    real_data("multimnist")
    data = load_data(VisionConfig.profile("standard"))
    assert list(data.sizes.values()) == [100_000, 20_000, 20_000]
    assert data.train["key"].unique().numel() > 40_000  # of 65,536
    vision_data._load.cache_clear()
