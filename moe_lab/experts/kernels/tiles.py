"""Tiles: rows in expert order, cut so that a tile's rows belong to one expert.

Where experts end is known on the device only, so the grid has as many tiles as there can be: N / TILE full ones and a
partial one per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.triton_support import jit, tl


@jit
def expert_tiles(ends, n, n_experts, TILE_ROWS: tl.constexpr, E_PAD: tl.constexpr):
    """(E_PAD,) each: an expert's first row, its end, its tiles and all before. Behind the last: none."""
    e = tl.arange(0, E_PAD)
    end = tl.load(ends + e, mask=e < n_experts, other=n)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    begin = tl.where(e < n_experts, begin, n)
    return begin, end, tl.cumsum((end - begin + TILE_ROWS - 1) // TILE_ROWS, 0)


@jit
def tile_rows(begin, end, through, tile, TILE_ROWS: tl.constexpr, E_PAD: tl.constexpr):
    """The expert, first row and end of a tile; the first three of `expert_tiles`. Behind the last come empty ones."""
    before = through - (end - begin + TILE_ROWS - 1) // TILE_ROWS
    mine = (tile < through) & (tile >= before)
    row = tl.sum(tl.where(mine, begin + (tile - before) * TILE_ROWS, 0), 0)
    stop = tl.minimum(row + TILE_ROWS, tl.sum(tl.where(mine, end, 0), 0))
    return tl.sum(tl.where(mine, tl.arange(0, E_PAD), 0), 0), row, stop


def experts_of_rows(ends: Tensor, n: int) -> Tensor:
    """(N,): the expert of each row."""
    return torch.searchsorted(ends, torch.arange(n, device=ends.device, dtype=ends.dtype), right=True)


def sum_tiles(by_tile: Tensor, tile_expert: Tensor, n_experts: int) -> Tensor:
    """(tiles, H) -> (E, H): added per expert by a small product, so without atomics."""
    of_expert = tile_expert == torch.arange(n_experts, device=by_tile.device)[:, None]
    return of_expert.to(by_tile.dtype) @ by_tile
