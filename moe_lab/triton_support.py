"""Whether Triton is there and can run. Kernels run on CUDA, and on a CPU if TRITON_INTERPRET=1 was set before this
module was imported (slow, for tests)."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch comes without it
    triton = tl = None
try:
    from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices
except ImportError:  # no Triton, or an older one than PyTorch's own
    create_ragged_descriptor = to_ragged_indices = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def usable(x: Tensor) -> bool:
    """Triton can run on x: there, on this device, in this dtype."""
    if triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.device.type == "cuda":
        return x.device.index == torch.cuda.current_device()  # kernels start on the current device
    return x.device.type == "cpu" and INTERPRETED


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, (9, 0) on Hopper; (0, 0) for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    if torch.compiler.is_compiling():  # which looks through caches, and says so
        return torch.cuda.get_device_capability(device)
    return _properties(device).major, _properties(device).minor


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; in the interpreter 2 programs are enough for a test."""
    return 2 if INTERPRETED else _properties(device).multi_processor_count


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up. (`triton.cdiv` is made for kernels: from outside a call of it takes microseconds.)"""
    return -(-n // size)


def jit(function):
    """`triton.jit`; without Triton the function itself, which nobody calls then."""
    return function if triton is None else triton.jit(function)


if triton is None or INTERPRETED or torch.version.hip is not None:

    @jit
    def exp2(x):
        """2^x."""
        return tl.exp2(x)

    @jit
    def reciprocal(x):
        """1 / x."""
        return 1 / x
else:
    # One instruction each. Triton's own keep denormal numbers, for three to five instructions more.

    @jit
    def exp2(x):
        """2^x in float32, to 2 units in the last place; denormal numbers become 0."""
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @jit
    def reciprocal(x):
        """1 / x in float32, to 1 unit in the last place; denormal numbers become 0."""
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
