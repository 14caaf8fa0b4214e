"""Thresholds, and oracles that bound them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.exits.policies import (
    apply_thresholds,
    at_exit,
    cheapest_exits,
    confidence,
    earliest_right_exits,
    geometric_shares,
    geometric_thresholds,
    shared_threshold_exits,
    static_exits,
)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 300), st.integers(2, 8), st.floats(0.05, 3.0), st.integers(0, 99))
def test_geometric_thresholds_send_exactly_the_wanted_number_to_each_exit(n, n_exits, rho, seed):
    confidences = random(n, n_exits, seed=seed).double() + torch.arange(n).double().unsqueeze(1) * 1e-9
    exits = apply_thresholds(confidences, geometric_thresholds(confidences, rho))
    shares = geometric_shares(rho, n_exits)
    assert shares.sum().item() == pytest.approx(1)
    wanted = [int(n * share + 1e-9) for share in shares[:-1].tolist()]
    counts = torch.bincount(exits, minlength=n_exits).tolist()
    assert counts[:-1] == wanted and sum(counts) == n


def test_geometric_shares_in_the_limits():
    assert geometric_shares(1e-9, 5)[0].item() == pytest.approx(1)
    assert geometric_shares(1e9, 5)[-1].item() == pytest.approx(1)
    assert geometric_shares(1.0, 4).tolist() == pytest.approx([0.25] * 4)
    assert geometric_shares(0.5, 3).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    with pytest.raises(ValueError, match="rho must be positive"):
        geometric_shares(0.0, 3)


def test_a_shared_threshold_by_hand_and_in_the_limits():
    confidences = torch.tensor([[0.5, 0.9, 0.1], [0.8, 0.2, 0.3], [0.1, 0.2, 0.9]])
    assert shared_threshold_exits(confidences, 0.8).tolist() == [1, 0, 2]
    assert shared_threshold_exits(confidences, 0.0).tolist() == [0, 0, 0]
    assert shared_threshold_exits(confidences, 1.1).tolist() == [2, 2, 2]
    assert static_exits(3, 1).tolist() == [1, 1, 1]


def test_confidences_grow_with_sureness():
    unsure, sure = torch.tensor([0.1, 0.0, 0.0]), torch.tensor([5.0, 0.0, 0.0])
    for kind in ("probability", "entropy", "margin"):
        assert confidence(sure, kind) > confidence(unsure, kind)
    with pytest.raises(ValueError, match="did you mean 'margin'"):
        confidence(sure, "margins")


def test_no_policy_beats_the_oracles():
    logits, labels = random(400, 4, 3, seed=1) * 4, torch.arange(400) % 3
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(4), reduction="none")
    losses, costs = losses.view(400, 4), torch.tensor([0.25, 0.5, 0.75, 1.0])

    def objective(exits, price):
        return (at_exit(losses, exits) + price * costs[exits]).mean()

    right = logits.argmax(-1) == labels.unsqueeze(1)
    earliest = earliest_right_exits(logits, labels)
    policies = [static_exits(400, level) for level in range(4)]
    policies += [shared_threshold_exits(confidence(logits), t) for t in (0.3, 0.5, 0.7, 0.9)]
    for exits in policies:
        for price in (0.0, 0.5, 2.0):
            assert objective(cheapest_exits(losses, costs, price), price) <= objective(exits, price) + 1e-6
        assert at_exit(right, exits).double().mean() <= at_exit(right, earliest).double().mean()
    assert at_exit(right, earliest).double().mean() == right.any(1).double().mean()
