"""Clear errors for parts that do not fit together, found where they meet and at no cost where they do fit.

Legend: N samples, L exits, K classes. Indices count from 0, as in `Prediction.exits`, ``heads`` and ``blocks``.

Shapes and devices are looked at on the host. Values are looked at once per `predict`, after the last block: every look
at a value waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def describe(value: object) -> str:
    """ "a float32 tensor (8, 16)", "a tuple", "None", ..."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def read_logits(head: nn.Module, h: Tensor, index: int) -> Tensor:
    """``head(h)``, the logits (N, K) of an inference module.

    Args:
        head: inference module ``index``.
        h: what block ``index`` returned.
        index: for the message.

    Raises:
        ValueError: the head fails on h, or does not return (N, K), K at least 2.
    """
    try:
        logits = head(h)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"heads[{index}] cannot read what blocks[{index}] returns, {describe(h)}: {error}. Put a pooling in front "
            "of its linear layer (`exits.split.linear_heads` makes one from the shape), or change its width"
        ) from error
    # Only tensors can be compared row by row: a block may return a pair that its own head reads.
    right = isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] >= 2
    if not right or (isinstance(h, Tensor) and logits.shape[:1] != h.shape[:1]):
        raise ValueError(
            f"heads[{index}] must return logits (N, K), one row per sample and at least 2 classes, got "
            f"{describe(logits)} from {describe(h)}: does it pool, and is its last layer linear?"
        )
    return logits


def check_classes(logits: Tensor, n_classes: int, index: int) -> None:
    """ValueError unless head ``index`` gives as many classes as head 0."""
    if logits.shape[1] != n_classes:
        raise ValueError(
            f"heads[{index}] tells {logits.shape[1]} classes apart and heads[0] {n_classes}: give all heads the same"
        )


def check_device(x: Tensor, network: nn.Module) -> None:
    """ValueError for an input on another device than the network's first parameter."""
    parameter = next(network.parameters(), None)
    if parameter is not None and parameter.device != x.device:
        raise ValueError(
            f"the input is on {x.device} and the network on {parameter.device}: x.to({str(parameter.device)!r})"
        )


def check_answers(probabilities: Tensor, exits: Tensor, gates: Tensor | float = 0.0) -> None:
    """ValueError for answers that are not numbers. Waits for the device, once.

    Args:
        probabilities: (N, K) at the exit taken.
        exits: (N,).
        gates: of samples that went to the end, the sum of each one's gates, or the gates, of any shape. NaN compares as
            false, so a sample with a NaN never leaves early: it would silently be charged for the whole network.
    """
    total = probabilities.sum() + (gates.sum() if isinstance(gates, Tensor) else gates)
    if not math.isnan(float(total)):
        return
    bad = probabilities.isnan().any(-1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} answers are NaN, the first is sample {first} at exit {int(exits[first])}: "
            "look for NaN or infinite values in the input and in the weights"
        )
    if not isinstance(gates, Tensor) or gates.isnan().any():  # else infinite gate logits that cancel: no fault
        raise ValueError(
            "confidences at an early exit are NaN: those samples could never leave there. Look at the logits of the "
            "early heads, forward(x)[0][:, :-1]"
        )


def check_exit(index: int, n_exits: int) -> None:
    """ValueError unless 0 <= index < L."""
    if not 0 <= index < n_exits:
        raise ValueError(f"exit {index} is out of range: {n_exits} exits are 0 .. {n_exits - 1}")


def check_exits(exits: Sequence[int], n_blocks: int) -> None:
    """ValueError unless these are at least two block indices, rising, the last one the last block's."""
    for index in exits:
        if index not in range(n_blocks):
            raise ValueError(f"exit behind block {index!r}: the {n_blocks} blocks are 0 .. {n_blocks - 1}")
    if len(set(exits)) != len(exits):
        raise ValueError(f"exits {tuple(exits)} name a block twice: each block has at most one exit")
    if list(exits) != sorted(exits):
        raise ValueError(f"exits {tuple(exits)} are out of order: take {tuple(sorted(exits))}")
    if len(exits) < 2 or exits[-1] != n_blocks - 1:
        raise ValueError(
            f"exits {tuple(exits)}: at least two are needed, the last of them behind the last block, {n_blocks - 1}"
        )
