"""Triton kernels of the fast path (`fast`), each with its oracle in plain torch beside it.

Legend: T tokens, E experts, N routed (token, expert) pairs, D a row's width, H hidden width, K pairs per token.

Pairs are numbered token by token; pair m of expert e lives in row ``place[m]`` of the expert order. Which pairs a
token has is called ``slots``: the integer K (token t has pairs tK .. tK + K - 1), or a tensor (T + 1,) of starts.

    expert_order        a counting sort: place of each pair, where experts end, weights in expert order
    scatter_rows        out[place[m]] = x[token of m]
    sum_rows            y[t] = sum over the token's pairs of rows[place[m]], added in float32
    activate            a = g * act(h + b_e)
    activate_backward   dh = g * act'(h + b_e) * da,  dg = <act(h + b_e), da>,  db_e = sum of dh over the rows of e

    hidden              h = X W_e and activate, in one grouped product
    hidden_gradient     da = G W_e^T and activate_backward, in one grouped product that does not write da

`sum_rows` is the transpose of `scatter_rows`, so these two also do each other's backward. Both walk over *tokens*: a
token's row is read (written) once and its K copies written (read), (1 + K) T D numbers instead of the 2 K T D of a
gather that walks over rows. No kernel uses atomics: the same input gives the same bits.

Triton runs the kernels on CUDA, and on a CPU if TRITON_INTERPRET=1 was set before this module was imported (slow, for
tests). Elsewhere, and in float64, the oracles run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch comes without it
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ACTIVATIONS = ("relu", "gelu", "tanh")
Slots = int | Tensor


@dataclass(frozen=True)
class Blocks:
    """What a program handles at a time, ``rows`` x ``columns`` numbers (powers of 2), and its warps of 32 threads."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Product(Blocks):
    """The tile of a product: ``depth`` of its inner dimension at a time, ``stages`` of them in flight.

    ``registers`` a thread at most: with 128, two programs of 8 warps fit on a multiprocessor; None: no limit.
    """

    depth: int
    stages: int
    registers: int | None


# What there is to tune: python -m moe_lab.bench.gpu_cases --tune. None of it changes a result beyond the order of sums.
BLOCKS = {
    "scatter_rows": Blocks(4, 512, 4),
    "sum_rows": Blocks(4, 512, 4),
    "activate": Blocks(16, 256, 4),
    "activate_backward": Blocks(16, 256, 8),
}
TILE = 128  # rows of one expert that a program of the activation kernels walks over, BLOCKS rows at a time
PRODUCTS = dict.fromkeys(("hidden", "hidden_gradient"), Product(128, 128, 8, depth=64, stages=3, registers=128))
MOST_UNROLLED = 16  # pairs per token; over more, the loop is not unrolled


def usable(x: Tensor) -> bool:
    """Triton can run on x: there, on this device, in this dtype."""
    if triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.device.type == "cuda":
        return x.device.index == torch.cuda.current_device()  # kernels start on the current device
    return x.device.type == "cpu" and INTERPRETED


def _jit(function):
    return function if triton is None else triton.jit(function)


def _power_of_2(n: int, least: int = 1) -> int:
    return max(1 << max(n - 1, 0).bit_length(), least)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Order: a stable counting sort. Blocks of pairs count their experts; cumulated, the counts say where each block's pairs
# of each expert begin; then every pair finds its rank within its block.


@_jit
def _count_kernel(expert, counts, n, n_experts, n_blocks, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + pair, mask=pair < n, other=E_PAD)
    hit = (chosen[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts + e * n_blocks + block, tl.sum(hit, 0), mask=e < n_experts)


@_jit
def _place_kernel(
    expert, value, before, place, sorted_value, n, n_experts, n_blocks, BLOCK: tl.constexpr, E_PAD: tl.constexpr
):
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + pair, mask=pair < n, other=E_PAD)
    hit = (chosen[:, None] == e[None, :]).to(tl.int32)
    first = tl.load(before + e * n_blocks + block, mask=e < n_experts, other=0)
    row = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + first[None, :]), 1)
    tl.store(place + pair, row, mask=pair < n)
    tl.store(sorted_value + row, tl.load(value + pair, mask=pair < n), mask=pair < n)


