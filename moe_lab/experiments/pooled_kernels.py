"""The Triton code of `pooled_convolution`, which says what is computed; `pooled_launch` starts the kernels.

Legend: groups (an expert of a trial), a few of which look at one input; B images, H x W pixels, C channels in and OUT
out, k side of a filter.

A cell is the largest of four sums, and all four look into one window of SIDE = k + 1 pixels a side. So the four are
*one* product: the window, as a row of numbers, times four copies of the filter, each moved by its (dy, dx) and with
zeros around it. A window's numbers are read once instead of four times, its rows are consecutive in memory, and as
windows begin at even pixels several numbers come with one instruction. The zeros cost 36/25 of the arithmetic (k = 5).

    columns of the filters   (dy, dx, o)         (4, OP)      o padded to OP, a power of 2
    rows                     (ky, (kx, c))       (S, RP)      S = SIDE or, if that is odd, one more; a window's row
                                                              padded to RP, a power of 2; all of them to DEPTH

    forward_kernel    windows (cells, DEPTH) @ filters (DEPTH, 4 OP)      then the largest of four, bias, ReLU
    weights_kernel    windows^T @ spread                                  spread (cells, 4 OP): the gradient of a cell
    image_kernel      spread of (S / 2)^2 cells @ filters^T               in its winner's columns, 0 in the others'

The last computes the gradient of 2 x 2 pixels at a time, at which the same cells look: columns (ay, (ax, c)), (2, SP).

Zero times infinity is NaN: a pixel that is not finite spoils every cell that looks at it, and no other image.
"""

from __future__ import annotations

from functools import partial

from moe_lab.triton_support import jit, tl, triton

# A smaller last batch is not worth another compilation.
_launched = jit if triton is None else partial(triton.jit, do_not_specialize=("n_images", "share", "part"))


