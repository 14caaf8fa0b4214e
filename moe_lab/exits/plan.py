"""How many rows will a block need? Decided before a batch begins, so that nobody has to wait for the answer.

Legend: N samples of a batch, L exits.

    s_l        share of samples that are still inside at block l, from samples seen before; s_0 = 1
    room_l     N s_l + z sqrt(N s_l (1 - s_l)), at most N: the binomial mean, and z standard deviations for safety

Rows are taken out in front of block l only if at least a share ``compact_from`` of the rows becomes free; otherwise
rows that have left are carried along, which costs time and changes no answer. Samples for which there is no room (with
z = 3 and samples of the same kind: less than one batch in a hundred) must be answered again, by `FastPredictor`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def shares_inside(exits: Tensor, n_exits: int) -> tuple[float, ...]:
    """(L,) share of samples that block l must see: 1, then never rising and never 0.

    Args:
        exits: (M,) int64, 0 .. L - 1, of at least one sample.
        n_exits: L.

    Returns:
        (m_l + 1) / (M + 1), where m_l samples leave at exit l or later: one sample more than was seen, so that a few
        samples do not promise that nobody ever stays.

    Raises:
        ValueError: no sample.
    """
    if not len(exits):
        raise ValueError("shares need the exits of at least one sample")
    leaving = torch.bincount(exits.cpu(), minlength=n_exits)
    inside = leaving.flip(0).cumsum(0).flip(0)
    return tuple(((inside + 1).double() / (len(exits) + 1)).tolist())


def plan_rows(shares: Sequence[float], n: int, compact_from: float, spread: float = 3.0) -> tuple[int, ...]:
    """(L,) rows of each block, from N downwards.

    Args:
        shares: of `shares_inside`.
        n: N, at least 1.
        compact_from: least share of rows that must become free; in [0, 1]. With 1 all are carried to the end.
        spread: z, at least 0.

    Raises:
        ValueError: a number outside its range; shares that rise or do not begin with 1.
    """
    if n < 1 or spread < 0 or not 0 <= compact_from <= 1:
        raise ValueError(f"need n >= 1, spread >= 0, compact_from in [0, 1]; got {n}, {spread}, {compact_from}")
    if not shares or shares[0] != 1 or any(b > a or b < 0 for a, b in itertools.pairwise(shares)):
        raise ValueError(f"shares are of samples still inside: 1 first, never rising, never negative; got {shares}")
    rows = [n]
    for share in shares[1:]:
        room = math.ceil(n * share + spread * math.sqrt(n * share * (1 - share)))
        room = min(max(room, 1), rows[-1])
        rows.append(room if room <= (1 - compact_from) * rows[-1] else rows[-1])
    return tuple(rows)