def expert_order_oracle(expert: Tensor, value: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_order` with torch's sort."""
    by_expert, order = expert.sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(by_expert, torch.arange(n_experts, device=order.device), right=True)
    return place.int(), ends.int(), value.index_select(0, order)


def expert_order(expert: Tensor, value: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pair goes when pairs are sorted by expert, those of one expert in their old order.

    Args:
        expert: (N,) integers, all in 0 .. E - 1 (not checked: that would wait for the device).
        value: (N,) any number per pair.
        n_experts: E.

    Returns:
        place (N,) int32; ends (E,) int32, one past the last row of each expert; value in expert order, (N,).
    """
    n = expert.shape[0]
    if not n or not usable(value):
        return expert_order_oracle(expert, value, n_experts)
    e_pad = _power_of_2(n_experts, 2)
    block = min(max(16384 // e_pad, 16), 256)
    n_blocks = triton.cdiv(n, block)
    counts = torch.empty(n_experts, n_blocks, dtype=torch.int32, device=expert.device)
    sizes = (n, n_experts, n_blocks, block, e_pad)
    _count_kernel[(n_blocks,)](expert, counts, *sizes)
    through = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    place = torch.empty(n, dtype=torch.int32, device=expert.device)
    sorted_value = torch.empty_like(value)
    _place_kernel[(n_blocks,)](expert, value, through - counts, place, sorted_value, *sizes)
    return place, through[:, -1].contiguous(), sorted_value


# Rows: to the expert order, and back.


@_jit
def _row_tile(rows, place, pair, live, c, width):
    """Rows ``place[pair]``, columns c: their addresses and which of them exist."""
    row = tl.load(place + pair, mask=live, other=0).to(tl.int64)
    return rows + row[:, None] * width + c[None, :], live[:, None] & (c < width)[None, :]


@_jit
def _scatter_kernel(x, place, starts, out, n_tokens, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = t < n_tokens
    inside = live[:, None] & (c < width)[None, :]
    tile = tl.load(x + t[:, None].to(tl.int64) * width + c[None, :], mask=inside)
    if K > 0:
        for j in tl.static_range(K):
            to, there = _row_tile(out, place, t * K + j, live, c, width)
            tl.store(to, tile, mask=there)
    else:
        start = tl.load(starts + t, mask=live, other=0)
        count = tl.load(starts + t + 1, mask=live, other=0) - start
        most = tl.max(count, 0)
        j = 0
        while j < most:
            to, there = _row_tile(out, place, start + j, j < count, c, width)
            tl.store(to, tile, mask=there)
            j += 1


@_jit
def _sum_kernel(rows, place, starts, out, n_tokens, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = t < n_tokens
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if K > 0:
        for j in tl.static_range(K):
            at, there = _row_tile(rows, place, t * K + j, live, c, width)
            total += tl.load(at, mask=there, other=0.0).to(tl.float32)
    else:
        start = tl.load(starts + t, mask=live, other=0)
        count = tl.load(starts + t + 1, mask=live, other=0) - start
        most = tl.max(count, 0)
        j = 0
        while j < most:
            at, there = _row_tile(rows, place, start + j, j < count, c, width)
            total += tl.load(at, mask=there, other=0.0).to(tl.float32)
            j += 1
    inside = live[:, None] & (c < width)[None, :]
    tl.store(out + t[:, None].to(tl.int64) * width + c[None, :], total.to(out.dtype.element_ty), mask=inside)


def _tokens_of_pairs(slots: Slots, n: int, device: torch.device) -> Tensor:
    pairs = torch.arange(n, device=device)
    return pairs // slots if isinstance(slots, int) else torch.searchsorted(slots[1:], pairs, right=True)


def scatter_rows_oracle(x: Tensor, place: Tensor, slots: Slots) -> Tensor:
    """`scatter_rows` with two indexed copies."""
    rows = x.index_select(0, _tokens_of_pairs(slots, len(place), x.device))
    return torch.empty_like(rows).index_copy_(0, place.long(), rows)


def sum_rows_oracle(rows: Tensor, place: Tensor, slots: Slots, n_tokens: int) -> Tensor:
    """`sum_rows` with index_add."""
    tokens = _tokens_of_pairs(slots, len(place), rows.device)
    total = rows.new_zeros(n_tokens, rows.shape[1], dtype=_precise(rows.dtype))
    return total.index_add_(0, tokens, rows.index_select(0, place).to(total.dtype)).to(rows.dtype)


def _launch_rows(kernel, name: str, source: Tensor, place: Tensor, slots: Slots, out: Tensor, n_tokens: int) -> Tensor:
    if out.numel() == 0:
        return out
    if isinstance(slots, int) and slots > MOST_UNROLLED:
        slots = torch.arange(n_tokens + 1, dtype=torch.int32, device=place.device) * slots
    blocks, width = BLOCKS[name], out.shape[1]
    columns = min(blocks.columns, _power_of_2(width))
    k, starts = (slots, place) if isinstance(slots, int) else (0, slots)  # with K the starts are not read
    grid = (triton.cdiv(n_tokens, blocks.rows), triton.cdiv(width, columns))
    kernel[grid](source, place, starts, out, n_tokens, width, k, blocks.rows, columns, num_warps=blocks.warps)
    return out


def scatter_rows(x: Tensor, place: Tensor, slots: Slots) -> Tensor:
    """x (T, D) -> (N, D): every pair's copy of its token's row, in expert order."""
    x = x.contiguous()
    if not usable(x):
        return scatter_rows_oracle(x, place, slots)
    out = x.new_empty(place.shape[0], x.shape[1])
    return _launch_rows(_scatter_kernel, "scatter_rows", x, place, slots, out, x.shape[0])


def sum_rows(rows: Tensor, place: Tensor, slots: Slots, n_tokens: int) -> Tensor:
    """rows (N, D) in expert order -> (T, D): added up per token; 0 for a token without pairs."""
    rows = rows.contiguous()
    if not usable(rows):
        return sum_rows_oracle(rows, place, slots, n_tokens)
    out = rows.new_empty(n_tokens, rows.shape[1])
    return _launch_rows(_sum_kernel, "sum_rows", rows, place, slots, out, n_tokens)


# Activation: bias, act and weight in one pass, and all their gradients in another.


@_jit
def _act_and_slope(z, ACT: tl.constexpr):
    """act(z) and act'(z); the compiler drops the one that is not used."""
    if ACT == "relu":
        a = tl.where(z <= 0, 0.0, z)  # NaN stays NaN
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif ACT == "gelu":
        # Abramowitz and Stegun 7.1.26 for the normal tail: within 1e-7, one exponential for value and slope together,
        # and half of erf's instructions, with which this kernel would wait for arithmetic instead of memory.
        bell = tl.exp(-0.5 * z * z)
        t = 1 / (1 + 0.23164189 * tl.abs(z))
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))) * bell
        phi = tl.where(z < 0, tail, 1 - tail)
        a = z * phi
        slope = phi + z * bell * 0.3989422804014327
    else:
        a = 2 * tl.sigmoid(2 * z) - 1
        slope = 1 - a * a
    return a, slope


@_jit
def _tile_rows(ends, tile, n, n_experts, TILE_ROWS: tl.constexpr, E_PAD: tl.constexpr):
    """The expert, first row and end of a tile. Tiles belong to one expert each; behind the last come empty ones."""
    e = tl.arange(0, E_PAD)
    end = tl.load(ends + e, mask=e < n_experts, other=n)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    begin = tl.where(e < n_experts, begin, n)
    tiles = (end - begin + TILE_ROWS - 1) // TILE_ROWS
    through = tl.cumsum(tiles, 0)
    mine = (tile < through) & (tile >= through - tiles)
    row = tl.sum(tl.where(mine, begin + (tile - through + tiles) * TILE_ROWS, 0), 0)
    stop = tl.minimum(row + TILE_ROWS, tl.sum(tl.where(mine, end, 0), 0))
    return tl.sum(tl.where(mine, e, 0), 0), row, stop


@_jit
def _activate_kernel(
    h, bias, value, ends, out, n, width, n_experts,
    ACT: tl.constexpr, BIAS: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    E_PAD: tl.constexpr,
):  # fmt: skip
    expert, row, stop = _tile_rows(ends, tl.program_id(0), n, n_experts, TILE_ROWS, E_PAD)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + expert * width + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    for done in range(0, TILE_ROWS, ROWS):
        r = row + done + tl.arange(0, ROWS)
        inside = (r < stop)[:, None] & (c < width)[None, :]
        at = r[:, None].to(tl.int64) * width + c[None, :]
        z = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
        g = tl.load(value + r, mask=r < stop, other=0.0)
        a, _ = _act_and_slope(z, ACT)
        tl.store(out + at, (g[:, None] * a).to(out.dtype.element_ty), mask=inside)


@_jit
def _activate_backward_kernel(
    h, bias, value, ends, grad, again, grad_value, grad_bias, tile_expert, n, width, n_experts,
    ACT: tl.constexpr, BIAS: tl.constexpr, AGAIN: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    expert, row, stop = _tile_rows(ends, tile, n, n_experts, TILE_ROWS, E_PAD)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + expert * width + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, TILE_ROWS, ROWS):
        r = row + done + tl.arange(0, ROWS)
        inside = (r < stop)[:, None] & (c < width)[None, :]
        at = r[:, None].to(tl.int64) * width + c[None, :]
        z = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
        g = tl.load(value + r, mask=r < stop, other=0.0)
        da = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        a, slope = _act_and_slope(z, ACT)
        dh = g[:, None] * slope * da
        tl.store(grad + at, dh.to(grad.dtype.element_ty), mask=inside)
        tl.store(grad_value + r * tl.num_programs(1) + block, tl.sum(a * da, 1), mask=r < stop)
        if AGAIN:
            tl.store(again + at, (g[:, None] * a).to(again.dtype.element_ty), mask=inside)
        if BIAS:
            total += dh
    if BIAS:
        tl.store(grad_bias + tile * width + c, tl.sum(total, 0), mask=c < width)
        tl.store(tile_expert + tile, expert, mask=block == 0)


def _experts_of_rows(ends: Tensor, n: int) -> Tensor:
    return torch.searchsorted(ends, torch.arange(n, device=ends.device, dtype=ends.dtype), right=True)


def _with_bias(h: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    z = h.to(_precise(h.dtype))
    return z if bias is None else z + bias.index_select(0, _experts_of_rows(ends, len(h))).to(z.dtype)


def _act_oracle(z: Tensor, activation: str) -> Tensor:
    return torch.tanh(z) if activation == "tanh" else getattr(functional, activation)(z)


def activate_oracle(h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str) -> Tensor:
    """`activate` with torch's functions."""
    return (value[:, None] * _act_oracle(_with_bias(h, bias, ends), activation)).to(h.dtype)


def activate_backward_oracle(
    h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str, grad: Tensor, again: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`activate_backward` with torch's own derivatives."""
    z = _with_bias(h, bias, ends)
    a, da = _act_oracle(z, activation), grad.to(z.dtype)
    da_g = value[:, None] * da
    if activation == "gelu":
        dz = torch.ops.aten.gelu_backward(da_g, z)
    else:
        dz = da_g * (1 - a * a) if activation == "tanh" else torch.ops.aten.threshold_backward(da_g, z, 0)
    grad_bias = None
    if bias is not None:
        grad_bias = torch.zeros_like(bias, dtype=z.dtype).index_add_(0, _experts_of_rows(ends, len(h)), dz)
    return dz.to(h.dtype), (a * da).sum(1), grad_bias, (value[:, None] * a).to(h.dtype) if again else None


def _tiled(name: str, h: Tensor, ends: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the constants of an activation kernel: at most N / TILE full tiles and a partial one each."""
    blocks, (n, width), n_experts = BLOCKS[name], h.shape, ends.shape[0]
    columns = min(blocks.columns, _power_of_2(width))
    constants = {"TILE_ROWS": TILE, "ROWS": blocks.rows, "COLUMNS": columns, "E_PAD": _power_of_2(n_experts, 2)}
    grid = (n // TILE + n_experts, triton.cdiv(width, columns))
    return grid, constants | {"num_warps": blocks.warps}


def _sum_tiles(by_tile: Tensor, tile_expert: Tensor, n_experts: int) -> Tensor:
    """(tiles, H) -> (E, H): added per expert by a small product, so without atomics."""
    of_expert = tile_expert == torch.arange(n_experts, device=by_tile.device)[:, None]
    return of_expert.to(by_tile.dtype) @ by_tile


def activate(h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str) -> Tensor:
    """g * act(h + b_e): bias, activation and the gate's weight in one pass.

    Args:
        h: (N, H) in expert order, contiguous.
        bias: (E, H), contiguous, or None.
        value: (N,) weights g in expert order, float32 (float64 if h is).
        ends: (E,) int32, see `expert_order`.
        activation: of `ACTIVATIONS`; gelu is the exact one.

    Returns:
        (N, H) in h's dtype; computed in float32.
    """
    if not h.numel() or not usable(h):
        return activate_oracle(h, bias, value, ends, activation)
    out = torch.empty_like(h)
    grid, constants = _tiled("activate", h, ends)
    sizes = (*h.shape, ends.shape[0])
    has_bias = bias is not None
    _activate_kernel[grid](
        h, bias if has_bias else h, value, ends, out, *sizes, ACT=activation, BIAS=has_bias, **constants
    )
    return out


def activate_backward(
    h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str, grad: Tensor, again: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All gradients of `activate` in one pass over h and grad.

    Args:
        h, bias, value, ends, activation: as in `activate`.
        grad: (N, H) with respect to its result, contiguous. It may be overwritten.
        again: also compute that result once more, for a caller who did not keep it.

    Returns:
        with respect to h (N, H), value (N,) and bias (E, H), the last two in float32 (None without a bias); and the
        result of `activate`, or None.
    """
    if not h.numel() or not usable(h):
        return activate_backward_oracle(h, bias, value, ends, activation, grad, again)
    grid, constants = _tiled("activate_backward", h, ends)
    n_experts, has_bias = ends.shape[0], bias is not None
    result = torch.empty_like(h) if again else h
    by_block = h.new_empty(h.shape[0], grid[1], dtype=torch.float32)
    by_tile = h.new_empty(grid[0], h.shape[1], dtype=torch.float32) if has_bias else by_block
    tile_expert = torch.empty(grid[0], dtype=torch.int32, device=h.device)
    _activate_backward_kernel[grid](
        h, bias if has_bias else h, value, ends, grad, result, by_block, by_tile, tile_expert, *h.shape, n_experts,
        ACT=activation, BIAS=has_bias, AGAIN=again, **constants,
    )  # fmt: skip
    grad_bias = _sum_tiles(by_tile, tile_expert, n_experts) if has_bias else None
    return grad, by_block.sum(1), grad_bias, result if again else None


# Products that end in the activation. `hidden` saves reading h again; `hidden_gradient` saves writing and reading da,
# whose tile stays in registers. Operands come by tensor descriptors (Hopper's copy engine); rows behind those of the
# tile's expert are computed and thrown away. The tile is finished in quarters: whole, it would not fit into 128
# registers a thread, and with more only one program fits on a multiprocessor, where nothing multiplies meanwhile.


@_jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@_jit
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
    a, _ = _act_and_slope(z.to(tl.float32) + b, ACT)
    tl.store(out + at, (g[:, None] * a).to(out.dtype.element_ty), mask=inside)


@_jit
def _hidden_kernel(
    rows, w1, bias, value, ends, h, out, n, width, n_experts, n_blocks,
    ACT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    STEP: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    expert, row, stop = _tile_rows(ends, tile, n, n_experts, ROWS, E_PAD)
    if row < stop:
        first = block * COLUMNS
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, INNER, STEP):
            z = tl.dot(rows.load([row, d]), w1.load([expert * INNER + d, first]), z)
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


@_jit
def _finish(
    da, first, h, bias, g, grad_h, grad_bias, r, live, width,
    ACT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a tile, beginning at first: stores dh and its sum over rows, returns <act, da> of each row."""
    c = first + tl.arange(0, COLUMNS)
    inside = live[:, None] & (c < width)[None, :]
    at = r[:, None].to(tl.int64) * width + c[None, :]
    b = tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    a, slope = _act_and_slope(tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b, ACT)
    da = tl.where(inside, da, 0.0)
    dh = g[:, None] * slope * da
    tl.store(grad_h + at, dh.to(grad_h.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(grad_bias + c, tl.sum(dh, 0), mask=c < width)
    return tl.sum(a * da, 1)


@_jit
def _hidden_gradient_kernel(
    grad_rows, w2, h, bias, value, ends, grad_h, grad_value, grad_bias, tile_expert,
    n, width, n_experts, n_blocks,
    ACT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    STEP: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    expert, row, stop = _tile_rows(ends, tile, n, n_experts, ROWS, E_PAD)
    if row < stop:
        first = block * COLUMNS
        da = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, INNER, STEP):
            da = tl.dot(grad_rows.load([row, d]), w2.load([expert * width + first, d]).T, da)
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
    if not usable(x) or x.dtype.itemsize != 2 or any(width % 8 for width in widths) or inner % PRODUCTS["hidden"].depth:
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (9, 0)


def _described(matrix: Tensor, *block: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def _product(size: Product, n_experts: int, inner: int) -> dict[str, int | None]:
    """Constants and options of the two product kernels."""
    constants = {"ROWS": size.rows, "COLUMNS": size.columns, "INNER": inner, "STEP": size.depth}
    options = {"num_warps": size.warps, "num_stages": size.stages, "maxnreg": size.registers}
    return constants | options | {"E_PAD": _power_of_2(n_experts, 2)}


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
    size = PRODUCTS["hidden"]
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
    size = PRODUCTS["hidden_gradient"]
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
    return grad_h, by_block.sum(1), _sum_tiles(by_tile, tile_expert, n_experts) if has_bias else None
