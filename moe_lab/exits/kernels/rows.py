"""Rows take the places of others."""

from __future__ import annotations

from torch import Tensor

from moe_lab.triton_support import cdiv, jit, tl, triton


@jit
def _move_kernel(h, source, keep, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        from_row = tl.load(source + row, mask=row < keep, other=row)
        if from_row != row:
            numbers = tl.load(h + from_row.to(tl.int64) * width + c, mask=c < width)
            tl.store(h + row.to(tl.int64) * width + c, numbers, mask=c < width)


def move(h: Tensor, source: Tensor) -> Tensor:
    """h[source] in h's own memory: (C, ...) contiguous -> (C', ...).

    Args:
        h: is changed.
        source: (C',) int32, each its own place or one behind the first C'.
    """
    keep, width = len(source), h[0].numel()
    columns = min(triton.next_power_of_2(width), 2048)
    # Most rows stay: a program for each of them costs more than moving the others.
    rows = triton.next_power_of_2(cdiv(keep, 512))
    grid = cdiv(keep, rows), cdiv(width, columns)
    _move_kernel[grid](h, source, keep, width, rows, columns, num_warps=4)
    return h[:keep]
