"""The order of routed pairs by expert: a stable counting sort, of lists of experts or of a matrix of weights.

Blocks of tokens count their experts; cumulated, the counts say where each block's pairs of each expert begin; then
every pair finds its rank within its block. Three launches: what comes before a step's first product is exposed whenever
the host has just waited. N pairs, T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.experts.kernels.common import power_of_2, precise
from moe_lab.triton_support import cdiv, jit, tl, usable


class Order(NamedTuple):
    """Where routed pairs go.

    Attributes:
        place: (N,) int32, the row of each pair in expert order.
        ends: (E,) int32, one past the last row of each expert.
        value: (N,) the pairs' weights in expert order.
        starts: (T + 1,) int32, where each token's pairs begin; None if all tokens have equally many.
        row: (T, E) int32, the row of each pair of a matrix of weights, -1 where it is 0; None for lists.
    """

    place: Tensor
    ends: Tensor
    value: Tensor
    starts: Tensor | None = None
    row: Tensor | None = None


@jit
def _first_rows(through, block, n_experts, n_blocks, E_PAD: tl.constexpr):
    """Where a block's pairs of each expert begin, from the cumulated counts (expert by expert, block by block)."""
    e = tl.arange(0, E_PAD)
    at = e * n_blocks + block
    return tl.load(through + at - 1, mask=(e < n_experts) & (at > 0), other=0)


@jit
def _store_ends(through, ends, block, n_experts, n_blocks, E_PAD: tl.constexpr):
    e = tl.arange(0, E_PAD)
    end = tl.load(through + e * n_blocks + n_blocks - 1, mask=e < n_experts, other=0)
    tl.store(ends + e, end, mask=(e < n_experts) & (block == 0))


@jit
def _count_kernel(expert, counts, n, n_experts, n_blocks, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + pair, mask=pair < n, other=E_PAD)
    hit = (chosen[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts + e * n_blocks + block, tl.sum(hit, 0), mask=e < n_experts)


@jit
def _place_kernel(
    expert, value, through, place, ends, sorted_value, n, n_experts, n_blocks, BLOCK: tl.constexpr, E_PAD: tl.constexpr
):
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + pair, mask=pair < n, other=E_PAD)
    hit = (chosen[:, None] == e[None, :]).to(tl.int32)
    first = _first_rows(through, block, n_experts, n_blocks, E_PAD)
    row = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + first[None, :]), 1)
    tl.store(place + pair, row, mask=pair < n)
    tl.store(sorted_value + row, tl.load(value + pair, mask=pair < n), mask=pair < n)
    _store_ends(through, ends, block, n_experts, n_blocks, E_PAD)


@jit
def _pattern(weights, block, n_tokens, n_experts, MOST: tl.constexpr, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    """A block of tokens: their numbers, which weights exist, the weights, and the pairs (at most MOST of a token)."""
    t, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E_PAD)
    inside = (t < n_tokens)[:, None] & (e < n_experts)[None, :]
    w = tl.load(weights + t[:, None].to(tl.int64) * n_experts + e[None, :], mask=inside, other=0.0)
    hit = (w != 0).to(tl.int32)
    kept = tl.where(tl.cumsum(hit, 1) <= MOST, hit, 0)
    return t, inside, tl.where((tl.sum(hit, 1) > MOST)[:, None], float("nan"), w), kept


@jit
def _count_pattern_kernel(
    weights, counts, n_tokens, n_experts, n_blocks, MOST: tl.constexpr, BLOCK: tl.constexpr, E_PAD: tl.constexpr
):
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    _, _, _, kept = _pattern(weights, block, n_tokens, n_experts, MOST, BLOCK, E_PAD)
    tl.store(counts + e * n_blocks + block, tl.sum(kept, 0), mask=e < n_experts)


