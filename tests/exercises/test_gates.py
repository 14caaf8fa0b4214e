"""Checks accept a right answer and say what is wrong with others."""

import math

import pytest
import torch

from moe_lab.exercises import gates

UNIFORM = [[0.25] * 4] * 5


def noisy(logits, noise_logits, draw):
    return logits + draw * torch.nn.functional.softplus(noise_logits)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (gates.check_pull, ([0.5 * 2, 0.0, 0.25 * -4, 0.0],)),  # y = 2 + 0.5 - 0.5 = 2
        (gates.check_lost_choice, ([0.0, -1.0, -2.0, -3.0],)),
        (gates.check_noisy_logits, (noisy,)),
        (gates.check_blind_spot, (UNIFORM, [0, 0, 0, 0, 1])),
        (gates.check_empty_experts, (1 - math.factorial(8) / 8**8,)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (gates.check_pull, (None,), "Not answered yet"),
        (gates.check_pull, ([1.0, 0.0, -1.0],), "you give 3"),
        (gates.check_pull, ([1.0, 0.0, -1.0, 7.0],), "expert 3 has weight 0"),
        (gates.check_pull, ([2.0, 0.0, -1.0, 0.0],), "expert 0"),
        (gates.check_lost_choice, ([0.0, 0.0, 0.0, 0.0],), "NaN"),
        (gates.check_lost_choice, ([3.0, 2.0, 1.0, 0.0],), "both choose experts [0, 1]"),
        (gates.check_lost_choice, ([0.0, -1.0],), "four logits"),
        (gates.check_noisy_logits, (lambda h, s, e: h + e * s,), "flips"),
        (gates.check_noisy_logits, (lambda h, s, e: h + e,), "not learned"),
        (gates.check_noisy_logits, (lambda h, s, e: h + 2 * e * s.exp(),), "off by"),
        (gates.check_noisy_logits, (lambda h, s, e: h[0],), "shape"),
        (gates.check_blind_spot, (None, None), "Not answered yet"),
        (gates.check_blind_spot, (UNIFORM, [0, 1, 2, 3, 0]), "largest load is 0.40"),
        (gates.check_blind_spot, ([[0.7, 0.1, 0.1, 0.1]] * 5, [0] * 5), "the term is 2.8"),
        (gates.check_blind_spot, ([[0.7, 0.1, 0.1, 0.1]] * 5, [1] * 5), "largest scores"),
        (gates.check_blind_spot, ([[0.7, 0.1, 0.1, 0.2]] * 5, [0] * 5), "sum to"),
        (gates.check_blind_spot, (UNIFORM, [0, 0]), "one choice per token"),
        (gates.check_empty_experts, (math.factorial(8) / 8**8,), "nobody"),
        (gates.check_empty_experts, ((7 / 8) ** 8,), "one given expert"),
        (gates.check_empty_experts, (0.5,), "8^8 tables"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out


def test_marking_by_value_gives_nan_for_a_row_of_zeros_and_is_right_otherwise():
    assert gates.topk_by_marking(torch.zeros(1, 4), 2).isnan().all()
    weights = gates.topk_by_marking(torch.tensor([[3.0, 2.0, 1.0, -1.0]]), 2)
    torch.testing.assert_close(weights[0, :2], torch.tensor([3.0, 2.0]).softmax(0))
    assert weights[0, 2:].tolist() == [0.0, 0.0]
