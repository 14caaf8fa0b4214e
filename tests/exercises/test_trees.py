"""Checks accept a right answer and say what is wrong with others."""

import pytest
import torch

from moe_lab.exercises import trees
from moe_lab.gates import CometGate

LEAVES, PRIOR = [7, 8, 9, 10, 5, 6], [1 / 8] * 4 + [1 / 4] * 2


def gate(weight, bias, k=1):
    weight, bias = 20 * torch.tensor(weight).unsqueeze(-1), 20 * torch.tensor(bias).unsqueeze(-1)
    n = len(bias) + 1
    return CometGate.from_arrays(
        weight.expand(-1, -1, k), bias.expand(-1, k), torch.zeros(n, 2, k), torch.zeros(n, k), gamma=1.0
    )


def offset(**changes):
    return gate(**{"weight": [[1.0, 0], [0, 1], [0, 1]], "bias": [0.0, 0.5, -0.5], **changes})


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (trees.check_leaves, (6, LEAVES, PRIOR)),
        (trees.check_split_rate, (lambda rate, gamma, name: rate * (gamma if name == "adam" else gamma**2),)),
        (trees.check_partition, (offset(),)),
        (trees.check_fewer_than_k, (offset(k=3),)),
        (trees.check_inflation, (1e-6,)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (trees.check_leaves, (6, None, None), "Not answered yet"),
        (trees.check_leaves, (6, [5, 6, 7, 8, 9, 10], PRIOR), "expert 0: not leaf 5"),
        (trees.check_leaves, (6, [4, 7, 8, 9, 10, 5], PRIOR), r"[4] are not leaves"),
        (trees.check_leaves, (6, LEAVES[1:], PRIOR), "6 leaves, you name 5"),
        (trees.check_leaves, (6, LEAVES, [0.25] * 6), "sum to 1.5"),
        (trees.check_leaves, (6, LEAVES, [1 / 4] * 2 + [1 / 8] * 4), "expert 0 does not start with 0.25"),
        (trees.check_split_rate, (lambda rate, gamma, name: rate * gamma,), "with sgd, gamma = 0.1"),
        (trees.check_split_rate, (lambda rate, gamma, name: rate,), "with adam"),
        (trees.check_partition, (offset(bias=[0.0, 0.5, 0.5]),), "in region 3 it is 35 %"),
        (trees.check_partition, (offset(weight=[[0.05, 0], [0, 0.05], [0, 0.05]], bias=[0, 0.025, -0.025]),), "soft"),
        (trees.check_fewer_than_k, (offset(k=2),), "2 trees"),
        (trees.check_fewer_than_k, (offset(k=3, bias=[50.0, 50.0, 0.0]),), "one expert"),
        (trees.check_fewer_than_k, (CometGate(2, 4, 3),), "4.00 experts per token"),
        (trees.check_inflation, (1e-8,), "100 % too large"),
        (trees.check_inflation, (0,), "inf"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out
