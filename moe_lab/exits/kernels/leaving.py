"""Who leaves at which exit, once all rows are judged: the answers, and for few rows also who takes whose place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.triton_support import cdiv, jit, tl, triton

MOST_ROWS = 1024  # each program of `leave_and_choose` looks at all of them


class Answers(NamedTuple):
    """What the kernels read of a batch and write down of it; see `inside.Record`, without costs both are None."""

    probabilities: Tensor
    exits: Tensor
    cost: Tensor | None
    costs: Tensor | None
    checks: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the kernels' arguments; without costs another tensor stands for them, and is not read."""
        prices = (self.exits, self.exits) if self.costs is None else (self.cost, self.costs)
        return (self.probabilities, self.exits, *prices, self.checks)


@jit
def _decide(row, sample, before, gates, n_rows, n_exits, AT_END: tl.constexpr, DIRECT: tl.constexpr):
    """Which of the exits each row takes (-1: none), S behind them, and a sum that is NaN if somebody's answer is."""
    taken = tl.zeros_like(sample) - 1
    bad = tl.zeros_like(before)
    for i in range(n_exits):
        gate = tl.load(gates + i * n_rows + row, mask=row < n_rows, other=0.0)
        at_end = AT_END & (i == n_exits - 1)
        leaves = ((sample >= 0) & (taken < 0)) & ((2 * gate + (before if DIRECT else 0.0) >= 1) | at_end)
        taken = tl.where(leaves, i, taken)
        bad += tl.where(leaves & at_end, before + gate, 0.0)
        before += tl.where(at_end, 0.0, gate)
    return taken, before, tl.sum(bad, 0)


