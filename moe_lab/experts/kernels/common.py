"""What the experts' kernels share: names, and how to round up."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "tanh")
Slots = int | Tensor


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of 2 that is at least n and ``least``: sizes of Triton's blocks."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def precise(dtype: torch.dtype) -> torch.dtype:
    """What sums are computed in: float32, or float64 for it."""
    return torch.promote_types(dtype, torch.float32)
