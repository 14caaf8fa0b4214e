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
    geometric_exits,
    geometric_shares,
    geometric_thresholds,
    shared_threshold_exits,
    static_exits,
    target_accuracy_thresholds,
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


@given(st.integers(0, 60), st.integers(1, 5), st.floats(0.05, 3.0), st.booleans(), st.integers(0, 99))
def test_geometric_exits_are_what_the_thresholds_say_and_exact_where_confidences_are_equal(n, n_exits, rho, ties, seed):
    confidences, shares = random(n, n_exits, seed=seed).double(), geometric_shares(rho, n_exits)
    if ties:
        confidences = (4 * confidences).round()
    else:
        confidences += torch.arange(n).double().unsqueeze(1) * 1e-9
    exits = geometric_exits(confidences, shares)
    assert torch.bincount(exits, minlength=n_exits)[:-1].tolist() == [int(n * s + 1e-9) for s in shares[:-1].tolist()]
    for level in range(n_exits - 1):  # nobody who stays is surer than somebody who leaves
        leaves, stays = confidences[exits == level, level], confidences[exits > level, level]
        assert not len(leaves) or not len(stays) or leaves.min() >= stays.max()
    if not ties:
        assert torch.equal(exits, apply_thresholds(confidences, geometric_thresholds(confidences, rho)))


def test_geometric_exits_by_hand():
    confidences = torch.tensor([[0.5, 0.9, 0.1], [0.8, 0.2, 0.3], [0.8, 0.7, 0.9], [0.1, 0.8, 0.9]])
    shares = torch.tensor([0.25, 0.5, 0.25])
    assert geometric_exits(confidences, shares).tolist() == [1, 0, 2, 1]  # of the equal 0.8 the first
    assert geometric_exits(confidences[:, :2], shares).tolist() == [1, 0, 1, 1]  # a share without an exit: to the last
    equal_later = torch.tensor([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5], [0.3, 0.5, 0.5], [0.2, 0.5, 0.5]])
    assert geometric_exits(equal_later, torch.tensor([0.25, 0.25, 0.5])).tolist() == [0, 1, 2, 2]  # by row, not by 0.3


def slow_target_accuracy(confidences, right, target, least):
    """Every cut, longest first; a cut between equal confidences is none."""
    found = []
    for level in range(confidences.shape[1] - 1):
        pairs = sorted(zip(confidences[:, level].tolist(), right[:, level].tolist(), strict=True), reverse=True)
        for length in range(len(pairs), least - 1, -1):
            parts_equals = length < len(pairs) and pairs[length][0] == pairs[length - 1][0]
            if not parts_equals and sum(hit for _, hit in pairs[:length]) / length > target:
                found.append(pairs[length - 1][0])
                break
        else:
            found.append(float("inf"))
    return [*found, float("-inf")]


@given(
    st.integers(0, 40),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.4, 0.5, 0.75, 1.0]),
    st.integers(1, 12),
    st.integers(2, 50),
    st.integers(0, 99),
)
def test_target_accuracy_thresholds_are_those_of_trying_every_cut(n, n_exits, target, least, levels, seed):
    confidences = (random(n, n_exits, seed=seed) * levels).round() / levels  # few levels: many are equal
    right = random(n, n_exits, seed=seed + 1000) < 0.3 + 0.6 * confidences
    thresholds = target_accuracy_thresholds(confidences, right, target, least)
    assert thresholds.tolist() == slow_target_accuracy(confidences, right, target, least)
    for level, threshold in enumerate(thresholds[:-1]):
        kept = right[confidences[:, level] >= threshold, level]
        assert not len(kept) or (len(kept) >= least and kept.double().mean() > target)


def test_target_accuracy_thresholds_by_hand():
    first = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    hits = torch.tensor([False, True, True, True, False, False])  # 0, 1/2, 2/3, 3/4, 3/5, 1/2

    def threshold(target, least=1, confidences=first):
        both, right = torch.stack((confidences, first), 1), torch.stack((hits, hits), 1)
        return target_accuracy_thresholds(both, right, target, least)[0].item()

    assert threshold(0.7) == pytest.approx(0.6)
    assert threshold(0.55) == pytest.approx(0.5)  # the longest, not the best
    assert threshold(0.6) == pytest.approx(0.6)  # 3/5 does not exceed 3/5
    assert threshold(0.4) == pytest.approx(0.4)
    assert threshold(0.75) == threshold(0.7, least=5) == threshold(0.0, least=7) == float("inf")
    equal = torch.tensor([0.9, 0.8, 0.7, 0.5, 0.5, 0.4])  # a fourth without the fifth is not to be had
    assert threshold(0.65, confidences=equal) == pytest.approx(0.7)
    both = torch.stack((first, first), 1)
    exits = apply_thresholds(both, target_accuracy_thresholds(both, torch.stack((hits, hits), 1), 0.7, 1))
    assert exits.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(5, 2), torch.ones(5, 3, dtype=torch.bool), 0.5), "must both be"),
        ((torch.rand(5), torch.ones(5, dtype=torch.bool), 0.5), "must both be"),
        ((torch.rand(5, 2), torch.ones(5, 2), 0.5), "right must be bool"),
        ((torch.rand(5, 2), torch.ones(5, 2, dtype=torch.bool), 75.0), "target must be an accuracy"),
        ((torch.rand(5, 2), torch.ones(5, 2, dtype=torch.bool), 0.5, 0), "least must be at least 1"),
    ],
)
def test_target_accuracy_thresholds_refuse_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        target_accuracy_thresholds(*arguments)


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
    assert static_exits(3, 1, 2).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="exit 2 is out of range"):
        static_exits(3, 2, 2)


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
    policies = [static_exits(400, level, 4) for level in range(4)]
    policies += [shared_threshold_exits(confidence(logits), t) for t in (0.3, 0.5, 0.7, 0.9)]
    for exits in policies:
        for price in (0.0, 0.5, 2.0):
            assert objective(cheapest_exits(losses, costs, price), price) <= objective(exits, price) + 1e-6
        assert at_exit(right, exits).double().mean() <= at_exit(right, earliest).double().mean()
    assert at_exit(right, earliest).double().mean() == right.any(1).double().mean()


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_shares_that_end_before_the_last_exit_leave_hardly_anybody_for_it(rho):
    sure = torch.rand(1000, 5, generator=torch.Generator().manual_seed(0))
    exits = apply_thresholds(sure, geometric_thresholds(sure, rho, to_last=False))
    counts = torch.bincount(exits, minlength=5)
    assert counts[:4].tolist() == [int(1000 * share + 1e-9) for share in geometric_shares(rho, 4).tolist()]
    assert counts[4] < 4  # what rounding down left
    whole = torch.bincount(apply_thresholds(sure, geometric_thresholds(sure, rho)), minlength=5)
    assert whole[4] >= 1000 * geometric_shares(rho, 5)[-1] - 1