@jit
def _place_pattern_kernel(
    weights, through, place, ends, sorted_value, starts, rows, n_tokens, n_experts, n_blocks,
    MOST: tl.constexpr, BLOCK: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    t, inside, w, kept = _pattern(weights, block, n_tokens, n_experts, MOST, BLOCK, E_PAD)
    first = _first_rows(through, block, n_experts, n_blocks, E_PAD)
    row = first[None, :] + tl.cumsum(kept, 0) - 1
    count = tl.sum(kept, 1)
    earlier = tl.sum(first - _first_rows(through, 0, n_experts, n_blocks, E_PAD), 0)  # pairs of earlier blocks
    end = earlier + tl.cumsum(count, 0)
    pair = (end - count)[:, None] + tl.cumsum(kept, 1) - 1
    tl.store(place + pair, row, mask=kept > 0)
    tl.store(sorted_value + row, w.to(sorted_value.dtype.element_ty), mask=kept > 0)
    tl.store(rows + t[:, None].to(tl.int64) * n_experts + e[None, :], tl.where(kept > 0, row, -1), mask=inside)
    tl.store(starts + t + 1, end, mask=t < n_tokens)
    tl.store(starts + t, 0, mask=t == 0)
    _store_ends(through, ends, block, n_experts, n_blocks, E_PAD)


def expert_order_oracle(expert: Tensor, value: Tensor, n_experts: int) -> Order:
    """`expert_order` with torch's sort."""
    by_expert, order = expert.sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(by_expert, torch.arange(n_experts, device=order.device), right=True)
    return Order(place.int(), ends.int(), value.index_select(0, order))


def expert_order(expert: Tensor, value: Tensor, n_experts: int) -> Order:
    """Where each pair goes when pairs are sorted by expert, those of one expert in their old order.

    Args:
        expert: (N,) integers, all in 0 .. E - 1 (not checked: that would wait for the device).
        value: (N,) any number per pair.
        n_experts: E.
    """
    n = expert.shape[0]
    if not n or not usable(value):
        return expert_order_oracle(expert, value, n_experts)
    e_pad = power_of_2(n_experts, 2)
    block = min(max(16384 // e_pad, 16), 256)
    n_blocks = cdiv(n, block)
    sizes = (n, n_experts, n_blocks, block, e_pad)
    counts = torch.empty(n_experts, n_blocks, dtype=torch.int32, device=value.device)
    _count_kernel[(n_blocks,)](expert, counts, *sizes)
    through = counts.view(-1).cumsum(0, dtype=torch.int32)
    order = _empty_order(n, n_experts, value)
    _place_kernel[(n_blocks,)](expert, value, through, order.place, order.ends, order.value, *sizes)
    return order


def _empty_order(n: int, n_experts: int, value: Tensor) -> Order:
    ints = {"dtype": torch.int32, "device": value.device}
    return Order(torch.empty(n, **ints), torch.empty(n_experts, **ints), value.new_empty(n, dtype=precise(value.dtype)))


def pattern_order_oracle(weights: Tensor, most: int | None = None) -> Order:
    """`pattern_order` with torch's functions."""
    hit = weights != 0
    if most is not None:
        weights = weights.masked_fill(hit.sum(1, keepdim=True) > most, torch.nan)
        hit &= hit.cumsum(1) <= most
    flat = hit.flatten().nonzero().squeeze(1)
    value = weights.flatten().index_select(0, flat).to(precise(weights.dtype))
    order = expert_order_oracle(flat % weights.shape[1], value, weights.shape[1])
    starts = functional.pad(hit.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    row = torch.full(weights.shape, -1, dtype=torch.int32, device=weights.device)
    row.view(-1).index_copy_(0, flat, order.place)
    return order._replace(starts=starts, row=row)


def pattern_order(weights: Tensor, most: int | None = None) -> Order:
    """`expert_order` of the non-zeros of a matrix; pairs are numbered token by token.

    Args:
        weights: (T, E); NaN is not zero.
        most: no row has more non-zeros than this. Then ``place`` and ``value`` have T min(most, E) entries where Triton
            runs, of which only the first N say anything (``starts`` and ``ends`` say how many), and nothing waits for
            the device. A row with more keeps its first, and their values become NaN: raising an error would mean
            waiting. None: N is read from the device.
    """
    n_tokens, n_experts = weights.shape
    if not weights.numel() or not usable(weights):
        return pattern_order_oracle(weights, most)
    weights, e_pad = weights.contiguous(), power_of_2(n_experts, 2)
    block = min(max(2048 // e_pad, 8), 128)
    n_blocks, bound = cdiv(n_tokens, block), n_experts if most is None else min(most, n_experts)
    sizes = (n_tokens, n_experts, n_blocks, bound, block, e_pad)
    counts = torch.empty(n_experts, n_blocks, dtype=torch.int32, device=weights.device)
    starts = torch.empty(n_tokens + 1, dtype=torch.int32, device=weights.device)
    row = torch.empty(n_tokens, n_experts, dtype=torch.int32, device=weights.device)
    _count_pattern_kernel[(n_blocks,)](weights, counts, *sizes)
    through = counts.view(-1).cumsum(0, dtype=torch.int32)
    n = int(through[-1]) if most is None else n_tokens * bound
    order = _empty_order(n, n_experts, weights)
    _place_pattern_kernel[(n_blocks,)](weights, through, *order[:3], starts, row, *sizes)
    return order._replace(starts=starts, row=row)
