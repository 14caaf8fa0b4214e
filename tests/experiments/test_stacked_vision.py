"""Trials of the vision experiment in a stack: the Results that they would leave one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from same_run import same_results

from moe_lab.experiments import comet_vision
from moe_lab.experiments.comet_vision import build_model, classification_loss
from moe_lab.experiments.stacked_gates import open_gates
from moe_lab.experiments.stacked_trials import check_stackable, run_stack
from moe_lab.experiments.stacked_vision import StackedVision, dense_experts
from moe_lab.experiments.vision_config import VisionConfig
from moe_lab.experiments.vision_data import load_data, task_names
from moe_lab.experts import ConvExperts
from moe_lab.gates import GATE_NAMES

TINY = VisionConfig.profile(
    "quick",
    data_options={"digit_size": 8, "n_train": 90, "n_valid": 40, "n_test": 30},
    n_experts=5,  # no power of two: DSelect-k has its third term, COMET leaves of two depths
    channels=(3, 2),
    kernel=2,
    dense=(6, 4),
    head=(5,),
    batch_size=32,  # 90 rows: the last batch is shorter
    epochs=3,
    watched_images=0,
)
GATES = tuple(f"{name}{plus}" for name in GATE_NAMES for plus in ("", "+"))


def trials(gate="comet+", **changes):
    """Three that differ in everything that may differ; the searches end in epoch 1, in epoch 3, and never."""
    own = [
        {"seed": 3, "learning_rate": 0.02, "gamma": 10.0, "entropy_weight": 0.1, "permutation_epochs": 0.5},
        {"seed": 8, "learning_rate": 0.005, "gamma": 1.0, "entropy_weight": 1.0, "permutation_epochs": 2.5},
        {"seed": 1, "learning_rate": 0.01, "gamma": 0.5, "entropy_weight": 0.0, "permutation_epochs": 9.0},
    ]
    own[1] |= {"permutation_weight": 0.1, "load_balance_weight": 0.3}
    return [dataclasses.replace(TINY, gate=gate, **{**values, **changes}) for values in own]


@pytest.mark.parametrize("gate", GATES)
def test_a_stack_leaves_the_results_of_one_trial_at_a_time(gate, tmp_path):
    configs = trials(gate)
    for config, result in zip(configs, run_stack(configs, root=tmp_path / "stack", progress=False), strict=True):
        same_results(result, comet_vision.run(config, root=tmp_path / "alone", progress=False), rtol=5e-4, atol=1e-4)
        assert result.environment["trials_side_by_side"] == 3


def test_a_mixture_with_centred_pixels_has_its_domains_in_a_stack_too(tmp_path):
    changes = {"dataset": "digits-mixture", "data_options": {"digit_size": 8}, "center_pixels": True, "epochs": 1}
    configs = [dataclasses.replace(config, **changes) for config in trials("comet")[:2]]
    for config, result in zip(configs, run_stack(configs, root=tmp_path / "stack", progress=False), strict=True):
        assert set(result.metrics["domain_weights"]) == {"digit"}
        same_results(result, comet_vision.run(config, root=tmp_path / "alone", progress=False), rtol=5e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n_experts", "channels", "sizes"), [(4, (3, 5), (6, 7)), (1, (3, 5), (6,)), (3, (2,), (5,)), (2, (3, 4, 2), (5,))]
)
def test_convolutions_as_products_are_the_experts_one_by_one(n_experts, channels, sizes):
    bank = ConvExperts(n_experts, 2, 22, channels, 3, sizes).double()
    x = torch.rand(6, 2, 22, 22, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for bias in bank.biases:
            bias.uniform_(-0.1, 0.1)
    ours, plain = dense_experts(bank, x), torch.stack([bank.single(e, x) for e in range(n_experts)])
    torch.testing.assert_close(ours, plain)
    direction, inputs = torch.randn_like(plain), [x, *bank.parameters()]
    found = torch.autograd.grad((ours * direction).sum(), inputs)
    expected = torch.autograd.grad((plain * direction).sum(), inputs)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_first_step_has_the_losses_and_gradients_of_the_ordinary_model():
    """With scaled-up splits, so that weights have exact zeros and the sparse dispatch really skips."""
    config = trials("comet")[1]
    data = load_data(config)
    ordinary, template = build_model(config, data, 5), build_model(config, data, 5)
    open_gates(template, config.n_experts)
    with torch.no_grad():
        for gate in ordinary.moe.gates:
            gate.split.weight.mul_(30)
    template.load_state_dict(ordinary.state_dict())
    rows = {name: data.train[name][:50] for name in ("image", "labels", "key")}
    weights = ordinary(rows["image"])[1][0].weights
    assert 0.1 < (weights == 0).float().mean() < 0.9
    terms = classification_loss(task_names(2), ordinary, rows)
    asked = StackedVision([config], data, torch.device("cpu"))
    dense = asked.loss(template, {**rows, "gamma": torch.tensor(config.gamma)})
    assert terms.keys() == dense.keys()
    for name, term in terms.items():
        torch.testing.assert_close(dense[name], term)
    sum(terms.values()).backward()
    sum(dense.values()).backward()
    for (name, p), (_, q) in zip(ordinary.named_parameters(), template.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_killed_stack_goes_on_to_the_same_results_bit_for_bit(tmp_path, monkeypatch):
    configs = trials()
    whole = run_stack(configs, root=tmp_path / "whole", progress=False)
    real, calls = StackedVision.evaluate, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("power cut")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StackedVision, "evaluate", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run_stack(configs, root=tmp_path / "parts", progress=False)
    for result, other in zip(run_stack(configs, root=tmp_path / "parts", progress=False), whole, strict=True):
        same_results(result, other, rtol=0, atol=0)


def test_trials_that_cannot_stack_are_refused_with_the_field():
    configs = trials()
    with pytest.raises(ValueError, match="must agree in channels"):
        check_stackable([configs[0], dataclasses.replace(configs[1], channels=(3,))])
    with pytest.raises(ValueError, match="need watched_images=0, got 3"):
        check_stackable([dataclasses.replace(config, watched_images=3) for config in configs])
    with pytest.raises(ValueError, match="train one by one"):
        check_stackable([dataclasses.replace(config, gate="one_expert") for config in configs])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gate", ["softmax", "topk+", "hash", "comet"])
def test_a_gpu_leaves_about_the_results_of_a_cpu(gate, tmp_path):
    """Products in bfloat16: losses agree to its precision."""
    configs = [dataclasses.replace(config, learning_rate=1e-3) for config in trials(gate)]
    on_cpu = run_stack(configs, root=tmp_path, progress=False)
    on_gpu = run_stack([dataclasses.replace(c, device="cuda") for c in configs], root=tmp_path, progress=False)
    for result, other in zip(on_gpu, on_cpu, strict=True):
        losses = [[row["valid_loss"] for row in each.curves["epochs"]] for each in (result, other)]
        np.testing.assert_allclose(*losses, rtol=2e-2)
