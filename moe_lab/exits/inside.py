"""Who is still inside, kept on the device: nothing here waits for it, so a batch can run ahead, or be a CUDA graph.

Legend: N samples, C rows of the batch at some block, C' rows at the next, K classes, L exits, E exits in a row.

A row is a place in the batch; ``samples`` says whose it is, -1: nobody's (its sample has left, or it was padding). Rows
of nobody are computed like all others and never read.

    judge              what each row would answer at an exit, and how sure it is; no state is needed for that
    leave              who leaves, at exits one behind the other: answers are written down, and the rows are nobody's
                       from then on
    leave_and_choose   then rows are taken out: a row of nobody among the first C' gets what a row behind C' has, the
                       first such row what the first has, and so on; the rows that stay do not move
    move               what a block returned follows

If more than C' samples are inside, those that find no place are lost: their exit stays -1, and the caller answers them
again. The kernels in `kernels` do the same; ``fused=False`` keeps to plain torch, the oracle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.exits import kernels
from moe_lab.exits.features import N_FEATURES, uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.probability import leaves_here
from moe_lab.exits.token_heads import TokenHead


class Record:
    """What is known of a batch, in one piece of memory: one copy begins a batch, and one takes its answers.

    Args:
        n: N.
        n_classes: K.
        costs: (L,) of the network, or None.
        memory: filled already; None: new, to be filled by `begin`.
        device: of new memory.

    Attributes:
        exits: (N + 1,) int64, -1: no answer yet; the last entry, here and below, is for nobody.
        cost: (N + 1,) of the dtype of ``costs``, or None.
        probabilities: (N + 1, K) float32.
        checks: (2,) float32. A sum that is NaN if an answer is, or a gate of somebody who reached the last exit; and
            the number of samples that were answered.
        samples: (N,) int32, whose each row is.
        given_away: (N,) float32, S_{l-1} of each row.
    """

    def __init__(
        self,
        n: int,
        n_classes: int,
        costs: Tensor | None,
        memory: Tensor | None = None,
        device: torch.device | None = None,
    ):
        kinds = {
            "exits": (torch.int64, n + 1),
            "probabilities": (torch.float32, (n + 1) * n_classes),
            "checks": (torch.float32, 2),
            "samples": (torch.int32, n),
            "given_away": (torch.float32, n),
        }
        if costs is not None:
            kinds["cost"] = (costs.dtype, n + 1)
        self._arguments, self._starts, size = (n, n_classes, costs), {}, 0
        for name, (dtype, count) in kinds.items():
            self._starts[name] = size, dtype
            size += -(-count * dtype.itemsize // 16) * 16  # each begins where any dtype may begin
        self.memory = torch.empty(size, dtype=torch.uint8, device=device) if memory is None else memory
        parts = {name: self._part(self.memory, name, count) for name, (_, count) in kinds.items()}
        self.exits, self.checks, self.cost = parts["exits"], parts["checks"], parts.get("cost")
        self.probabilities = parts["probabilities"].view(n + 1, n_classes)
        self.samples, self.given_away = parts["samples"], parts["given_away"]

    def _part(self, memory: Tensor, name: str, count: int) -> Tensor:
        start, dtype = self._starts[name]
        return memory[start : start + count * dtype.itemsize].view(dtype)

    def begin(self, count: int) -> Record:
        """Nobody has left yet; ``count`` samples are real, the first of the batch, the rest is padding."""
        self.memory.zero_()
        self.exits.fill_(-1)
        self.samples[count:].fill_(-1)
        torch.arange(count, out=self.samples[:count])
        return self

    def copy(self) -> Record:
        """The same in memory of its own."""
        return Record(*self._arguments, self.memory.clone())

    def answers(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copies of the first ``count`` probabilities, exits and costs."""
        memory, n_classes = self.memory.clone(), self.probabilities.shape[1]
        probabilities = self._part(memory, "probabilities", count * n_classes).view(count, n_classes)
        cost = None if self.cost is None else self._part(memory, "cost", count)
        return probabilities, self._part(memory, "exits", count), cost


class Judged(NamedTuple):
    """Of E exits, one behind the other.

    Attributes:
        probabilities: (E, C, K) float32, softmax.
        gates: (E, C) float32, sigmoid; at the network's last exit 0, or NaN where the probabilities are.
        first: which exit the first is.
        at_end: the last of them is the network's.
    """

    probabilities: Tensor
    gates: Tensor
    first: int
    at_end: bool


