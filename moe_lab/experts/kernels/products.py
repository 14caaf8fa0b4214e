"""Grouped products that end in the activation.

    hidden              h = X W_e and `activate`: saves reading h again
    hidden_gradient     da = G W_e^T and `activate_backward`: saves writing and reading da

N routed pairs in expert order, D width, H hidden width, F output width, E experts.

Operands come by tensor descriptors (Hopper's copy engine); rows behind those of the tile's expert are computed and
thrown away. The tile is finished in quarters: whole, it would not fit into 128 registers a thread, and with more only
one program fits on a multiprocessor, where nothing multiplies meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.activation import act_and_slope
from moe_lab.experts.kernels.common import power_of_2
from moe_lab.experts.kernels.tiles import sum_tiles, tile_rows
from moe_lab.triton_support import jit, tl, triton, usable


@jit
def _tile_product(
    left, right, row, expert, first, width, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """ROWS of left, from row, times COLUMNS of the expert's INNER x width matrix, from first; or of its transpose."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(0, INNER, STEP):
        w = right.load([expert * width + first, d]).T if TRANSPOSED else right.load([expert * INNER + d, first])
        total = tl.dot(left.load([row, d]), w, total)
    return total


@jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@jit
def _finish_hidden(
    z, first, h, bias, g, out, r, live, width, ACT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS of a tile, beginning at first: stores h without bias, and its activation."""
    c = first + tl.arange(0, COLUMNS)
    inside = live[:, None] & (c < width)[None, :]
    at = r[:, None].to(tl.int64) * width + c[None, :]
    z = z.to(h.dtype.element_ty)  # rounded first: the backward will see this one
    tl.store(h + at, z, mask=inside)
    b = tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    a, _ = act_and_slope(z.to(tl.float32) + b, ACT)
    tl.store(out + at, (g[:, None] * a).to(out.dtype.element_ty), mask=inside)


@jit
def _hidden_kernel(
    rows, w1, bias, value, ends, h, out, n, width, n_experts, n_blocks,
    ACT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    STEP: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    expert, row, stop = tile_rows(ends, tile, n, n_experts, ROWS, E_PAD)
    if row < stop:
        first = block * COLUMNS
        z = _tile_product(rows, w1, row, expert, first, width, False, ROWS, COLUMNS, INNER, STEP)
        r = row + tl.arange(0, ROWS)
        live = r < stop
        g = tl.load(value + r, mask=live, other=0.0)
        b = bias + expert * width
        left, right = _halves(z, ROWS, COLUMNS)
        QUARTER: tl.constexpr = COLUMNS // 4
        one, two = _halves(left, ROWS, COLUMNS // 2)
        _finish_hidden(one, first, h, b, g, out, r, live, width, ACT, BIAS, QUARTER)
        _finish_hidden(two, first + QUARTER, h, b, g, out, r, live, width, ACT, BIAS, QUARTER)
        one, two = _halves(right, ROWS, COLUMNS // 2)
        _finish_hidden(one, first + 2 * QUARTER, h, b, g, out, r, live, width, ACT, BIAS, QUARTER)
        _finish_hidden(two, first + 3 * QUARTER, h, b, g, out, r, live, width, ACT, BIAS, QUARTER)


@jit
def _finish(
    da, first, h, bias, g, grad_h, grad_bias, r, live, width,
    ACT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a tile, beginning at first: stores dh and its sum over rows, returns <act, da> of each row."""
    c = first + tl.arange(0, COLUMNS)
    inside = live[:, None] & (c < width)[None, :]
    at = r[:, None].to(tl.int64) * width + c[None, :]
    b = tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    a, slope = act_and_slope(tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b, ACT)
    da = tl.where(inside, da, 0.0)
    dh = g[:, None] * slope * da
    tl.store(grad_h + at, dh.to(grad_h.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(grad_bias + c, tl.sum(dh, 0), mask=c < width)
    return tl.sum(a * da, 1)


@jit
def _hidden_gradient_kernel(
    grad_rows, w2, h, bias, value, ends, grad_h, grad_value, grad_bias, tile_expert,
    n, width, n_experts, n_blocks,
    ACT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    STEP: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    expert, row, stop = tile_rows(ends, tile, n, n_experts, ROWS, E_PAD)
    if row < stop:
        first = block * COLUMNS
        da = _tile_product(grad_rows, w2, row, expert, first, width, True, ROWS, COLUMNS, INNER, STEP)
        r = row + tl.arange(0, ROWS)
        live = r < stop
        g = tl.load(value + r, mask=live, other=0.0)
        b, db = bias + expert * width, grad_bias + tile * width
        left, right = _halves(da, ROWS, COLUMNS)
        QUARTER: tl.constexpr = COLUMNS // 4
        one, two = _halves(left, ROWS, COLUMNS // 2)
        dot = _finish(one, first, h, b, g, grad_h, db, r, live, width, ACT, BIAS, QUARTER)
        dot += _finish(two, first + QUARTER, h, b, g, grad_h, db, r, live, width, ACT, BIAS, QUARTER)
        one, two = _halves(right, ROWS, COLUMNS // 2)
        dot += _finish(one, first + 2 * QUARTER, h, b, g, grad_h, db, r, live, width, ACT, BIAS, QUARTER)
        dot += _finish(two, first + 3 * QUARTER, h, b, g, grad_h, db, r, live, width, ACT, BIAS, QUARTER)
        tl.store(grad_value + r * n_blocks + block, dot, mask=live)
        if BIAS:
            tl.store(tile_expert + tile, expert, mask=block == 0)


def fusable(x: Tensor, *widths: int, inner: int = 0) -> bool:
    """The products here can run: 16-bit numbers, rows of whole multiples of 16 bytes, Hopper or newer.

    ``inner`` is D for `hidden`: a multiple of the tile's depth, or a step would reach into the next expert's weights.
    """
    depth = tuning.PRODUCTS["hidden"].depth
    if not usable(x) or x.dtype.itemsize != 2 or any(width % 8 for width in widths) or inner % depth:
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (9, 0)


def _described(matrix: Tensor, *block: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def _product(size: tuning.Product, n_experts: int, inner: int) -> dict[str, int | None]:
    """Constants and options of the two product kernels."""
    constants = {"ROWS": size.rows, "COLUMNS": size.columns, "INNER": inner, "STEP": size.depth}
    options = {"num_warps": size.warps, "num_stages": size.stages, "maxnreg": size.registers}
    return constants | options | {"E_PAD": power_of_2(n_experts, 2)}


def hidden(
    rows: Tensor, w1: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """h = rows @ w1_e and `activate` of it.

    Args:
        rows: (N, D) in expert order, contiguous, N > 0; `fusable` with widths D and H and inner D.
        w1: (E, D, H), contiguous.
        bias, value, ends, activation: as in `activate`.

    Returns:
        h, without the bias, and its activation, both (N, H).
    """
    (n, inner), (n_experts, _, width), has_bias = rows.shape, w1.shape, bias is not None
    size = tuning.PRODUCTS["hidden"]
    tiles, n_blocks = n // size.rows + n_experts, triton.cdiv(width, size.columns)
    h, out = rows.new_empty(n, width), rows.new_empty(n, width)
    _hidden_kernel[(tiles * n_blocks,)](
        _described(rows, size.rows, size.depth), _described(w1.flatten(0, 1), size.depth, size.columns),
        bias if has_bias else h, value, ends, h, out, n, width, n_experts, n_blocks,
        ACT=activation, BIAS=has_bias, **_product(size, n_experts, inner),
    )  # fmt: skip
    return h, out


def hidden_gradient(
    grad_rows: Tensor, w2: Tensor, h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`activate_backward` of grad = grad_rows @ w2_e^T, which is never written.

    Args:
        grad_rows: (N, F) in expert order, contiguous, N > 0; `fusable` with widths H and F.
        w2: (E, H, F), contiguous.
        h, bias, value, ends, activation: as in `activate`.

    Returns:
        gradients with respect to h (N, H), value (N,) and bias (E, H), the last two in float32 (None without a bias).
    """
    (n, width), (n_experts, _, inner), has_bias = h.shape, w2.shape, bias is not None
    size = tuning.PRODUCTS["hidden_gradient"]
    tiles, n_blocks = n // size.rows + n_experts, triton.cdiv(width, size.columns)
    grad_h, by_block = torch.empty_like(h), h.new_empty(n, n_blocks, dtype=torch.float32)
    by_tile = h.new_zeros(tiles, width, dtype=torch.float32) if has_bias else by_block
    tile_expert = torch.zeros(tiles, dtype=torch.int32, device=h.device)
    _hidden_gradient_kernel[(tiles * n_blocks,)](
        _described(grad_rows, size.rows, size.depth),
        _described(w2.flatten(0, 1), size.columns, size.depth),
        h, bias if has_bias else h, value, ends, grad_h, by_block, by_tile, tile_expert,
        n, width, n_experts, n_blocks, ACT=activation, BIAS=has_bias, **_product(size, n_experts, inner),
    )  # fmt: skip
    return grad_h, by_block.sum(1), sum_tiles(by_tile, tile_expert, n_experts) if has_bias else None
