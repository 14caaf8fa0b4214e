"""Notebook 06's checks accept right answers and say what is wrong with others."""

import math

import pytest

from moe_lab.exercises import budget
from moe_lab.tuning import rank_probabilities


def right_probabilities(n, b):
    return [math.comb(n - i, b - 1) / math.comb(n, b) for i in range(1, n + 1)]


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (budget.check_three_trials, (30 / 9,)),
        (budget.check_sure_of_the_top, (59,)),
        (budget.check_without_replacement, (right_probabilities,)),
        (budget.check_rising_curve, ([0, 1], [9, 1])),
        (budget.check_rising_curve, ([0, 1, 2], [5, 2, 8])),  # falls first
        (budget.check_headline, (8, 10)),
        (budget.check_headline, (70, 100)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (budget.check_three_trials, (None,), "Not answered yet"),
        (budget.check_three_trials, (3.0,), "without replacement"),
        (budget.check_three_trials, (4.0,), "not equally likely"),
        (budget.check_three_trials, (2.0,), "P(rank 3) = (1/3)^2"),
        (budget.check_sure_of_the_top, (20,), "miss the top 5 % with probability 0.358"),
        (budget.check_sure_of_the_top, (60,), "59 would do"),
        (budget.check_without_replacement, (lambda n, b: [1.0],), "expected 5 probabilities"),
        (budget.check_without_replacement, (lambda n, b: [0.1] * n,), "they sum to 0.500"),
        (budget.check_without_replacement, (lambda n, b: [math.nan] * n,), "they sum to nan"),
        (budget.check_without_replacement, (lambda n, b: [1 / n] * n,), "should have 0."),
        (budget.check_without_replacement, (rank_probabilities,), "n = 5, budget 2: rank"),  # that is with
        (budget.check_rising_curve, ([0, 1], [1, 9]), "your curve only falls, from 5 to 1"),
        (budget.check_rising_curve, ([0, 1], [1]), "equally long"),
        (budget.check_headline, (3, 10), "reaches 10 with probability 0.25"),
        (budget.check_headline, (6, 10), "do not add up"),
        (budget.check_headline, (9, 10), "8 would do: 0.53"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out
