"""BASE, StableMoE, expert choice: the property that defines each."""

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moe_lab.experts import MLPExperts, MoE
from moe_lab.gates import BaseLayerGate, ExpertChoiceGate, HashGate, StableGate, base_layer
from moe_lab.gates.base_layer import balanced_assignment


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.integers(0, 999))
def test_base_assignment_is_balanced_for_any_sizes(n_tokens, n_experts, seed):
    scores = torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(balanced_assignment(scores), minlength=n_experts)
    assert counts.sum() == n_tokens
    assert set(counts.tolist()) <= {n_tokens // n_experts, math.ceil(n_tokens / n_experts)}


@given(st.integers(0, 999))
def test_base_assignment_is_the_best_balanced_one(seed):
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
    best = max(
        sum(scores[t, e].item() for t, e in enumerate(choice))
        for choice in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    )
    found = balanced_assignment(scores)
    assert scores[torch.arange(6), found].sum().item() == pytest.approx(best, abs=1e-5)


@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 999))
def test_base_assignment_is_as_good_whatever_the_prices_it_starts_from(n_tokens, n_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_tokens, n_experts, generator=generator).mul(4).round() / 4  # ties, too
    found = [balanced_assignment(scores)]
    for prices in (torch.zeros(n_experts), torch.randn(n_experts, generator=generator) * 3):
        with patch.object(base_layer, "_prices", lambda scores, fair, prices=prices: prices):
            found.append(balanced_assignment(scores))
    first, *others = (scores.gather(1, chosen.unsqueeze(1)).sum().item() for chosen in found)
    assert others == pytest.approx([first] * 2, abs=1e-5)


def test_prices_leave_few_tokens_to_move():
    scores = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) + 2 * torch.arange(8)
    assert torch.bincount(scores.argmax(1), minlength=8).max() > 2000
    priced = torch.bincount((scores - base_layer._prices(scores, 500)).argmax(1), minlength=8)
    assert (priced - 500).abs().max() <= 20


def test_base_is_balanced_in_training_and_greedy_in_evaluation():
    gate, x = BaseLayerGate(5, 4), torch.randn(20, 5) + 3  # most tokens like the same expert
    assert gate(x).active.sum(0).tolist() == [5, 5, 5, 5]
    greedy = gate.eval()(x)
    assert torch.equal(greedy.weights.argmax(1), greedy.details["scores"].argmax(1))
    assert greedy.load.max() > 0.3


def test_base_centroids_learn_through_the_sigmoid():
    gate = BaseLayerGate(5, 4)
    y, _ = MoE(gate, MLPExperts(4, (5, 3), activate_last=False))(torch.randn(8, 5))  # a dead expert teaches nobody
    y.square().sum().backward()
    assert (gate.centroids.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("n_tokens", "n_experts"), [(24, 4), (10, 4), (3, 8), (1, 2), (0, 3)])
def test_expert_choice_fills_every_expert_exactly(factor, n_tokens, n_experts):
    routing = ExpertChoiceGate(5, n_experts, capacity_factor=factor)(torch.randn(n_tokens, 5))
    wanted = min(n_tokens, max(1, int(factor * n_tokens / n_experts)))
    assert (routing.active.sum(0) == wanted).all()


def test_expert_choice_looks_at_the_whole_batch():
    """A token's routing changes with the tokens after it: not causal, and said so in the docstring."""
    gate, x = ExpertChoiceGate(2, 2).eval(), torch.tensor([[1.0, 0.0]] * 4 + [[9.0, 0.0]] * 4)
    with torch.no_grad():
        gate.logits.weight.copy_(torch.eye(2))
        gate.logits.bias.zero_()
    assert gate(x[:4]).active[:, 0].sum() == 2  # among themselves two of them get expert 0
    assert gate(x).active[:4, 0].sum() == 0  # the later ones like it more


def stable(steps=3, seed=0):
    return StableGate(5, 4, 10, stage_one_steps=steps, generator=torch.Generator().manual_seed(seed))


