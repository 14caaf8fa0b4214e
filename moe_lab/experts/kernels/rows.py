"""Rows: copied to the expert order (`scatter_rows`), and added up per token on the way back (`sum_rows`).

N routed pairs, T tokens, D a row's width, K pairs per token. Each is the other's transpose and does its backward. Both
walk over *tokens*: a token's row is read (written) once and its K copies written (read), (1 + K) T D numbers instead of
the 2 K T D of a gather that walks over rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.common import Slots, power_of_2, precise
from moe_lab.triton_support import cdiv, jit, tl, usable

MOST_UNROLLED = 16  # pairs per token; over more, the loop is not unrolled


@jit
def _row_tile(rows, place, pair, live, c, width):
    """Rows ``place[pair]``, columns c: their addresses and which of them exist."""
    row = tl.load(place + pair, mask=live, other=0).to(tl.int64)
    return rows + row[:, None] * width + c[None, :], live[:, None] & (c < width)[None, :]


@jit
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


@jit
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
        for first in range(0, most, 4):  # four at once: one by one, each would wait for the one before
            for j in tl.static_range(4):
                at, there = _row_tile(rows, place, start + first + j, first + j < count, c, width)
                total += tl.load(at, mask=there, other=0.0).to(tl.float32)
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
    total = rows.new_zeros(n_tokens, rows.shape[1], dtype=precise(rows.dtype))
    return total.index_add_(0, tokens, rows.index_select(0, place).to(total.dtype)).to(rows.dtype)


def _launch_rows(kernel, name: str, source: Tensor, place: Tensor, slots: Slots, out: Tensor, n_tokens: int) -> Tensor:
    if out.numel() == 0:
        return out
    if isinstance(slots, int) and slots > MOST_UNROLLED:
        slots = torch.arange(n_tokens + 1, dtype=torch.int32, device=place.device) * slots
    blocks, width = tuning.BLOCKS[name], out.shape[1]
    columns = min(blocks.columns, power_of_2(width))
    k, starts = (slots, place) if isinstance(slots, int) else (0, slots)  # with K the starts are not read
    grid = (cdiv(n_tokens, blocks.rows), cdiv(width, columns))
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
