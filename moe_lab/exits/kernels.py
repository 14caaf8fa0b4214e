"""Triton kernels for an exit, where a dozen small operations take longer than the network's own block.

Legend: C rows of a batch, N samples, K classes, D numbers per row.

    leave       softmax, the four features (`features`), the gate (`gate`), the decision (`probability`), and the answer
                of each row that leaves with what must be checked of it: one kernel instead of about thirty;
                leave_from_token: with a head linear(norm(class token)) in front of it
    places      which rows have left among the first C', and which have not behind them
    move        the former are overwritten by the latter, in place; all others stay where they are, which moves
                C' (C - C') / C rows instead of C'

What they compute, and in which order of rows, is defined in plain torch in `inside`, which calls them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.triton_support import INTERPRETED, jit, tl, triton, usable

__all__ = ["INTERPRETED", "MOST_CLASSES", "Exit", "leave", "leave_from_token", "move", "places", "token_fits", "usable"]

MOST_CLASSES = 4096  # a row of logits is held in registers
MOST_OF_A_HEAD = 2**15  # numbers of a linear layer that one program holds in shared memory


@jit
def _entropy(p):
    return -tl.sum(p * tl.log(tl.where(p > 0, p, 1.0)), 1)


@jit
def _answer(
    z, row, sample, before, weight, bias, samples, given_away, probabilities, exits, cost, costs, checks,
    n_rows, n_classes, layer, COSTS: tl.constexpr, DIRECT: tl.constexpr, LAST: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The decision for logits z (ROWS, COLUMNS) of some rows, and the answers of those that leave."""
    c = tl.arange(0, COLUMNS)
    here, real = row < n_rows, (c < n_classes)[None, :]
    inside = sample >= 0
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


@jit
def _leave_kernel(
    logits, weight, bias, samples, given_away, probabilities, exits, cost, costs, checks, n_rows, n_classes, layer,
    COSTS: tl.constexpr, DIRECT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    sample = tl.load(samples + row, mask=row < n_rows, other=-1)
    before = tl.load(given_away + row, mask=row < n_rows, other=0.0)
    at = row[:, None].to(tl.int64) * n_classes + c[None, :]
    z = tl.load(logits + at, mask=(row < n_rows)[:, None] & (c < n_classes)[None, :], other=0.0).to(tl.float32)
    _answer(
        z, row, sample, before, weight, bias, samples, given_away, probabilities, exits, cost, costs, checks,
        n_rows, n_classes, layer, COSTS, DIRECT, LAST, COLUMNS
    )  # fmt: skip


@jit
def _leave_from_token_kernel(
    h, norm_weight, norm_bias, head_weight, head_bias,
    weight, bias, samples, given_away, probabilities, exits, cost, costs, checks,
    n_rows, n_classes, layer, stride, width, epsilon,
    COSTS: tl.constexpr, DIRECT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, d = tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    sample = tl.load(samples + row, mask=row < n_rows, other=-1)
    before = tl.load(given_away + row, mask=row < n_rows, other=0.0)
    known, here = d < width, (row < n_rows)[:, None] & (d < width)[None, :]
    x = tl.load(h + row[:, None].to(tl.int64) * stride + d[None, :], mask=here, other=0.0).to(tl.float32)
    centred = tl.where(here, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / width + epsilon)
    w = tl.load(norm_weight + d, mask=known, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + d, mask=known, other=0.0).to(tl.float32)
    token = centred * scale[:, None] * w[None, :] + b[None, :]
    token = token.to(h.dtype.element_ty)  # rounded as the norm by itself would
    there = (c < n_classes)[:, None] & known[None, :]
    matrix = tl.load(head_weight + c[:, None] * width + d[None, :], mask=there, other=0.0)
    z = tl.dot(token, matrix.T, input_precision="ieee")
    z += tl.load(head_bias + c, mask=c < n_classes, other=0.0).to(tl.float32)[None, :]
    _answer(
        z.to(h.dtype.element_ty).to(tl.float32), row, sample, before, weight, bias, samples, given_away, probabilities,
        exits, cost, costs, checks, n_rows, n_classes, layer, COSTS, DIRECT, LAST, COLUMNS
    )  # fmt: skip


class Exit(NamedTuple):
    """What `leave` and `leave_from_token` need besides logits: the gate, and what they change.

    Attributes:
        weight, bias: (4,), () of the gate; not read at the last exit.
        samples, given_away: of `inside.Inside`.
        probabilities, exits, cost, checks: of `inside.Record`.
        costs: (L,), or None; then ``cost`` is None, too.
        layer: which exit.
        direct: the network's exit model is "direct".
        last: everybody leaves.
    """

    weight: Tensor
    bias: Tensor
    samples: Tensor
    given_away: Tensor
    probabilities: Tensor
    exits: Tensor
    cost: Tensor | None
    costs: Tensor | None
    checks: Tensor
    layer: int
    direct: bool
    last: bool

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the kernels' arguments; without costs another tensor stands for them, and is not read."""
        prices = (self.exits, self.exits) if self.costs is None else (self.cost, self.costs)
        return (*self[:6], *prices, self.checks)

    def constants(self) -> tuple[bool, bool, bool]:
        """COSTS, DIRECT, LAST."""
        return self.costs is not None, self.direct, self.last


def leave(logits: Tensor, at: Exit) -> None:
    """`inside.Inside.leave` of one exit, for logits (C, K)."""
    n_rows, n_classes = logits.shape
    columns = triton.next_power_of_2(n_classes)
    rows = max(1, min(16, 2048 // columns))
    sizes = (n_rows, n_classes, at.layer, *at.constants(), rows, columns)
    warps = 1 if rows * columns <= 512 else 4
    _leave_kernel[(triton.cdiv(n_rows, rows),)](logits.contiguous(), *at.tensors(), *sizes, num_warps=warps)


def token_fits(h: Tensor, n_classes: int) -> bool:
    """`leave_from_token` can run on h: (C, S, D), contiguous, a product that fits into one program."""
    if h.dim() != 3 or not h.is_contiguous() or not usable(h):
        return False
    widths = triton.next_power_of_2(h.shape[2]) * max(triton.next_power_of_2(n_classes), 16)
    interpretable = h.is_cuda or h.dtype != torch.bfloat16  # which the interpreter cannot multiply
    return widths <= MOST_OF_A_HEAD and interpretable


def leave_from_token(h: Tensor, norm: nn.LayerNorm, linear: nn.Linear, at: Exit) -> None:
    """`leave` for the logits linear(norm(h[:, 0])), which are not written down; h: see `token_fits`, of their dtype."""
    n_rows, n_tokens, width = h.shape
    n_classes = linear.out_features
    sizes = (n_rows, n_classes, at.layer, n_tokens * width, width, norm.eps)
    blocks = (16, max(triton.next_power_of_2(n_classes), 16), max(triton.next_power_of_2(width), 16))
    parameters = (norm.weight, norm.bias, linear.weight, linear.bias)
    _leave_from_token_kernel[(triton.cdiv(n_rows, 16),)](
        h, *parameters, *at.tensors(), *sizes, *at.constants(), *blocks, num_warps=4
    )


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
