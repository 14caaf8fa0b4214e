"""Uncertainty features, targets, and the four losses of inference modules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.exits import (
    ExitGates,
    best_exits,
    exit_probabilities,
    gate_loss,
    gate_targets,
    inference_loss,
    positive_weights,
    uncertainty_features,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [2, 3, 10, 1000])
def test_features_of_the_extremes(k):
    sure = torch.zeros(k)
    sure[1] = 1e4
    assert uncertainty_features(sure).tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(uncertainty_features(torch.zeros(k)), torch.tensor([1 / k, math.log(k), 0, math.log(k)]))
    scaled = uncertainty_features(torch.zeros(k), scale=True)
    torch.testing.assert_close(scaled, torch.tensor([1 / k, 1.0, 0, 1.0]))


@given(st.integers(2, 12), st.integers(0, 999), st.floats(0.1, 20))
def test_features_obey_their_inequalities_and_symmetries(k, seed, scale):
    logits = scale * normal(7, k, seed=seed)
    u = uncertainty_features(logits)
    assert bool((u[:, 3] <= u[:, 1] + 1e-9).all())  # squaring sharpens
    assert bool((u[:, 0] >= 1 / k - 1e-12).all()) and bool((u[:, 1] <= math.log(k) + 1e-9).all())
    torch.testing.assert_close(uncertainty_features(logits.flip(-1) + 3.0), u)
    p = logits.softmax(-1)
    torch.testing.assert_close(u[:, 1], -(p * p.clamp(min=1e-300).log()).sum(-1))
    r = p**2 / (p**2).sum(-1, keepdim=True)
    torch.testing.assert_close(u[:, 3], -torch.xlogy(r, r).sum(-1))


def test_features_carry_no_gradient_and_need_two_classes():
    assert not uncertainty_features(torch.randn(3, 4, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match="at least 2 classes"):
        uncertainty_features(torch.randn(3, 1))


def test_best_exits_in_the_limits_and_by_hand():
    losses, costs = normal(100, 5).abs(), torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    assert torch.equal(best_exits(losses, costs, 0.0), losses.argmin(-1))
    assert best_exits(losses, costs, 1e6).max() == 0
    mean_cost = [costs[best_exits(losses, costs, price)].mean() for price in (0, 0.1, 0.5, 1, 5)]
    assert mean_cost == sorted(mean_cost, reverse=True)
    assert best_exits(torch.tensor([[1.0, 0.5, 0.1]]), torch.tensor([0.2, 0.6, 1.0]), 1.0).item() == 1  # 1.2 1.1 1.1
    per_run = best_exits(losses.expand(2, -1, -1), costs, torch.tensor([[0.0], [1e6]]))
    assert torch.equal(per_run[0], losses.argmin(-1)) and per_run[1].max() == 0
    with pytest.raises(ValueError, match="must not be negative"):
        best_exits(losses, costs, -0.1)


def test_targets_say_here_or_earlier():
    targets = gate_targets(torch.tensor([0, 2, 3]), 3)
    assert targets.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert targets.sum(-1).tolist() == [3, 1, 0]  # L - 1 - l*


def test_weights_against_imbalance_by_hand():
    best = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])  # of 4 exits
    assert positive_weights(best, 3, "cumulative").tolist() == pytest.approx([6 / 2, 5 / 3, 2 / 6])
    assert positive_weights(best, 3, "per_layer").tolist() == pytest.approx([6 / 2, 5.0, 5 / 3])
    assert positive_weights(best, 3, "none").tolist() == [1, 1, 1]
    assert positive_weights(torch.tensor([3, 3]), 3).tolist() == [5, 5, 5]  # nobody: capped
    runs = positive_weights(torch.stack((best, torch.full((8,), 3))), 3)
    assert runs.shape == (2, 3) and runs[1].tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="did you mean 'per_layer'"):
        positive_weights(best, 3, "per-layer")


def test_gate_loss_by_hand_and_per_run():
    logits, targets = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = (3 * math.log(2) + math.log1p(math.exp(2))) / 2
    assert gate_loss(logits, targets, torch.tensor([3.0, 7.0])).item() == pytest.approx(expected)
    both = gate_loss(logits.expand(2, 1, 2), targets.expand(2, 1, 2), torch.tensor([[3.0, 7.0], [1.0, 1.0]]))
    assert both.shape == (2,) and both[0].item() == pytest.approx(expected)


def gradient(mode, seed, **options):
    theta = normal(40, 3, seed=seed).requires_grad_()
    losses = theta.square()
    p = exit_probabilities(torch.rand(40, 3, generator=torch.Generator().manual_seed(seed)).double())[:, :3]
    value = inference_loss(losses, p, mode=mode, **options)
    value.backward()
    return value.item(), theta.grad


@pytest.mark.parametrize("seed", range(3))
def test_the_released_loss_is_plain_cross_entropy_and_the_detached_one_is_not(seed):
    released, uniform, detached = (gradient(mode, seed) for mode in ("released", "uniform", "detached"))
    assert released[0] == pytest.approx(uniform[0]) == pytest.approx(detached[0])  # one value, three gradients
    torch.testing.assert_close(released[1], uniform[1])
    assert (detached[1] - uniform[1]).abs().max() > 0.01


def test_expected_and_single_by_hand():
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    p = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    assert inference_loss(losses, p, mode="expected").item() == pytest.approx((0.5 + 0.5 + 4.0) / 2)
    assert inference_loss(losses, taken=torch.tensor([1, 2]), mode="single").item() == pytest.approx(2.0 / 2)
    with pytest.raises(ValueError, match="needs taken"):
        inference_loss(losses, mode="single")
    with pytest.raises(ValueError, match="needs probabilities"):
        inference_loss(losses, mode="expected")
    with pytest.raises(ValueError, match="did you mean 'released'"):
        inference_loss(losses, p, mode="release")


def test_a_sample_that_leaves_at_the_last_exit_does_no_harm():
    losses = torch.rand(2, 3, requires_grad=True)
    for mode in ("released", "detached", "expected"):
        losses.grad = None
        inference_loss(losses, torch.zeros(2, 3), mode=mode).backward()
        assert bool(torch.isfinite(losses.grad).all())


def test_gates_of_several_runs_are_those_of_one_run_side_by_side():
    one = ExitGates(3, generator=torch.Generator().manual_seed(0))
    many = ExitGates(3, runs=2, generator=torch.Generator().manual_seed(0))
    features = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    expected = one(features)
    assert torch.equal(many(features.expand(2, -1, -1, -1))[1], expected)
    for level in range(3):
        torch.testing.assert_close(one.one(level, features[:, level]), expected[:, level])
    assert sum(p.numel() for p in one.parameters()) == 5 * 3
    with pytest.raises(ValueError, match="at least 1"):
        ExitGates(0)
