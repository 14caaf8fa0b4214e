"""Grouped products of our own: rows W_e, or rows W_e^T, and sums over an expert's rows, left^T right.

As many programs as run at once take tiles in turns, and the loops over tiles and over a tile's depth are flattened into
one: the operands of the next tile are on their way while this one is stored. A last round in which at most half of the
programs have a tile is done in halves. On an H200, timed alone, these products do 4 to 19 % more operations per second
than `torch.nn.functional.grouped_mm` (D and H of 1,024 to 4,096; notebook 15). The oracle is that function, and a loop
over experts.

Operands and results move by tensor descriptors (Hopper's copy engine). Where experts end the engine itself stops, by
ragged descriptors (`triton.tools.ragged_tma`): `outer` reads rows behind an expert's end as zeros; in `product` they
are computed like others, and never written. A tile is stored in two pieces: whole, its numbers in another layout would
not fit into shared memory beside the operands that are on their way, and each piece waits until the one before has left
it.

Tried and not kept: a table of tiles in memory instead of the search in each program (no faster); one barrier for both
operands of `outer` instead of two (no faster); other depths and stages (64 x 3, 32 x 6, 32 x 7, 128 x 2: from 3 %
faster to 60 % slower, by size); products that end in the activation, or in its backward, and so save a pass over memory
(a longer end costs the product more than that: 0.81 and 0.83 of a dense layer instead of 0.86 with an earlier product;
H200, 64 experts, k = 8). One run each, not recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.common import power_of_2
from moe_lab.experts.kernels.tiles import expert_tiles, tile_rows
from moe_lab.triton_support import (
    capability,
    cdiv,
    create_ragged_descriptor,
    jit,
    multiprocessors,
    tl,
    to_ragged_indices,
    usable,
)


@jit
def _store(out, tile, row, stop, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The tile (ROWS, COLUMNS) to rows from row, below stop, and columns from first; out is ragged."""
    if PIECES > 1:
        left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        _store(out, left, row, stop, first, ROWS, COLUMNS // 2, PIECES // 2)
        _store(out, right, row, stop, first + COLUMNS // 2, ROWS, COLUMNS // 2, PIECES // 2)
    else:
        x, y, z = to_ragged_indices(row, stop - row, 0)
        out.store([x, y, z, first], tile.to(out.dtype).reshape(1, 1, ROWS, COLUMNS))


@jit
def _halved_from(n_jobs, n_programs):
    """The tiles before this one run whole, one per program at a time; those of a last round that is at most half full
    are halved, so that it takes about half as long."""
    rest = n_jobs % n_programs
    return tl.where(2 * rest <= n_programs, n_jobs - rest, n_jobs)


@jit
def _product_tile(
    left, right, out, begin, end, through, job,
    TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, N_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, PIECES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of an expert times COLUMNS of its (INNER, WIDTH) matrix, or of a (WIDTH, INNER) transposed."""
    expert, row, stop = tile_rows(begin, end, through, job // N_BLOCKS, ROWS, E_PAD)
    first = job % N_BLOCKS * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(0, INNER, STEP):
        w = right.load([expert * WIDTH + first, d]).T if TRANSPOSED else right.load([expert * INNER + d, first])
        total = tl.dot(left.load([row, d]), w, total)
    _store(out, total, row, stop, first, ROWS, COLUMNS, PIECES)


@jit
def _product_kernel(
    left, right, half, ends, out, n, n_experts, n_programs,
    TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, PIECES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    begin, end, through = expert_tiles(ends, n, n_experts, ROWS, E_PAD)
    n_jobs = tl.max(through, 0) * N_BLOCKS
    n_whole = _halved_from(n_jobs, n_programs)
    for job in tl.range(tl.program_id(0), n_whole, n_programs, flatten=True):
        _product_tile(
            left, right, out, begin, end, through, job,
            TRANSPOSED, WIDTH, INNER, N_BLOCKS, ROWS, COLUMNS, STEP, PIECES, E_PAD,
        )  # fmt: skip
    for job in tl.range(2 * n_whole + tl.program_id(0), 2 * n_jobs, n_programs):
        _product_tile(
            left, half, out, begin, end, through, job,
            TRANSPOSED, WIDTH, INNER, 2 * N_BLOCKS, ROWS, COLUMNS // 2, STEP, PIECES // 2, E_PAD,
        )  # fmt: skip


@jit
def _outer_tile(
    left, right, ends, out, job,
    A: tl.constexpr, A_BLOCKS: tl.constexpr, B_BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS of one expert's (A, B); programs that run at once share its rows."""
    TILES: tl.constexpr = A_BLOCKS * B_BLOCKS
    expert, a, b = job // TILES, job % TILES // B_BLOCKS * ROWS, job % B_BLOCKS * COLUMNS
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    count = tl.load(ends + expert) - begin
    n_steps = tl.maximum((count + STEP - 1) // STEP, 1)  # without rows: one step of zeros
    tl.assume(n_steps > 0)  # or the loops are not flattened
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, n_steps):
        x, y, z = to_ragged_indices(begin, count, step * STEP)
        of_left = left.load([x, y, z, a]).reshape(STEP, ROWS)
        total = tl.dot(of_left.T, right.load([x, y, z, b]).reshape(STEP, COLUMNS), total)
    _store(out, total, expert * A + a, expert * A + A, b, ROWS, COLUMNS, PIECES)


@jit
def _outer_kernel(
    left, right, half, ends, out, n_experts, n_programs,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    A_BLOCKS: tl.constexpr = (A + ROWS - 1) // ROWS
    B_BLOCKS: tl.constexpr = (B + COLUMNS - 1) // COLUMNS
    n_jobs = n_experts * A_BLOCKS * B_BLOCKS
    n_whole = _halved_from(n_jobs, n_programs)
    for job in tl.range(tl.program_id(0), n_whole, n_programs, flatten=True):
        _outer_tile(left, right, ends, out, job, A, A_BLOCKS, B_BLOCKS, ROWS, COLUMNS, STEP, PIECES)
    for job in tl.range(2 * n_whole + tl.program_id(0), 2 * n_jobs, n_programs):
        _outer_tile(left, half, ends, out, job, A, A_BLOCKS, 2 * B_BLOCKS, ROWS, COLUMNS // 2, STEP, PIECES // 2)


def _runs(rows: Tensor, others: Tensor, *widths: int) -> bool:
    """On Hopper, 16-bit numbers, rows of whole multiples of 16 bytes that begin at such, at least one row.

    On other cards the tiles may not fit into shared memory, and nobody has measured.
    """
    if create_ragged_descriptor is None or not usable(rows) or not len(rows) or rows.dtype.itemsize != 2:
        return False
    if any(width % 8 for width in widths):
        return False
    if not torch.compiler.is_compiling() and (rows.data_ptr() % 16 or others.data_ptr() % 16):
        return False  # a view into something larger; torch.compile knows no addresses, see `_aligned`
    if rows.device.type != "cuda":
        return rows.dtype != torch.bfloat16  # which the interpreter cannot multiply
    return capability(rows.device)[0] == 9


def product_runs(rows: Tensor, weight: Tensor, transposed: bool = False) -> bool:
    """`product` can run, see `_runs`.

    The depth of a product with W_e itself must be a multiple of the tile's, or a step would reach into the next
    expert's weights.
    """
    whole = transposed or rows.shape[1] % tuning.PRODUCTS["product"].depth == 0
    return whole and _runs(rows, weight, *weight.shape[1:])


def outer_runs(left: Tensor, right: Tensor) -> bool:
    """`outer` can run, see `_runs`."""
    return _runs(left, right, left.shape[1], right.shape[1])


def _described(matrix: Tensor, *block: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def _programs(device: torch.device, size: tuning.Product, n_jobs: int) -> int:
    return min(multiprocessors(device) * size.programs, 2 * n_jobs)  # all may be halves


def _launch(size: tuning.Product) -> dict[str, int | None]:
    return {"num_warps": size.warps, "num_stages": size.stages, "maxnreg": size.registers}


def product(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """rows @ W_e, or rows @ W_e^T if ``transposed``; sums in float32.

    Args:
        rows: (N, A) in expert order, contiguous; see `product_runs`.
        weight: (E, A, B), or (E, B, A) if transposed; contiguous.
        ends: (E,) int32, see `expert_order`. Rows behind the last change nothing, and are not written in the result.

    Returns:
        (N, B) in rows' dtype.
    """
    return (_product_op if torch.compiler.is_compiling() else _product)(rows, weight, ends, transposed)


def _product(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    size, (n, inner), n_experts = tuning.PRODUCTS["product"], rows.shape, len(weight)
    width = weight.shape[1 if transposed else 2]
    out = rows.new_empty(n, width)
    n_jobs = (n // size.rows + n_experts) * cdiv(width, size.columns)  # at most
    n_programs = _programs(rows.device, size, n_jobs)
    matrix, columns = weight.flatten(0, 1), (size.columns, size.columns // 2)
    blocks = [(wide, size.depth) if transposed else (size.depth, wide) for wide in columns]
    _product_kernel[(n_programs,)](
        _described(rows, size.rows, size.depth), *(_described(matrix, *block) for block in blocks), ends,
        create_ragged_descriptor(out, [size.rows, size.columns // size.pieces]), n, n_experts, n_programs,
        TRANSPOSED=transposed, WIDTH=width, INNER=inner, ROWS=size.rows, COLUMNS=size.columns, STEP=size.depth,
        PIECES=size.pieces, E_PAD=power_of_2(n_experts, 2), **_launch(size),
    )  # fmt: skip
    return out


def outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left^T right over the rows of each expert, 0 for one without rows; sums in float32.

    Args:
        left, right: (N, A), (N, B) in expert order, contiguous; see `outer_runs`.
        ends: (E,) int32, see `expert_order`. Rows behind the last are not read.

    Returns:
        (E, A, B) in left's dtype.
    """
    return (_outer_op if torch.compiler.is_compiling() else _outer)(left, right, ends)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    size, n_experts, (a, b) = tuning.PRODUCTS["outer"], len(ends), (left.shape[1], right.shape[1])
    out = left.new_empty(n_experts, a, b)
    n_jobs = n_experts * cdiv(a, size.rows) * cdiv(b, size.columns)
    n_programs = _programs(left.device, size, n_jobs)
    _outer_kernel[(n_programs,)](
        create_ragged_descriptor(left, [size.depth, size.rows]),
        create_ragged_descriptor(right, [size.depth, size.columns]),
        create_ragged_descriptor(right, [size.depth, size.columns // 2]), ends,
        create_ragged_descriptor(out.flatten(0, 1), [size.rows, size.columns // size.pieces]), n_experts, n_programs,
        A=a, B=b, ROWS=size.rows, COLUMNS=size.columns, STEP=size.depth, PIECES=size.pieces, **_launch(size),
    )  # fmt: skip
    return out


def _aligned(matrix: Tensor) -> Tensor:
    return matrix.clone() if matrix.data_ptr() % 16 else matrix


# torch.compile cannot look into descriptors that are not made by its own rules: for it, each is one operation.
@torch.library.custom_op("moe_lab::grouped_product", mutates_args=())
def _product_op(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return _product(_aligned(rows), _aligned(weight), ends, transposed)


@torch.library.custom_op("moe_lab::grouped_outer", mutates_args=())
def _outer_op(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return _outer(_aligned(left), _aligned(right), ends)


@_product_op.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1 if transposed else 2])


@_outer_op.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
