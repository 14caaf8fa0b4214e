"""What expert banks share: the interface that dispatch calls, initialisation, and a dropout that is cheap on
a CPU.

Legend: N rows (routed (token, expert) pairs), T tokens, E experts, F output width.

A bank knows nothing of routing. It gets rows that are *already sorted by expert* and how many belong to
each, so that an expert is one contiguous slice and one matrix product. Its weights are stacked, (E, ...):
one parameter, not E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExpertBank(nn.Module):
    """E experts of one shape.

    ``bank(x, counts)``: x (N, ...) sorted by expert, ``counts`` E integers that sum to N -> (N, F). With
    ``counts=None`` every expert runs on all rows of x (T, ...): (E * T, F), expert after expert, without
    copying x E times. ``bank.single(e, x)``: expert e alone, written with plain layers: what the oracle
    calls.

    Attributes:
        n_experts: E.
        out_features: F.
    """

    n_experts: int
    out_features: int

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """See the class."""
        raise NotImplementedError

    def single(self, expert: int, x: Tensor) -> Tensor:
        """See the class."""
        raise NotImplementedError


def check_counts(counts: Sequence[int] | Tensor | None, rows: int, n_experts: int) -> list[int] | None:
    """``counts`` as a list; ValueError unless it has one entry per expert and they sum to ``rows``."""
    if counts is None:
        return None
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(counts) != n_experts or sum(counts) != rows:
        raise ValueError(
            f"counts must have one entry for each of the {n_experts} experts and sum to the {rows} rows of x; "
            f"got {len(counts)} entries with sum {sum(counts)}"
        )
    return counts


def glorot_uniform_(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> Tensor:
    """U(-a, a) in place with a = sqrt(6 / (fan_in + fan_out)), Keras's default for dense and convolution
    layers.

    The fans are those of *one* expert: taken from the stacked shape, experts would start too small by
    sqrt(E).
    """
    bound = math.sqrt(6 / (fan_in + fan_out))
    with torch.no_grad():
        return weight.uniform_(-bound, bound, generator=generator)


def _keep_mask(like: Tensor, keep_bytes: int) -> Tensor:
    """0/1 in ``like``'s dtype, 1 with probability keep_bytes / 256: one random byte per number, not one draw."""
    words = torch.empty((like.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    random_bytes = words.view(torch.uint8)[: like.numel()].view(like.shape)
    return torch.lt(random_bytes, keep_bytes, out=torch.empty_like(like, memory_format=torch.contiguous_format))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with the mean kept: E[result] = x.

    PyTorch's CPU dropout draws one Bernoulli variable per number on one thread: 37 ms for 16 experts x 512
    tokens x 256, as long as the matrix product that precedes it (16 ms). Here eight decisions share one
    64-bit draw (3 ms). The price: on the CPU p is rounded to a multiple of 1/256 (0.5 is exact, 0.1 becomes
    0.1016), and the scaling follows.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return nn.functional.dropout(x, p, True)
    keep_bytes = min(max(round((1 - p) * 256), 1), 255)
    return x * _keep_mask(x, keep_bytes).mul_(256 / keep_bytes)
