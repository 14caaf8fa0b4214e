"""Rows take the places of others."""

from __future__ import annotations

from torch import Tensor

from moe_lab.triton_support import jit, tl, triton


@jit
def _move_kernel(h, source, width, COLUMNS: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    from_row = tl.load(source + row)
    if from_row != row:
        c = part * COLUMNS + tl.arange(0, COLUMNS)
        numbers = tl.load(h + from_row.to(tl.int64) * width + c, mask=c < width)
        tl.store(h + row.to(tl.int64) * width + c, numbers, mask=c < width)


def move(h: Tensor, source: Tensor) -> Tensor:
    """h[source] in h's own memory: (C, ...) contiguous -> (C', ...).

    Args:
        h: is changed.
        source: (C',) int32, each its own place or one behind the first C'.
    """
    width = h[0].numel()
    columns = min(triton.next_power_of_2(width), 2048)
    _move_kernel[(len(source), triton.cdiv(width, columns))](h, source, width, columns, num_warps=4)
    return h[: len(source)]