class Inside:
    """Who is inside, from exit to exit.

    Args:
        record: of a batch that begins; is changed.
        gates, model, costs: of the network.
        fused: use the kernels where they can run (gates of `ExitGates` itself, at most 4096 classes).

    Attributes:
        samples: (C,) int32; those of the record at first.
        given_away: (C,) float32, as well.
        told: the last `leave` was asked for a copy of the record's checks, and made one.
    """

    def __init__(self, record: Record, gates: ExitGates, model: str, fused: bool = True, costs: Tensor | None = None):
        self.record, self.samples, self.given_away = record, record.samples, record.given_away
        self.n, self.gates, self.model, self.costs = len(record.samples), gates, model, costs
        plain = type(gates) is ExitGates and gates.weight.shape[-1] == N_FEATURES
        plain &= gates.weight.dtype != torch.float64 and record.probabilities.shape[1] <= kernels.MOST_CLASSES
        self.fused = fused and plain and kernels.usable(record.probabilities)
        self.told = False

    def judge(self, logits: Iterable[Tensor], first: int, count: int, at_end: bool) -> Judged:
        """Judge ``count`` exits from ``first`` on; logits: (C, K) of each.

        Args:
            logits: may be made one by one, as they are asked for.
            first, count: which exits.
            at_end: the last of them is the network's.
        """
        judged = self._empty(first, count, at_end)
        for index, each in enumerate(logits):
            last = at_end and index == count - 1
            probabilities, gate = judged.probabilities[index], judged.gates[index]
            if self.fused and kernels.usable(each):
                kernels.judge(each, self._gate(first + index), probabilities, gate, last)
                continue
            each = each.float()
            probabilities.copy_(each.softmax(-1))
            if last:
                gate.copy_(probabilities.sum(-1) * 0)
            else:
                gate.copy_(self.gates.one(first + index, uncertainty_features(each)).float().sigmoid())
        return judged

    def judge_tokens(
        self, hs: Sequence[Tensor], heads: Sequence[TokenHead | None], first: int, at_end: bool
    ) -> Judged | None:
        """`judge` for heads that are `token_heads.token_head`, in one kernel.

        Args:
            hs: what each exit sees, (C, S, D) each.
            heads: of each exit.
            first, at_end: as for `judge`.

        Returns:
            None where that cannot run.
        """
        if not self.fused or any(head is None for head in heads):
            return None
        n_classes = self.record.probabilities.shape[1]
        if not all(h.dtype == head.linear.weight.dtype for h, head in zip(hs, heads, strict=True)):
            return None
        if any(h.shape != hs[0].shape or h.dtype != hs[0].dtype or not kernels.token_fits(h, n_classes) for h in hs):
            return None
        judged = self._empty(first, len(heads), at_end)
        gates = [self._gate(first + index) for index in range(len(heads))]
        kernels.judge_tokens(hs, heads, gates, judged.probabilities, judged.gates, at_end)
        return judged

    def _empty(self, first: int, count: int, at_end: bool) -> Judged:
        shape = count, len(self.samples), self.record.probabilities.shape[1]
        probabilities = self.record.probabilities.new_empty(shape)
        return Judged(probabilities, probabilities.new_empty(shape[:2]), first, at_end)

    def _gate(self, layer: int) -> tuple[Tensor, Tensor]:
        index = min(layer, self.gates.n_gates - 1)  # the last exit has no gate: what is read does not count
        return self.gates.weight[index], self.gates.bias[index]

    def leave(self, judged: Judged, told: Tensor | None = None) -> None:
        """Decide; everybody leaves at the network's last exit.

        Args:
            judged: of all rows.
            told: (2,) float32 in pinned memory, which gets the record's checks if the kernel for it can run.
        """
        if self.fused:
            self._leave_and_choose(judged, len(self.samples), told)
            return
        for index, (probabilities, gate) in enumerate(zip(*judged[:2], strict=True)):
            layer, leaves = judged.first + index, self.samples >= 0
            if judged.at_end and index == len(judged.gates) - 1:
                self.record.checks[0] += torch.where(leaves, self.given_away + gate, 0.0).sum()
            else:
                leaves = leaves & leaves_here(gate, self.given_away, self.model)
                self.given_away.add_(gate)
            to = torch.where(leaves, self.samples, self.n).long()
            self.record.probabilities.index_copy_(0, to, probabilities)
            self.record.exits.index_fill_(0, to, layer)
            if self.costs is not None:
                self.record.cost.index_copy_(0, to, self.costs[layer].expand(len(to)))
            self.record.checks[0] += torch.where(leaves, probabilities.sum(-1), 0.0).sum()
            self.record.checks[1] += leaves.sum()
            self.samples.masked_fill_(leaves, -1)

    def leave_and_choose(self, judged: Judged, keep: int) -> Tensor:
        """`leave`; then take rows out.

        Returns:
            (C',) int32, where each of the ``keep`` rows comes from; C' < C. See `move`.
        """
        if self.fused:
            return self._leave_and_choose(judged, keep)
        self.leave(judged)
        gap, tail = self.samples[:keep] < 0, self.samples[keep:] >= 0
        first_tails = torch.argsort(~tail, stable=True) + keep
        rank = gap.cumsum(0) - 1
        filled = gap & (rank < tail.sum())
        stays = torch.arange(keep, device=gap.device)
        source = torch.where(filled, first_tails[rank.clamp(0, len(tail) - 1)], stays)
        self.samples, self.given_away = (state.index_select(0, source) for state in (self.samples, self.given_away))
        return source.int()

    def _leave_and_choose(self, judged: Judged, keep: int, told: Tensor | None = None) -> Tensor:
        record = self.record
        answers = kernels.Answers(record.probabilities, record.exits, record.cost, self.costs, record.checks)
        state = self.samples, self.given_away, answers, *judged[2:], self.model == "direct"
        source, self.samples, self.given_away = kernels.leave_and_choose(*judged[:2], *state, keep, told)
        self.told = told is not None and judged.probabilities.shape[1] <= kernels.MOST_ROWS
        return source

    def move(self, h: Tensor, source: Tensor, may_write: bool = False) -> Tensor:
        """h[source], (C, ...) -> (C', ...), of `leave_and_choose`; with ``may_write`` perhaps in the memory of h."""
        if self.fused and may_write and h.is_contiguous() and kernels.usable(h):
            return kernels.move(h, source)
        return h.index_select(0, source)
