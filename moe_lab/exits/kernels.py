"""Triton kernels for an exit, where a dozen small operations take longer than the network's own block.

Legend: C rows of a batch, N samples, K classes, D numbers per row.

    leave       softmax, the four features (`features`), the gate (`gate`), the decision (`probability`), and the answer
                of each row that leaves with what must be checked of it: one kernel instead of about thirty
    places      which rows have left among the first C', and which have not behind them
    move        the former are overwritten by the latter, in place; all others stay where they are, which moves
                C' (C - C') / C rows instead of C'

What they compute, and in which order of rows, is defined in plain torch in `inside`, which calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.triton_support import INTERPRETED, jit, tl, triton, usable

__all__ = ["INTERPRETED", "MOST_CLASSES", "leave", "move", "places", "usable"]

MOST_CLASSES = 4096  # a row of logits is held in registers


@jit
def _entropy(p):
    return -tl.sum(p * tl.log(tl.where(p > 0, p, 1.0)), 1)


@jit
def _leave_kernel(
    logits, weight, bias, samples, given_away, probabilities, exits, cost, costs, checks, n_rows, n_classes, layer,
    COSTS: tl.constexpr, DIRECT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    here, real = row < n_rows, (c < n_classes)[None, :]
    sample = tl.load(samples + row, mask=here, other=-1)
    inside = sample >= 0
    at = row[:, None].to(tl.int64) * n_classes + c[None, :]
    z = tl.load(logits + at, mask=here[:, None] & real, other=0.0).to(tl.float32)
    before = tl.load(given_away + row, mask=here, other=0.0)
    shifted = tl.where(real, z, float("-inf"))
    e = tl.exp(shifted - tl.max(shifted, 1)[:, None])
    total = tl.sum(e, 1)
    p = e / total[:, None]
    if LAST:
        leaves = inside
        unsure = before
    else:
        first = tl.max(p, 1)
        second = tl.max(tl.where(c[None, :] == tl.argmax(p, 1)[:, None], -1.0, p), 1)
        squares = p * p
        r = squares / tl.sum(squares, 1)[:, None]
        w0, w1 = tl.load(weight).to(tl.float32), tl.load(weight + 1).to(tl.float32)
        w2, w3 = tl.load(weight + 2).to(tl.float32), tl.load(weight + 3).to(tl.float32)
        gate = w0 * first + w1 * _entropy(p) + w2 * (first - second) + w3 * _entropy(r) + tl.load(bias).to(tl.float32)
        gate = tl.where(total == total, gate, float("nan"))  # a maximum forgets NaN; the caller must hear of it
        g = 1 / (1 + tl.exp(-gate))
        leaves = inside & (2 * g + (before if DIRECT else 0.0) >= 1)
        unsure = tl.zeros_like(before)
    tl.debug_barrier()  # several threads read a row's state: all of them before one writes it
    if not LAST:
        tl.store(given_away + row, before + g, mask=here)
    to = sample[:, None].to(tl.int64) * n_classes + c[None, :]
    tl.store(probabilities + to, p, mask=leaves[:, None] & real)
    tl.store(exits + sample, tl.zeros_like(sample) + layer, mask=leaves)
    if COSTS:
        price = tl.load(costs + layer)
        tl.store(cost + sample, price, mask=leaves)
    tl.store(samples + row, tl.zeros_like(sample) - 1, mask=leaves)
    tl.atomic_add(checks, tl.sum(tl.where(leaves, total + unsure, 0.0), 0))  # is it NaN? the order does not matter
    tl.atomic_add(checks + 1, tl.sum(leaves.to(tl.float32), 0))


def leave(
    logits: Tensor,
    weight: Tensor,
    bias: Tensor,
    samples: Tensor,
    given_away: Tensor,
    probabilities: Tensor,
    exits: Tensor,
    cost: Tensor | None,
    costs: Tensor | None,
    checks: Tensor,
    layer: int,
    direct: bool,
    last: bool,
) -> None:
    """`inside.Inside.leave` of one exit; weight (4,), bias () of its gate."""
    n_rows, n_classes = logits.shape
    columns = triton.next_power_of_2(n_classes)
    rows = max(1, min(16, 2048 // columns))
    sizes = (n_rows, n_classes, layer, costs is not None, direct, last, rows, columns)
    prices = (exits, exits) if costs is None else (cost, costs)  # not read without costs
    state = (samples, given_away, probabilities, exits, *prices, checks)
    warps = 1 if rows * columns <= 512 else 4
    _leave_kernel[(triton.cdiv(n_rows, rows),)](logits.contiguous(), weight, bias, *state, *sizes, num_warps=warps)


@jit
def _places_kernel(samples, places, counts, n_rows, keep, BLOCK: tl.constexpr):
    """Two programs: of the first ``keep`` rows those to be overwritten, of the others those to be moved."""
    tail = tl.program_id(0)
    first = tail * keep
    end = tl.where(tail > 0, n_rows, keep)
    to = places + first
    found = 0
    while first < end:
        i = first + tl.arange(0, BLOCK)
        gone = tl.load(samples + i, mask=i < end, other=0) < 0
        wanted = ((i < end) & (gone != (tail > 0))).to(tl.int32)
        tl.store(to + found + tl.cumsum(wanted, 0) - 1, i, mask=wanted > 0)
        found += tl.sum(wanted, 0)
        first += BLOCK
    tl.store(counts + tail, found)


@jit
def _move_kernel(h, samples, given_away, holes, tails, counts, width, COLUMNS: tl.constexpr):
    pair, part = tl.program_id(0), tl.program_id(1)
    if pair < tl.minimum(tl.load(counts), tl.load(counts + 1)):
        to, source = tl.load(holes + pair).to(tl.int64), tl.load(tails + pair).to(tl.int64)
        c = part * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(h + to * width + c, tl.load(h + source * width + c, mask=c < width), mask=c < width)
        if part == 0:
            tl.store(samples + to, tl.load(samples + source))
            tl.store(given_away + to, tl.load(given_away + source))


def places(samples: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to be overwritten, rows to be moved there, and how many of each, for `move`; the rest is not filled."""
    n_rows = len(samples)
    found = torch.empty(n_rows, dtype=torch.int32, device=samples.device)
    counts = torch.empty(2, dtype=torch.int32, device=samples.device)
    block = min(triton.next_power_of_2(max(keep, n_rows - keep)), 4096)  # few rounds: each waits for the one before
    warps = max(1, min(16, block // 256))
    _places_kernel[(2,)](samples, found, counts, n_rows, keep, block, num_warps=warps)
    return found[:keep], found[keep:], counts


def move(
    h: Tensor, samples: Tensor, given_away: Tensor, holes: Tensor, tails: Tensor, counts: Tensor, keep: int
) -> Tensor:
    """`inside.Inside.close_up`: the first ``keep`` rows of h, a contiguous tensor, which is changed."""
    width = h[0].numel()
    columns = min(triton.next_power_of_2(width), 2048)
    grid = (min(keep, len(h) - keep), triton.cdiv(width, columns))
    _move_kernel[grid](h, samples, given_away, holes, tails, counts, width, columns, num_warps=4)
    return h[:keep]
