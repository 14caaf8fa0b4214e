"""The exit distribution and the decision: invariants, limits, and the division that the closed form replaces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.exits import exit_probabilities, exits_taken
from moe_lab.exits.probability import MODELS


def gates(n, n_gates, seed, scale=1.0):
    return (scale * torch.rand(n, n_gates, generator=torch.Generator().manual_seed(seed))).clamp(max=1)


@given(st.sampled_from(MODELS), st.integers(1, 9), st.integers(0, 999), st.sampled_from([0.05, 0.3, 1.0, 3.0]))
def test_a_distribution_over_exits_sums_to_one(model, n_gates, seed, scale):
    p = exit_probabilities(gates(50, n_gates, seed, scale), model)
    assert p.shape == (50, n_gates + 1) and bool((p >= 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(50), atol=1e-6, rtol=0)
    assert bool((p.cumsum(-1) <= 1 + 1e-6).all())


@given(st.integers(1, 9), st.integers(0, 999))
def test_direct_cumulates_to_the_capped_sum_of_gates(n_gates, seed):
    g = gates(20, n_gates, seed).double()
    p = exit_probabilities(g)
    torch.testing.assert_close(p[:, :-1].cumsum(-1), g.cumsum(-1).clamp(max=1.0))
    by_hand = torch.zeros_like(p)
    for sample in range(20):
        left = 0.0
        for level in range(n_gates):
            by_hand[sample, level] = max(0.0, min(float(g[sample, level]), 1 - left))
            left += float(g[sample, level])
        by_hand[sample, -1] = max(0.0, 1 - left)
    torch.testing.assert_close(p, by_hand)


@given(st.integers(1, 8), st.integers(0, 999), st.sampled_from([0.1, 0.4, 1.0]))
def test_the_closed_rule_decides_as_the_conditional_probabilities(n_gates, seed, scale):
    g = gates(200, n_gates, seed, scale).double()
    p = exit_probabilities(g)
    expected = torch.full((200,), n_gates)
    for sample in range(200):
        still = 1.0
        for level in range(n_gates):
            q = min(1.0, max(0.0, float(p[sample, level]) / still))
            if abs(q - 0.5) < 1e-9:
                expected[sample] = -1  # a tie: either answer is right
                break
            if q >= 0.5:
                expected[sample] = level
                break
            still *= 1 - q
    sure = expected >= 0
    assert torch.equal(exits_taken(g)[sure], expected[sure])


def test_limits():
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    for model in MODELS:
        assert exits_taken(ones, model).tolist() == [0, 0, 0]
        assert exits_taken(zeros, model).tolist() == [4, 4, 4]
        assert exit_probabilities(zeros, model)[0].tolist() == [0, 0, 0, 0, 1]
    # equal gates 1/m: inside falls 1, 1 - 1/m, ...; it halves at l = m - 1 (counted from 1)
    for m in (4, 8):
        assert exits_taken(torch.full((1, m - 1), 1 / m, dtype=torch.float64)).item() == m - 2
    assert exits_taken(torch.full((1, 5), 0.49), "stick_breaking").item() == 5
    assert exits_taken(torch.tensor([[0.2, 0.6, 0.9]]), "cumulative").item() == 1


def test_permuting_a_batch_permutes_everything():
    g = gates(30, 5, 0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(exit_probabilities(g[order]), exit_probabilities(g)[order])
    assert torch.equal(exits_taken(g[order]), exits_taken(g)[order])


def test_gradients_reach_the_gates_and_stop_where_everything_is_given_away():
    g = torch.tensor([[0.7, 0.6, 0.5]], requires_grad=True)
    exit_probabilities(g)[0, 2].backward()
    assert g.grad.tolist() == [[0, 0, 0]]  # 0.7 + 0.6 is more than all
    g.grad = None
    exit_probabilities(g)[0, 1].backward()
    assert g.grad.tolist() == [[-1, 0, 0]]  # what is left after the first


@pytest.mark.parametrize("function", [exit_probabilities, exits_taken])
def test_unknown_models_are_refused(function):
    with pytest.raises(ValueError, match="did you mean 'stick_breaking'"):
        function(torch.rand(1, 2), "stick-breaking")


def test_half_precision_gates_are_added_up_in_float32():
    g = torch.full((1, 300), 1 / 512, dtype=torch.bfloat16)
    assert exit_probabilities(g).dtype == torch.float32
    assert exits_taken(g).item() == exits_taken(g.double()).item()
