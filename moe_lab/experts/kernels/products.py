"""Grouped products of our own: plain, or ending in the activation.

    product             rows W_e, or rows W_e^T
    hidden              h = X W_e and `activate`: saves reading h again
    hidden_gradient     da = G W_e^T and `activate_backward`: saves writing and reading da

N routed pairs in expert order, D width, H hidden width, F output width, E experts.

One kernel for all three, in two ways of going over the tiles (`tuning.Product.turns`):

* as many programs as run at once take tiles in turns, and the loops over tiles and over a tile's depth are flattened
  into one: the operands of the next tile are on their way while this one is finished. A short depth needs that; there
  `torch.nn.functional.grouped_mm` loses a tenth.
* a program for each tile, two at a time on a multiprocessor: one multiplies while the other finishes. That suits an
  end that takes long, as the activation's does.

Operands come by tensor descriptors (Hopper's copy engine); rows behind those of the tile's expert are computed and
thrown away. A tile is finished in pieces: whole, its numbers in another layout would not fit into registers and shared
memory beside the operands that are on their way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.activation import act_and_slope
from moe_lab.experts.kernels.common import power_of_2
from moe_lab.experts.kernels.tiles import expert_tiles, sum_tiles, tile_rows
from moe_lab.triton_support import INTERPRETED, jit, tl, triton, usable


@jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@jit
def _finish(
    z, first, out, h, bias, g, grad_bias, r, live, width,
    FINISH: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Store COLUMNS of a tile, beginning at first. Returns <act, da> of each row where the gradient is computed."""
    if PIECES > 1:
        left, right = _halves(z, ROWS, COLUMNS)
        dot = _finish(
            left, first, out, h, bias, g, grad_bias, r, live, width, FINISH, ACT, BIAS, ROWS, COLUMNS // 2, PIECES // 2
        )
        dot += _finish(
            right, first + COLUMNS // 2, out, h, bias, g, grad_bias, r, live, width, FINISH, ACT, BIAS, ROWS,
            COLUMNS // 2, PIECES // 2,
        )  # fmt: skip
    else:
        c = first + tl.arange(0, COLUMNS)
        inside = live[:, None] & (c < width)[None, :]
        at = r[:, None].to(tl.int64) * width + c[None, :]
        dot = tl.zeros((ROWS,), tl.float32)
        b = tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
        if FINISH == "hidden":
            z = z.to(h.dtype.element_ty)  # rounded first: the backward will see this one
            tl.store(h + at, z, mask=inside)
            a, _ = act_and_slope(z.to(tl.float32) + b, ACT)
            z = g[:, None] * a
        if FINISH == "gradient":
            a, slope = act_and_slope(tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b, ACT)
            da = tl.where(inside, z, 0.0)
            dot = tl.sum(a * da, 1)
            z = g[:, None] * slope * da
            if BIAS:
                tl.store(grad_bias + c, tl.sum(z, 0), mask=c < width)
        tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)
    return dot


