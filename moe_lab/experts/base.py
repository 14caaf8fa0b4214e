"""What expert banks share: the interface that dispatch calls, and initialisation.

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
    copying x E times.

    ``bank.single(e, x)``: expert e alone, written with plain layers: what the oracle
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
