"""Grouped products of our own: rows W_e, or rows W_e^T.

As many programs as run at once take tiles in turns, and the loops over tiles and over a tile's depth are flattened into
one: the operands of the next tile are on their way while this one is stored. A short depth needs that: on an H200,
timed alone, these products do 5 to 17 % more operations per second than `torch.nn.functional.grouped_mm` (D and H of
1,024 to 4,096; notebook 15). The oracle is that function, and a loop over experts.

Operands come by tensor descriptors (Hopper's copy engine); rows behind those of the tile's expert are computed and
thrown away. A tile is stored in pieces: whole, its numbers in another layout would not fit into shared memory beside
the operands that are on their way.

Tried and not kept: products that end in the activation, or in its backward, and so save a pass over memory. A longer
end costs the product more than that: 0.81 and 0.83 of a dense layer instead of 0.86 (H200, 64 experts, k = 8; one run,
not recorded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.common import power_of_2
from moe_lab.experts.kernels.tiles import expert_tiles, tile_rows
from moe_lab.triton_support import INTERPRETED, capability, jit, tl, triton, usable


@jit
def _store(
    out, tile, row, stop, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr
):
    """The tile (ROWS, COLUMNS) to rows from row, below stop, and columns from first."""
    if PIECES > 1:
        left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        _store(out, left, row, stop, first, WIDTH, ROWS, COLUMNS // 2, PIECES // 2)
        _store(out, right, row, stop, first + COLUMNS // 2, WIDTH, ROWS, COLUMNS // 2, PIECES // 2)
    else:
        r, c = row + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
        at = out + r[:, None].to(tl.int64) * WIDTH + c[None, :]
        tl.store(at, tile.to(out.dtype.element_ty), mask=(r < stop)[:, None] & (c < WIDTH)[None, :])


@jit
def _product_kernel(
    left, right, ends, out, n, n_experts, n_programs,
    TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, PIECES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """A tile: ROWS rows of an expert times COLUMNS of its (INNER, WIDTH) matrix, or of a (WIDTH, INNER) transposed."""
    N_BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    begin, end, through = expert_tiles(ends, n, n_experts, ROWS, E_PAD)
    for job in tl.range(tl.program_id(0), tl.max(through, 0) * N_BLOCKS, n_programs, flatten=True):
        expert, row, stop = tile_rows(begin, end, through, job // N_BLOCKS, ROWS, E_PAD)
        first = job % N_BLOCKS * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, INNER, STEP):
            w = right.load([expert * WIDTH + first, d]).T if TRANSPOSED else right.load([expert * INNER + d, first])
            total = tl.dot(left.load([row, d]), w, total)
        _store(out, total, row, stop, first, WIDTH, ROWS, COLUMNS, PIECES)


def product_runs(rows: Tensor, weight: Tensor, transposed: bool = False) -> bool:
    """`product` can run: on Hopper, 16-bit numbers, rows of whole multiples of 16 bytes, at least one row.

    On other cards the tiles may not fit into shared memory, and nobody has measured. The depth of a product with W_e
    itself must be a multiple of the tile's, or a step would reach into the next expert's weights.
    """
    if not usable(rows) or not len(rows) or rows.dtype.itemsize != 2 or any(size % 8 for size in weight.shape[1:]):
        return False
    if not torch.compiler.is_compiling() and (rows.data_ptr() % 16 or weight.data_ptr() % 16):
        return False  # a view into something larger; torch.compile knows no addresses
    if not transposed and rows.shape[1] % tuning.PRODUCTS["product"].depth:
        return False
    if rows.device.type != "cuda":
        return rows.dtype != torch.bfloat16  # which the interpreter cannot multiply
    return capability(rows.device)[0] == 9


def _described(matrix: Tensor, *block: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def product(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """rows @ W_e, or rows @ W_e^T if ``transposed``; sums in float32.

    Args:
        rows: (N, A) in expert order, contiguous; see `product_runs`.
        weight: (E, A, B), or (E, B, A) if transposed; contiguous.
        ends: (E,) int32, see `expert_order`. Rows behind the last are not touched, here and in the result.

    Returns:
        (N, B) in rows' dtype.
    """
    size, (n, inner), n_experts = tuning.PRODUCTS["product"], rows.shape, len(weight)
    width = weight.shape[1 if transposed else 2]
    out = rows.new_empty(n, width)
    n_jobs = (n // size.rows + n_experts) * triton.cdiv(width, size.columns)  # at most
    multiprocessors = 2 if INTERPRETED else torch.cuda.get_device_properties(rows.device).multi_processor_count
    n_programs = min(multiprocessors * size.programs, n_jobs)
    block = (size.columns, size.depth) if transposed else (size.depth, size.columns)
    _product_kernel[(n_programs,)](
        _described(rows, size.rows, size.depth), _described(weight.flatten(0, 1), *block), ends, out, n, n_experts,
        n_programs, TRANSPOSED=transposed, WIDTH=width, INNER=inner, ROWS=size.rows, COLUMNS=size.columns,
        STEP=size.depth, PIECES=size.pieces, E_PAD=power_of_2(n_experts, 2), num_warps=size.warps,
        num_stages=size.stages, maxnreg=size.registers,
    )  # fmt: skip
    return out