@jit
def _tile(
    job, begin, end, through, left, right, out, h, bias, value, grad_value, grad_bias, tile_expert,
    FINISH: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PIECES: tl.constexpr,
    E_PAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of an expert times COLUMNS of its (INNER, WIDTH) matrix, or of the transpose of (WIDTH, INNER)."""
    N_BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile, block = job // N_BLOCKS, job % N_BLOCKS
    expert, row, stop = tile_rows(begin, end, through, tile, ROWS, E_PAD)
    first = block * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(0, INNER, STEP):
        w = right.load([expert * WIDTH + first, d]).T if TRANSPOSED else right.load([expert * INNER + d, first])
        total = tl.dot(left.load([row, d]), w, total)
    r = row + tl.arange(0, ROWS)
    live = r < stop
    g = r if FINISH == "none" else tl.load(value + r, mask=live, other=0.0)
    dot = _finish(
        total, first, out, h, bias + expert * WIDTH, g, grad_bias + tile * WIDTH, r, live, WIDTH, FINISH, ACT, BIAS,
        ROWS, COLUMNS, PIECES,
    )  # fmt: skip
    if FINISH == "gradient":
        tl.store(grad_value + r * N_BLOCKS + block, dot, mask=live)
        if BIAS:
            tl.store(tile_expert + tile, expert, mask=block == 0)


@jit
def _product_kernel(
    left, right, ends, out, h, bias, value, grad_value, grad_bias, tile_expert, n, n_experts, n_programs,
    TURNS: tl.constexpr, FINISH: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PIECES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    begin, end, through = expert_tiles(ends, n, n_experts, ROWS, E_PAD)
    first, n_jobs = tl.program_id(0), tl.max(through, 0) * ((WIDTH + COLUMNS - 1) // COLUMNS)
    if TURNS:
        for job in tl.range(first, n_jobs, n_programs, flatten=True):
            _tile(
                job, begin, end, through, left, right, out, h, bias, value, grad_value, grad_bias, tile_expert, FINISH,
                ACT, BIAS, TRANSPOSED, WIDTH, INNER, ROWS, COLUMNS, STEP, PIECES, E_PAD,
            )  # fmt: skip
    else:
        if first < n_jobs:
            _tile(
                first, begin, end, through, left, right, out, h, bias, value, grad_value, grad_bias, tile_expert,
                FINISH, ACT, BIAS, TRANSPOSED, WIDTH, INNER, ROWS, COLUMNS, STEP, PIECES, E_PAD,
            )  # fmt: skip


def fusable(x: Tensor, *widths: int, inner: int = 0) -> bool:
    """The products here can run: 16-bit numbers, rows of whole multiples of 16 bytes, Hopper or newer.

    ``inner`` is the depth of a product with W_e itself (not W_e^T): a multiple of the tile's, or a step would reach
    into the next expert's weights.
    """
    depth = max(size.depth for size in tuning.PRODUCTS.values())
    if not usable(x) or x.dtype.itemsize != 2 or any(width % 8 for width in widths) or inner % depth:
        return False
    if x.device.type != "cuda":
        return x.dtype != torch.bfloat16  # which the interpreter cannot multiply
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def _described(matrix: Tensor, *block: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def _programs(size: tuning.Product, device: torch.device, n_jobs: int) -> int:
    """As many as run at once, where they take turns; else one for each job."""
    if not size.turns:
        return n_jobs
    multiprocessors = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return min(multiprocessors * size.programs, n_jobs)


def _launch(
    name: str, rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool, out: Tensor, h: Tensor | None = None,
    bias: Tensor | None = None, value: Tensor | None = None, activation: str = "relu", finish: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernel. Returns what it leaves besides ``out`` and ``h``: by block, by tile, and experts of tiles."""
    size, (n, inner), n_experts, width = tuning.PRODUCTS[name], rows.shape, len(weight), out.shape[1]
    tiles, n_blocks = n // size.rows + n_experts, triton.cdiv(width, size.columns)
    gradient = finish == "gradient"
    by_block = by_tile = tile_expert = ends  # what is not asked for is not read
    if gradient:
        by_block = out.new_empty(n, n_blocks, dtype=torch.float32)
    if gradient and bias is not None:
        by_tile = out.new_zeros(tiles, width, dtype=torch.float32)
        tile_expert = torch.zeros(tiles, dtype=torch.int32, device=out.device)
    block = (size.columns, size.depth) if transposed else (size.depth, size.columns)
    n_programs = _programs(size, rows.device, tiles * n_blocks)
    _product_kernel[(n_programs,)](
        _described(rows, size.rows, size.depth), _described(weight.flatten(0, 1), *block), ends, out,
        out if h is None else h, out if bias is None else bias, ends if value is None else value, by_block, by_tile,
        tile_expert, n, n_experts, n_programs, TURNS=size.turns, FINISH=finish, ACT=activation, BIAS=bias is not None,
        TRANSPOSED=transposed, WIDTH=width, INNER=inner, ROWS=size.rows, COLUMNS=size.columns, STEP=size.depth,
        PIECES=size.pieces, E_PAD=power_of_2(n_experts, 2), num_warps=size.warps, num_stages=size.stages,
        maxnreg=size.registers,
    )  # fmt: skip
    return by_block, by_tile, tile_expert


def product(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """rows @ W_e, or rows @ W_e^T if ``transposed``.

    Args:
        rows: (N, A) in expert order, contiguous, N > 0; `fusable` with widths A and B, and inner A unless transposed.
        weight: (E, A, B), or (E, B, A) if transposed; contiguous.
        ends: (E,) int32, see `expert_order`.

    Returns:
        (N, B).
    """
    out = rows.new_empty(len(rows), weight.shape[1 if transposed else 2])
    _launch("product", rows, weight, ends, transposed, out)
    return out


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
    h, out = (rows.new_empty(len(rows), w1.shape[2]) for _ in range(2))
    _launch("hidden", rows, w1, ends, False, out, h, bias, value, activation, "hidden")
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
    grad_h = torch.empty_like(h)
    by_block, by_tile, tile_expert = _launch(
        "hidden_gradient", grad_rows, w2, ends, True, grad_h, h, bias, value, activation, "gradient"
    )
    grad_bias = None if bias is None else sum_tiles(by_tile, tile_expert, len(w2))
    return grad_h, by_block.sum(1), grad_bias
