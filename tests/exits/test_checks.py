"""Parts that do not fit together are named; a NaN answer is an error; what fits passes unchanged."""

import pytest
import torch
from torch import nn

from moe_lab.exits.checks import (
    check_answers,
    check_classes,
    check_device,
    check_exit,
    check_exits,
    describe,
    read_logits,
)


def test_a_head_that_fits_is_called_once_and_nothing_else_happens():
    head, h = nn.Linear(4, 3), torch.randn(5, 4)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(read_logits(head, h, 2), head(h)) and len(calls) == 2
    assert read_logits(head, torch.randn(0, 4), 0).shape == (0, 3)


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    ("head", "h", "message"),
    [
        (
            nn.Linear(5, 3),
            torch.ones(2, 4),
            r"heads\[7\] cannot read what blocks\[7\] returns, a float32 tensor \(2, 4\)",
        ),
        (nn.Conv2d(5, 3, 1), torch.ones(2, 4, 1, 1), r"\(2, 4, 1, 1\): .*5 channels"),
        (nn.Linear(4, 3), (torch.ones(2, 4), None), "returns, a tuple"),
        (nn.Linear(4, 3), torch.ones(2, 6, 4), r"must return logits .* got a float32 tensor \(2, 6, 3\)"),
        (nn.Linear(4, 1), torch.ones(2, 4), r"at least 2 classes, got a float32 tensor \(2, 1\)"),
        (nn.Flatten(0), torch.ones(2, 4), r"got a float32 tensor \(8,\)"),
        (nn.Unflatten(1, (2, 2)), torch.ones(2, 4), r"got a float32 tensor \(2, 2, 2\)"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (4, 2))), torch.ones(2, 4), r"one row per sample"),
    ],
)
def test_a_head_that_cannot_read_its_block_is_named_with_the_shapes(head, h, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_logits(head, h, 7)
    assert "heads[7]" in str(caught.value)


def test_the_cause_is_kept_and_running_out_of_memory_is_no_matter_of_shapes():
    cause = IndexError("dimension 3")
    with pytest.raises(ValueError, match="dimension 3") as caught:
        read_logits(Fails(cause), torch.ones(2, 4), 0)
    assert caught.value.__cause__ is cause
    with pytest.raises(torch.OutOfMemoryError):
        read_logits(Fails(torch.OutOfMemoryError("full")), torch.ones(2, 4), 0)
    with pytest.raises(KeyboardInterrupt):
        read_logits(Fails(KeyboardInterrupt()), torch.ones(2, 4), 0)


def test_heads_with_different_numbers_of_classes_are_named():
    check_classes(torch.ones(2, 3), 3, 1)
    with pytest.raises(ValueError, match=r"heads\[1\] tells 4 classes apart and heads\[0\] 3"):
        check_classes(torch.ones(2, 4), 3, 1)


def test_an_input_on_another_device_is_named():
    network = nn.Linear(2, 2)
    check_device(torch.ones(1, 2), network)
    check_device(torch.ones(1, 2, device="meta"), nn.Identity())  # nothing to compare with
    with pytest.raises(ValueError, match=r"input is on meta and the network on cpu: x.to\('cpu'\)"):
        check_device(torch.ones(1, 2, device="meta"), network)


def test_answers_that_are_no_numbers_are_counted_and_the_first_is_named():
    probabilities, exits = torch.full((6, 2), 0.5), torch.tensor([0, 1, 2, 2, 1, 0])
    gates = torch.rand(3)
    check_answers(probabilities, exits)
    check_answers(probabilities, exits, gates)
    check_answers(probabilities[:0], exits[:0], gates[:0])
    check_answers(probabilities, exits, torch.tensor([float("inf"), -float("inf")]))  # logits of sure gates
    check_answers(probabilities, exits, 0.7)
    bad = probabilities.clone()
    bad[2, 1] = bad[4, 0] = float("nan")
    with pytest.raises(ValueError, match="2 of 6 answers are NaN, the first is sample 2 at exit 2"):
        check_answers(bad, exits, gates)
    gates[1] = float("nan")
    for broken in (gates, float("nan"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="confidences at an early exit are NaN"):
            check_answers(probabilities, exits, broken)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_exit_that_is_not_there_is_named(index):
    check_exit(0, 3)
    check_exit(2, 3)
    with pytest.raises(ValueError, match=f"exit {index} is out of range: 3 exits are 0 .. 2"):
        check_exit(index, 3)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ((0, 5), "exit behind block 5: the 4 blocks are 0 .. 3"),
        ((-1, 3), "exit behind block -1"),
        ((0.5, 3), "exit behind block 0.5"),
        ((1, 1, 3), "name a block twice"),
        ((2, 1, 3), r"out of order: take \(1, 2, 3\)"),
        ((3,), "at least two are needed"),
        ((), "at least two are needed"),
        ((0, 2), "the last of them behind the last block, 3"),
    ],
)
def test_exits_out_of_range_twice_or_out_of_order_are_refused(exits, message):
    check_exits((0, 3), 4)
    check_exits([0, 1, 2, 3], 4)
    with pytest.raises(ValueError, match=message):
        check_exits(exits, 4)


def test_things_are_described_for_people():
    assert describe(torch.ones(2, 3, dtype=torch.bfloat16)) == "a bfloat16 tensor (2, 3)"
    assert describe({"a": 1}) == "a dict" and describe(None) == "None"