def pairs(n=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(10, (n,), generator=generator)


def train(gate, n_steps):
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(n_steps):
        x, keys = pairs(seed=step)
        routing = gate((x, keys))
        loss = (routing.weights.sum(1) - 0.3).square().mean() + 0.3 * sum(routing.losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        gate.advance()


def test_stable_routing_never_changes_in_stage_two():
    gate = stable()
    train(gate, 3)
    assert gate.is_frozen
    x, keys = pairs(200)
    before = gate((x, keys)).weights
    weight_before = gate.centroids.weight.detach().clone()
    train(gate, 20)
    after = gate((torch.randn(200, 5), keys)).active  # other features, same words
    assert torch.equal(after, before != 0)
    assert not torch.equal(gate.centroids.weight, weight_before)  # the weight still learns
    losses = gate((x, keys)).losses
    assert losses["balance"] == 0 and losses["distill"] == 0


def test_stable_routing_is_a_table_of_words_once_frozen():
    gate = stable(1)
    gate.advance()
    x, keys = pairs(300)
    expert = gate((x, keys)).weights.argmax(1)
    for key in range(10):
        assert expert[keys == key].unique().numel() <= 1


def test_distillation_makes_the_light_router_follow():
    torch.manual_seed(0)
    gate = stable(10_000)
    words = torch.randn(10, 5)

    def agreement():
        keys = torch.arange(10)
        routing = gate((words, keys))
        light = gate.key_centroids(gate.key_embedding).argmax(1)
        return (routing.weights.argmax(1) == light).float().mean().item(), routing.losses["distill"]

    optimizer = torch.optim.Adam([gate.key_embedding, gate.key_centroids.weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        agreement()[1].backward()
        optimizer.step()
    assert agreement()[0] == 1.0


def test_stable_balance_by_hand_and_only_scores_carry_its_gradient():
    gate, (x, keys) = stable(), pairs()
    routing = gate((x, keys))
    counts = routing.active.sum(0).float()
    expected = ((counts / 8 - 1) * routing.weights.sum(0)).sum() / 32
    assert routing.losses["balance"].item() == pytest.approx(expected.item(), abs=1e-6)
    routing.losses["balance"].backward()
    assert gate.centroids.weight.grad.abs().sum() > 0 and gate.key_embedding.grad is None


def test_stable_state_survives_a_state_dict():
    gate, other = stable(2), stable(2, seed=5)
    train(gate, 2)
    other.load_state_dict(gate.state_dict())
    assert other.is_frozen and not other.key_embedding.requires_grad
    assert torch.equal(gate(pairs()).weights, other(pairs()).weights)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="per example"):
        BaseLayerGate(None, 4)
    with pytest.raises(ValueError, match="per example"):
        ExpertChoiceGate(None, 4)
    with pytest.raises(ValueError, match="experts per token"):
        ExpertChoiceGate(5, 4, capacity_factor=5.0)
    with pytest.raises(ValueError, match="stage_one_steps"):
        StableGate(5, 4, 10, stage_one_steps=0)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.booleans(), st.integers(0, 999))
def test_base_assignment_is_as_good_as_the_hungarian_method_s(n_tokens, n_experts, ties, seed):
    scores = torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()
    places = math.ceil(n_tokens / n_experts)
    profit = np.repeat(scores.double().numpy(), places, axis=1)
    missing = places * n_experts - n_tokens  # one expert leaves at most one of its places empty
    empty = np.full((missing, profit.shape[1]), -1e9)
    empty[:, ::places] = 0.0
    rows, columns = linear_sum_assignment(np.vstack((profit, empty)), maximize=True)
    best = sum(profit[row, column] for row, column in zip(rows, columns, strict=True) if row < n_tokens)
    chosen = balanced_assignment(scores)
    assert scores.double().gather(1, chosen.unsqueeze(1)).sum().item() == pytest.approx(best)


def test_hash_by_frequency_balances_tokens_not_keys():
    counts = torch.tensor([100, 60, 50, 40, 30, 30, 10, 0, 0, 0, 0])
    gate = HashGate.by_frequency(counts, 3)
    load = torch.stack([counts[gate.table == expert].sum() for expert in range(3)])
    assert load.tolist() == [100, 120, 100]  # by hand: 100 | 60, 30, 30 | 50, 40, 10
    assert load.sum() == counts.sum()
    random = torch.stack([counts[HashGate(11, 3, seed=0).table == expert].sum() for expert in range(3)])
    assert load.max() - load.min() < random.max() - random.min()
    with pytest.raises(ValueError, match="not negative"):
        HashGate.by_frequency(torch.tensor([-1, 2]), 2)


def test_base_refuses_scores_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        balanced_assignment(torch.tensor([[0.0, float("nan")], [1.0, 2.0]]))
