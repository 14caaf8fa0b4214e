"""Who gets in when every expert takes C tokens at most, and who is dropped (Switch, GShard).

Legend: T tokens, E experts, C capacity.

Tokens queue in their order in the batch. One that does not fit has weight 0 at that expert; a token that fits nowhere
has a row of zeros, so an MoE layer adds nothing to it: only the residual connection carries it on. Dropping is done in
the *weights*; experts and dispatch know nothing of capacity.

    C = floor(factor * ceil(T * k / E)), at least 1      (the authors' code has the floor; others round up)
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


def check_capacity_factor(factor: float | None) -> None:
    """ValueError unless positive or None (no limit); warns (UserWarning) where more than half must be dropped."""
    if factor is None:
        return
    if not factor > 0:
        raise ValueError(f"capacity_factor must be positive, or None for no limit; got {factor}")
    if factor < 0.5:
        warnings.warn(
            f"capacity_factor = {factor} drops at least {1 - factor:.0%} of all assignments, even at perfect balance",
            stacklevel=3,
        )


def capacity(factor: float, n_tokens: int, n_experts: int, k: int = 1) -> int:
    """C, tokens that one expert takes of a batch."""
    return max(1, math.floor(factor * math.ceil(n_tokens * k / n_experts)))


def admit(chosen: Tensor, limit: int, already: Tensor | None = None) -> Tensor:
    """The first ``limit`` tokens that chose each expert.

    Args:
        chosen: (T, E) bool.
        limit: C.
        already: (E,) places that are taken (GShard: second choices queue behind all first choices).

    Returns:
        (T, E) bool, a subset of ``chosen``.
    """
    place = chosen.long().cumsum(0)
    if already is not None:
        place = place + already
    return chosen & (place <= limit)


def dropped_share(chosen: Tensor, kept: Tensor) -> Tensor:
    """Scalar: share of the assignments that found no place."""
    total = chosen.sum()
    return (total - kept.sum()) / total.clamp(min=1).to(torch.float32)
