"""Tiles: rows in expert order, cut so that a tile's rows belong to one expert.

Where experts end is known on the device only, so the grid has as many tiles as there can be: N / TILE full ones and a
partial one per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.triton_support import jit, tl


@jit
def tile_rows(ends, tile, n, n_experts, TILE_ROWS: tl.constexpr, E_PAD: tl.constexpr):
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


def experts_of_rows(ends: Tensor, n: int) -> Tensor:
    """(N,): the expert of each row."""
    return torch.searchsorted(ends, torch.arange(n, device=ends.device, dtype=ends.dtype), right=True)


def sum_tiles(by_tile: Tensor, tile_expert: Tensor, n_experts: int) -> Tensor:
    """(tiles, H) -> (E, H): added per expert by a small product, so without atomics."""
    of_expert = tile_expert == torch.arange(n_experts, device=by_tile.device)[:, None]
    return of_expert.to(by_tile.dtype) @ by_tile