@jit
def _windows(
    x, m, there, d,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(len(m), len(d)): numbers d of the windows of cells m."""
    first = m // (ROWS * COLUMNS) * (H * W * C) + m // COLUMNS % ROWS * (2 * W * C) + m % COLUMNS * (2 * C)
    row, place = d // RP, d % RP
    exists = (row < SIDE) & (place < SIDE * C)
    at = first[:, None] + (row * (W * C) + place)[None, :]
    return tl.load(x + at, mask=there[:, None] & exists[None, :], other=0.0)


@jit
def _cells(grad, index, cell, there, OUT: tl.constexpr, OP: tl.constexpr):
    """(len(cell), OP): gradients of cells, and who won."""
    o = tl.arange(0, OP)
    at, inside = cell[:, None] * OUT + o[None, :], there[:, None] & (o < OUT)[None, :]
    return tl.load(grad + at, mask=inside, other=0.0), tl.load(index + at, mask=inside, other=0)


@jit
def _beside(left, right, M: tl.constexpr, COLUMNS: tl.constexpr):
    """(M, 2 COLUMNS). Nothing moves from thread to thread."""
    return tl.join(left, right).permute(0, 2, 1).reshape(M, 2 * COLUMNS)


@jit
def _spread(g, q, dy: tl.constexpr, M: tl.constexpr, OP: tl.constexpr):
    """(M, 2 OP): gradients in the columns of their winners, those of one dy."""
    return _beside(tl.where(q == 2 * dy, g, 0.0), tl.where(q == 2 * dy + 1, g, 0.0), M, OP).to(g.dtype)


@jit
def _halves(z, M: tl.constexpr, COLUMNS: tl.constexpr):
    return z.reshape(M, 2, COLUMNS // 2).permute(0, 2, 1).split()


@jit
def _larger(z, q, best, which):
    """As max_pool2d has it: the first of equal ones, and NaN beats all."""
    take = (z > best) | (z != z)
    return tl.where(take, z, best), tl.where(take, q, which)


@_launched
def forward_kernel(
    x, filters, bias, y, index, n_images, share,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr,
    OP: tl.constexpr, DEPTH: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = (H - SIDE + 2) // 2
    COLUMNS: tl.constexpr = (W - SIDE + 2) // 2
    group, n_cells = tl.program_id(1).to(tl.int64), n_images * (ROWS * COLUMNS)
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.arange(0, 4 * OP)
    x += group // share * n_images * (H * W * C)
    filters += group * (DEPTH * 4 * OP)
    total = tl.zeros((M, 4 * OP), tl.float32)
    for first in tl.range(0, DEPTH, STEP, num_stages=STAGES):
        d = first + tl.arange(0, STEP)
        p = _windows(x, m, m < n_cells, d, H, W, C, SIDE, RP, ROWS, COLUMNS)
        f = tl.load(filters + d[:, None] * (4 * OP) + n[None, :])
        total = tl.dot(p, f, total, input_precision="ieee")
    upper, lower = _halves(total, M, 4 * OP)  # dy = 0 and 1
    best, z = _halves(upper, M, 2 * OP)
    best, which = _larger(z, 1, best, 0)
    z, last = _halves(lower, M, 2 * OP)
    best, which = _larger(z, 2, best, which)
    best, which = _larger(last, 3, best, which)
    o = tl.arange(0, OP)
    best += tl.load(bias + group * OUT + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    dead = best <= 0  # false for NaN, which stays
    at = m[:, None] * OUT + o[None, :]
    inside = (m < n_cells)[:, None] & (o < OUT)[None, :]
    y += group * n_cells * OUT
    index += group * n_cells * OUT
    tl.store(y + at, tl.where(dead, 0.0, best).to(y.dtype.element_ty), mask=inside)
    tl.store(index + at, tl.where(dead, 4, which).to(tl.uint8), mask=inside)


@_launched
def weights_kernel(
    x, grad, index, sums, n_images, share, part,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr,
    OP: tl.constexpr, DEPTH: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One of the STEPs of DEPTH, for ``part`` consecutive cells of a group."""
    ROWS: tl.constexpr = (H - SIDE + 2) // 2
    COLUMNS: tl.constexpr = (W - SIDE + 2) // 2
    group, n_cells = tl.program_id(1).to(tl.int64), n_images * (ROWS * COLUMNS)
    d, n = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.arange(0, 4 * OP)
    x += group // share * n_images * (H * W * C)
    grad += group * n_cells * OUT
    index += group * n_cells * OUT
    total = tl.zeros((STEP, 4 * OP), tl.float32)
    begin = tl.program_id(2) * part
    for first in tl.range(begin, tl.minimum(begin + part, n_cells), M, num_stages=STAGES):
        m = first + tl.arange(0, M)
        p = _windows(x, m, m < n_cells, d, H, W, C, SIDE, RP, ROWS, COLUMNS)
        p = tl.where((d == SIDE * C)[None, :], 1.0, p).to(p.dtype)  # the first gap between rows: the bias's gradient
        g, q = _cells(grad, index, m, m < n_cells, OUT, OP)
        spread = _beside(_spread(g, q, 0, M, OP), _spread(g, q, 1, M, OP), M, 2 * OP)
        total = tl.dot(p.T, spread, total, input_precision="ieee")
    sums += (tl.program_id(2) * tl.num_programs(1) + group) * (DEPTH * 4 * OP)
    tl.store(sums + d[:, None] * (4 * OP) + n[None, :], total)


@_launched
def image_kernel(
    grad, index, filters, out, n_images,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, SIDE: tl.constexpr, OP: tl.constexpr,
    SP: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = (H - SIDE + 2) // 2
    COLUMNS: tl.constexpr = (W - SIDE + 2) // 2
    HALF_H: tl.constexpr = (H + 1) // 2
    HALF_W: tl.constexpr = (W + 1) // 2
    REACH: tl.constexpr = (SIDE + 1) // 2
    group = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * M + tl.arange(0, M)
    image, i, j = m // (HALF_H * HALF_W), m // HALF_W % HALF_H, m % HALF_W
    k, n = tl.arange(0, 2 * OP), tl.arange(0, 2 * SP)
    grad += group * n_images * (ROWS * COLUMNS * OUT)
    index += group * n_images * (ROWS * COLUMNS * OUT)
    filters += group * (REACH * REACH * 8 * OP * SP)
    total = tl.zeros((M, 2 * SP), tl.float32)
    for step in tl.range(0, REACH * REACH, num_stages=STAGES):
        py, px = i - step // REACH, j - step % REACH
        there = (image < n_images) & (py >= 0) & (py < ROWS) & (px >= 0) & (px < COLUMNS)
        g, q = _cells(grad, index, (image * ROWS + py) * COLUMNS + px, there, OUT, OP)
        for dy in tl.static_range(2):  # two products of half the width: fewer registers
            f = tl.load(filters + (step * (4 * OP) + 2 * OP * dy + k)[:, None] * (2 * SP) + n[None, :])
            total = tl.dot(_spread(g, q, dy, M, OP), f, total, input_precision="ieee")
    row, place = 2 * i[:, None] + (n // SP)[None, :], 2 * C * j[:, None] + (n % SP)[None, :]
    inside = (image < n_images)[:, None] & (row < H) & (n % SP < 2 * C)[None, :] & (place < W * C)
    first = image[:, None] * (H * W * C) + 2 * i[:, None] * (W * C) + 2 * C * j[:, None]
    at = first + (n // SP * (W * C) + n % SP)[None, :]
    out += group * n_images * (H * W * C)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
