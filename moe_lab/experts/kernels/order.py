"""The order of routed pairs by expert: a stable counting sort.

Blocks of pairs count their experts; cumulated, the counts say where each block's pairs of each expert begin; then every
pair finds its rank within its block. N pairs, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.kernels.common import power_of_2
from moe_lab.triton_support import jit, tl, triton, usable


@jit
def _count_kernel(expert, counts, n, n_experts, n_blocks, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + pair, mask=pair < n, other=E_PAD)
    hit = (chosen[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts + e * n_blocks + block, tl.sum(hit, 0), mask=e < n_experts)


@jit
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
    e_pad = power_of_2(n_experts, 2)
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