@jit
def _answer(
    row, sample, taken, judged, probabilities, exits, cost, costs, n_rows, n_classes, first,
    COSTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The answers of rows that leave, (ROWS,) each."""
    c = tl.arange(0, COLUMNS)[None, :]
    there = (taken >= 0)[:, None] & (c < n_classes)
    source = (taken.to(tl.int64) * n_rows + row)[:, None] * n_classes + c
    tl.store(
        probabilities + sample[:, None].to(tl.int64) * n_classes + c,
        tl.load(judged + source, mask=there, other=0.0),
        mask=there,
    )
    tl.store(exits + sample, (first + taken).to(tl.int64), mask=taken >= 0)
    if COSTS:
        tl.store(cost + sample, tl.load(costs + first + taken, mask=taken >= 0), mask=taken >= 0)


@jit
def _few_kernel(
    judged, gates, samples, given_away, source, new_samples, new_given_away,
    probabilities, exits, cost, costs, checks, told,
    n_rows, n_classes, first, n_exits, keep,
    AT_END: tl.constexpr, COSTS: tl.constexpr, DIRECT: tl.constexpr, TELLS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program decides for all rows, and then serves one: its answer, and who takes its place."""
    me = tl.program_id(0)
    row, one = tl.arange(0, ROWS), tl.arange(0, 1)
    sample = tl.load(samples + row, mask=row < n_rows, other=-1)
    before = tl.load(given_away + row, mask=row < n_rows, other=0.0)
    taken, before, bad = _decide(row, sample, before, gates, n_rows, n_exits, AT_END, DIRECT)
    mine = row == me
    my_sample, my_exit = tl.sum(tl.where(mine, sample, 0), 0), tl.sum(tl.where(mine, taken, 0), 0)
    _answer(
        me + one, my_sample + one, my_exit + one, judged, probabilities, exits, cost, costs, n_rows, n_classes, first,
        COSTS, COLUMNS
    )  # fmt: skip
    after = tl.where(taken >= 0, -1, sample)
    if me < keep:
        gap, tail = (row < keep) & (after < 0), (row >= keep) & (row < n_rows) & (after >= 0)
        rank = tl.sum((gap & (row < me)).to(tl.int32), 0)
        next_tail = tail & (tl.cumsum(tail.to(tl.int32), 0) - 1 == rank)
        from_row = tl.sum(tl.where(next_tail, row, 0), 0)  # 0: there is none, for a tail is behind at least one row
        from_row = tl.where((tl.sum((gap & mine).to(tl.int32), 0) > 0) & (from_row > 0), from_row, me)
        tl.store(source + me, from_row)
        tl.store(new_samples + me, tl.sum(tl.where(row == from_row, after, 0), 0))
        tl.store(new_given_away + me, tl.sum(tl.where(row == from_row, before, 0.0), 0))
    if me == 0:  # the only one who changes them
        total, count = tl.load(checks) + bad, tl.load(checks + 1) + tl.sum((taken >= 0).to(tl.float32), 0)
        tl.store(checks, total)
        tl.store(checks + 1, count)
        if TELLS:
            tl.store(told, total)
            tl.store(told + 1, count)


@jit
def _after(
    row, gates, samples, given_away, n_rows, n_exits, AT_END: tl.constexpr, DIRECT: tl.constexpr
):  # fmt: skip
    """Samples and S of these rows behind the exits."""
    sample = tl.load(samples + row, mask=row < n_rows, other=-1)
    before = tl.load(given_away + row, mask=row < n_rows, other=0.0)
    taken, before, _ = _decide(row, sample, before, gates, n_rows, n_exits, AT_END, DIRECT)
    return tl.where(taken >= 0, -1, sample), before


@jit
def _choose(
    gates, samples, given_away, tails, source, new_samples, new_given_away, n_rows, n_exits, keep,
    AT_END: tl.constexpr, DIRECT: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """First a list of who is still there behind the first ``keep`` rows, then one of them for each gap."""
    n_tails = 0
    begin = keep
    while begin < n_rows:
        row = begin + tl.arange(0, TAIL)
        after, _ = _after(row, gates, samples, given_away, n_rows, n_exits, AT_END, DIRECT)
        there = (after >= 0).to(tl.int32)
        tl.store(tails + n_tails + tl.cumsum(there, 0) - 1, row, mask=there > 0)
        n_tails += tl.sum(there, 0)
        begin += TAIL
    tl.debug_barrier()  # all of the list is written before any of it is read
    n_gaps = 0
    begin = 0
    while begin < keep:
        row = begin + tl.arange(0, ROWS)
        after, before = _after(row, gates, samples, given_away, n_rows, n_exits, AT_END, DIRECT)
        gap = ((after < 0) & (row < keep)).to(tl.int32)
        rank = n_gaps + tl.cumsum(gap, 0) - 1
        filled = (gap > 0) & (rank < n_tails)
        from_row = tl.load(tails + rank, mask=filled, other=0)
        tl.store(source + row, tl.where(filled, from_row, row), mask=row < keep)
        # Who has another's place: S of somebody who stays is not changed by anybody, and so can be read here.
        other, others = _after(
            tl.where(filled, from_row, n_rows), gates, samples, given_away, n_rows, n_exits, AT_END, DIRECT
        )
        tl.store(new_samples + row, tl.where(filled, other, after), mask=row < keep)
        tl.store(new_given_away + row, tl.where(filled, others, before), mask=row < keep)
        n_gaps += tl.sum(gap, 0)
        begin += ROWS


@jit
def _many_kernel(
    judged, gates, samples, given_away, tails, source, new_samples, new_given_away,
    probabilities, exits, cost, costs, checks,
    n_rows, n_classes, first, n_exits, keep,
    AT_END: tl.constexpr, COSTS: tl.constexpr, DIRECT: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first program chooses, and decides for all rows to do so; each of the others answers for some."""
    me = tl.program_id(0)
    if me == 0:
        _choose(
            gates, samples, given_away, tails, source, new_samples, new_given_away, n_rows, n_exits, keep,
            AT_END, DIRECT, TAIL, BLOCK
        )  # fmt: skip
    else:
        row = (me - 1) * ROWS + tl.arange(0, ROWS)
        sample = tl.load(samples + row, mask=row < n_rows, other=-1)
        before = tl.load(given_away + row, mask=row < n_rows, other=0.0)
        taken, before, bad = _decide(row, sample, before, gates, n_rows, n_exits, AT_END, DIRECT)
        _answer(row, sample, taken, judged, probabilities, exits, cost, costs, n_rows, n_classes, first, COSTS, COLUMNS)
        tl.atomic_add(checks, bad)  # is it NaN? the order does not matter
        tl.atomic_add(checks + 1, tl.sum((taken >= 0).to(tl.float32), 0))


def leave_and_choose(
    judged: Tensor,
    gates: Tensor,
    samples: Tensor,
    given_away: Tensor,
    answers: Answers,
    first: int,
    at_end: bool,
    direct: bool,
    keep: int,
    told: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`inside.Inside.leave_and_choose`: decide at exits one behind the other, then choose among the rows that stay.

    Args:
        judged, gates: (exits, C, K), (exits, C) of `judging`.
        samples, given_away: (C,) of `inside.Inside`; not changed.
        answers: what is written.
        first: which exit the first of them is.
        at_end: the last of them is the network's: everybody leaves.
        direct: the network's exit model is "direct".
        keep: C'; C if no row is taken out.
        told: (2,) float32 in memory that the device can write to; gets what the checks are then, if there are at most
            `MOST_ROWS`.

    Returns:
        Source, samples and S of the first C' rows.
    """
    n_exits, n_rows, n_classes = judged.shape
    after = torch.empty_like(samples[:keep]), torch.empty_like(given_away[:keep])
    source, columns = torch.empty_like(after[0]), triton.next_power_of_2(n_classes)
    sizes, kinds = (n_rows, n_classes, first, n_exits, keep), (at_end, answers.costs is not None, direct)
    state = judged, gates, samples, given_away
    if n_rows <= MOST_ROWS:
        rows = triton.next_power_of_2(n_rows)
        written = source, *after, *answers.tensors(), answers.checks if told is None else told
        blocks = told is not None, rows, columns
        _few_kernel[(n_rows,)](*state, *written, *sizes, *kinds, *blocks, num_warps=1 if rows <= 64 else 4)
    else:
        tails, rows = torch.empty_like(samples), max(1, 8192 // columns)
        written = tails, source, *after, *answers.tensors()
        tail, block = (min(triton.next_power_of_2(max(size, 512)), 4096) for size in (n_rows - keep, keep))
        blocks = tail, block, rows, columns
        _many_kernel[(1 + cdiv(n_rows, rows),)](*state, *written, *sizes, *kinds, *blocks, num_warps=16)
    return source, *after
