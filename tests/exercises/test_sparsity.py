"""Checks of notebook 09 accept a right answer and say what is wrong with others."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_lab.exercises import sparsity
from moe_lab.gates.dense_to_sparse import gumbel_like

E = 8


class Replay:
    """Instead of a `ScheduleReplay`: experts per token that fall in a straight line."""

    n_experts = E

    def simulate(self, first=8.0, end=1.0, floor_from=0.25, hard=True):
        assert not hard
        experts = np.interp(np.linspace(0, 1, 101), [0, floor_from, 1], [first, end, end])
        return SimpleNamespace(experts=experts)


def two(tau, c, gap):
    window = tau * math.log((1 - c) / c)
    return 1 + 1 / (1 + math.exp(gap - window)) - 1 / (1 + math.exp(gap + window))


def mask(logits, noise, tau, c):
    q = ((logits + noise) / tau).softmax(-1)
    return (q > c) | torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).bool()


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (sparsity.check_threshold, (0.05,)),
        (sparsity.check_two_experts, (two,)),
        (sparsity.check_mask, (mask,)),
        (sparsity.check_mask, (lambda x, z, tau, c: mask(x, z, tau, c) | (x + z == (x + z).amax(-1, True)),)),
        (sparsity.check_schedule, ({}, Replay())),
        (sparsity.check_rising, ([1.0, 1.0, 0.0, 0.0], 0.3, 10.0, 0.3)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (sparsity.check_threshold, (None,), "Not answered yet"),
        (sparsity.check_threshold, (0.001,), "you need a larger c"),
        (sparsity.check_threshold, (0.3,), "you need a smaller c"),
        (sparsity.check_threshold, (2.0,), "between 0 and 1"),
        (sparsity.check_two_experts, (None,), "Not answered yet"),
        (sparsity.check_two_experts, (lambda tau, c, gap: two(tau, c, gap) - 1,), "one runs in any case"),
        (sparsity.check_two_experts, (lambda tau, c, gap: two(tau, c, 0.0),), "where is the gap"),
        (sparsity.check_two_experts, (lambda tau, c, gap: two(1.0, c, gap),), "where is τ"),
        (sparsity.check_two_experts, (lambda tau, c, gap: 2.0,), "Monte Carlo says"),
        (sparsity.check_mask, (None,), "Not answered yet"),
        (sparsity.check_mask, (lambda x, z, tau, c: ((x + z) / tau).softmax(-1) > c,), "have no expert"),
        (sparsity.check_mask, (lambda x, z, tau, c: mask(x, 0 * z, tau, c),), "where is the noise"),
        (sparsity.check_mask, (lambda x, z, tau, c: mask(x, z, 1.0, c),), "entries differ"),
        (sparsity.check_mask, (lambda x, z, tau, c: mask(x, z, tau, c).float(),), "of bool"),
        (
            sparsity.check_mask,
            (lambda x, z, tau, c: (((x + z) / tau).softmax(-1) > c) | (x == x.amax(-1, True)),),
            "that of the noisy logits",
        ),
        (sparsity.check_schedule, (None, Replay()), "Not answered yet"),
        (sparsity.check_schedule, ({"first": 6.0}, Replay()), "a start that is not dense"),
        (sparsity.check_schedule, ({"end": 1.5}, Replay()), "left at the last step"),
        (sparsity.check_schedule, ({"floor_from": 0.9}, Replay()), "on average"),
        (sparsity.check_rising, (None, 0.3, 10.0, 0.3), "Not answered yet"),
        (sparsity.check_rising, ([1.0, 1.0, 0.0, 0.0], 0.3, 0.3, 10.0), "must fall"),
        (sparsity.check_rising, ([1.0, 1.0, 0.0, 0.0], 1.3, 10.0, 0.3), "threshold lies in"),
        (sparsity.check_rising, ([1.0, 1.0, 0.0, 0.0], 0.2, 10.0, 0.3), "it cannot be"),
        (sparsity.check_rising, ([1.0, 0.0, 0.0, 0.0], 0.3, 10.0, 0.3), "not more"),
    ],
)
def test_other_answers_are_told_why(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out


def test_the_switch_is_taken_away_whatever_the_settings_say():
    assert sparsity.check_schedule({"hard": True}, Replay())


@pytest.mark.parametrize(("tau", "c", "gap"), [(0.5, 0.001, 0.0), (0.3, 0.02, 1.5), (0.1, 0.1, -0.7), (1.0, 0.0, 3.0)])
def test_the_formula_for_two_experts_agrees_with_monte_carlo(tau, c, gap):
    noise = gumbel_like(torch.empty(200_000, 2), torch.Generator().manual_seed(0))
    noise[:, 0] += gap
    k = ((noise / tau).softmax(-1) > c).sum(-1).clamp(min=1).double()
    assert sparsity.two_experts(tau, c, gap) == pytest.approx(float(k.mean()), abs=0.005)


def test_above_one_half_only_the_best_of_two_passes():
    assert sparsity.two_experts(1.0, 0.5) == sparsity.two_experts(0.1, 0.9, 2.0) == 1.0


def test_untrained_experts_are_those_of_the_specifications_table():
    """16 experts: 10.0 at tau = 0.5, 5.2 at 0.3 (c = 0.001); 4.0 at tau = 0.5, c = 0.02. Logits there: N(0, 0.1^2)."""
    for tau, c, expected in ((0.5, 0.001, 10.0), (0.3, 0.001, 5.2), (0.5, 0.02, 4.0)):
        assert sparsity.untrained_experts(16, tau, c) == pytest.approx(expected, abs=0.15)
