"""Capacity: who is admitted, who is dropped; Switch and GShard with it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.gates import GShardGate, SwitchGate
from moe_lab.gates.capacity import admit, capacity, dropped_share


def with_logits(gate, logits):
    """A gate on one-hot inputs whose logits for token t are row t of ``logits`` (T, E)."""
    logits = torch.tensor(logits)
    with torch.no_grad():
        gate.logits.weight.copy_(logits.T)
        gate.logits.bias.zero_()
    return gate, torch.eye(len(logits))


def test_capacity_by_hand():
    assert capacity(1.0, 10, 4) == 3  # floor(1.0 * ceil(2.5))
    assert capacity(1.25, 10, 4) == 3  # floor(3.75), as the authors' code
    assert capacity(2.0, 10, 4, k=2) == 10
    assert capacity(0.01, 10, 4) == 1  # never nobody


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 8), st.integers(0, 999))
def test_the_first_to_come_are_admitted_and_nobody_else(n_tokens, n_experts, limit, seed):
    chosen = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept = admit(chosen, limit)
    assert not (kept & ~chosen).any()
    assert (kept.sum(0) == chosen.sum(0).clamp(max=limit)).all()
    for expert in range(n_experts):
        queue = chosen[:, expert].nonzero().flatten()
        assert torch.equal(kept[:, expert].nonzero().flatten(), queue[:limit])


def test_places_that_are_taken_count():
    chosen = torch.tensor([[True, True], [True, True]])
    assert admit(chosen, 2, already=torch.tensor([1, 2])).tolist() == [[True, False], [False, False]]
    assert dropped_share(chosen, admit(chosen, 1)).item() == 0.5


def test_switch_weights_are_probabilities_before_the_choice_and_late_tokens_are_dropped():
    gate, x = with_logits(SwitchGate(4, 2, capacity_factor=1.0), [[0.0, math.log(3.0)]] * 3 + [[math.log(3.0), 0.0]])
    routing = gate(x)
    assert torch.allclose(routing.weights, torch.tensor([[0, 0.75], [0, 0.75], [0, 0], [0.75, 0]]))  # C = 2
    assert routing.details["dropped"].item() == pytest.approx(0.25)
    shares, scores = torch.tensor([0.25, 0.75]), torch.tensor([0.375, 0.625])  # counted before dropping
    assert routing.losses["load_balance"].item() == pytest.approx(2 * float(shares @ scores))


def test_in_evaluation_nobody_is_dropped_unless_asked():
    logits = [[1.0, 0.0]] * 6
    gate, x = with_logits(SwitchGate(6, 2, capacity_factor=1.0), logits)
    assert gate.eval()(x).details["dropped"] == 0
    gate, x = with_logits(SwitchGate(6, 2, capacity_factor=1.0, drop_in_eval=True), logits)
    assert gate.eval()(x).details["dropped"].item() == 0.5


def test_a_top_one_router_learns_because_its_weight_is_below_one():
    gate = SwitchGate(5, 4)
    gate(torch.randn(7, 5)).weights.sum().backward()
    assert gate.logits.weight.grad.abs().sum() > 0


def test_gshard_by_hand():
    gate, x = with_logits(GShardGate(1, 3, second="best"), [[math.log(6.0), math.log(3.0), 0.0]])
    assert torch.allclose(gate(x).weights, torch.tensor([[2 / 3, 1 / 3, 0.0]]))


def test_second_choices_queue_behind_all_first_choices():
    # Token 0's second choice and token 1's first choice are both expert 1; there is one place per expert.
    logits = [[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, -1.0, 2.0]]
    gate, x = with_logits(GShardGate(3, 3, capacity_factor=0.5, second="best"), logits)
    kept = gate(x).active
    assert kept.tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    assert torch.allclose(gate(x).weights.sum(1), torch.ones(3))  # all weight to the first
    before, x = with_logits(
        GShardGate(3, 3, capacity_factor=0.5, second="best", normalise_after_dropping=False), logits
    )
    assert (before(x).weights.sum(1) < 1).all()


def test_the_sampled_second_expert_follows_the_probabilities_without_the_first():
    gate, x = with_logits(GShardGate(1, 3), [[5.0, math.log(3.0), 0.0]])
    x = x.expand(20_000, 1)
    second = gate(x, generator=torch.Generator().manual_seed(0)).active[:, 1].float().mean().item()
    assert second == pytest.approx(0.75, abs=0.02)  # Gumbel-max: 3 : 1


def test_the_random_second_expert_is_kept_with_twice_its_probability():
    gate, x = with_logits(GShardGate(1, 3, second="random"), [[math.log(8.0), 0.0, -20.0]])
    kept = gate(x.expand(20_000, 1), generator=torch.Generator().manual_seed(0)).experts_per_token == 2
    assert kept.float().mean().item() == pytest.approx(2 / 9, abs=0.02)


def test_a_capacity_that_drops_more_than_half_is_said_and_none_is_refused():
    with pytest.warns(UserWarning, match="at least 60%"):
        SwitchGate(4, 2, capacity_factor=0.4)
    with pytest.raises(ValueError, match="positive"):
        SwitchGate(4, 2, capacity_factor=0.0)
    with pytest.raises(ValueError, match="at least 2"):
        GShardGate(4, 1)
    with pytest.raises(ValueError, match="sampling"):
        GShardGate(4, 2, second="sample")
