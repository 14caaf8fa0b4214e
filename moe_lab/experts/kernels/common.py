"""What all kernels share: whether Triton is there and can run, and how to round up."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch comes without it
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ACTIVATIONS = ("relu", "gelu", "tanh")
Slots = int | Tensor


def usable(x: Tensor) -> bool:
    """Triton can run on x: there, on this device, in this dtype."""
    if triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.device.type == "cuda":
        return x.device.index == torch.cuda.current_device()  # kernels start on the current device
    return x.device.type == "cpu" and INTERPRETED


def jit(function):
    """`triton.jit`; without Triton the function itself, which nobody calls then."""
    return function if triton is None else triton.jit(function)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of 2 that is at least n and ``least``: sizes of Triton's blocks."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def precise(dtype: torch.dtype) -> torch.dtype:
    """What sums are computed in: float32, or float64 for it."""
    return torch.promote_types(dtype, torch.float32)
