"""Who is still inside, kept on the device: nothing here waits for it, so a batch can run ahead, or be a CUDA graph.

Legend: N samples, C rows of the batch at some block, C' rows at the next, K classes, L exits.

A row is a place in the batch; ``samples`` says whose it is, -1: nobody's (its sample has left, or it was padding). Rows
of nobody are computed like all others and never read.

    leave(logits)      answers of rows that leave are written down; their rows are nobody's from then on
    close_up(h, C')    rows are taken out: a row of nobody among the first C' gets what a row behind C' has, the first
                       such row what the first has, and so on; the rows that stay do not move

If more than C' samples are inside, those that find no place are lost: their exit stays -1, and the caller answers them
again. The kernels in `kernels` do the same; ``fused=False`` keeps to plain torch, the oracle.

What is known (`Record`) is changed in place, never replaced, except where rows are taken out: exits may run on a stream
of their own, and memory that a tensor of the main stream gives back there is used again by the next block at once.
"""

from __future__ import annotations

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


class Inside:
    """Who is inside, from exit to exit.

    Args:
        record: of a batch that begins; is changed.
        gates, model, costs: of the network.
        fused: use the kernels where they can run (gates of `ExitGates` itself, at most 4096 classes).

    Attributes:
        samples: (C,) int32; those of the record until rows are taken out.
        given_away: (C,) float32, as well.
    """

    def __init__(self, record: Record, gates: ExitGates, model: str, fused: bool = True, costs: Tensor | None = None):
        self.record, self.samples, self.given_away = record, record.samples, record.given_away
        self.n, self.gates, self.model, self.costs = len(record.samples), gates, model, costs
        plain = type(gates) is ExitGates and gates.weight.shape[-1] == N_FEATURES
        plain &= gates.weight.dtype != torch.float64 and record.probabilities.shape[1] <= kernels.MOST_CLASSES
        self.fused = fused and plain and kernels.usable(record.probabilities)
        self._places: tuple[Tensor, Tensor, Tensor] | None = None

    def leave(self, logits: Tensor, layer: int, last: bool) -> None:
        """Decide at exit ``layer`` for logits (C, K); everybody leaves at the ``last``."""
        if self.fused and kernels.usable(logits):
            kernels.leave(logits, self._exit(layer, last))
            return
        logits, leaves = logits.float(), self.samples >= 0
        if not last:
            gate = self.gates.one(layer, uncertainty_features(logits)).float().sigmoid()
            leaves = leaves & leaves_here(gate, self.given_away, self.model)
            self.given_away.add_(gate)
        else:
            self.record.checks[0] += torch.where(leaves, self.given_away, 0.0).sum()
        to, probabilities = torch.where(leaves, self.samples, self.n).long(), logits.softmax(-1)
        self.record.probabilities.index_copy_(0, to, probabilities)
        self.record.exits.index_fill_(0, to, layer)
        if self.costs is not None:
            self.record.cost.index_copy_(0, to, self.costs[layer].expand(len(to)))
        self.record.checks[0] += torch.where(leaves, probabilities.sum(-1), 0.0).sum()
        self.record.checks[1] += leaves.sum()
        self.samples.masked_fill_(leaves, -1)

    def leave_from(self, h: Tensor, head: TokenHead, layer: int, last: bool) -> bool:
        """`leave` for the logits of a `token_heads.token_head` on h (C, S, D), in one kernel.

        Returns:
            False where that cannot run; then nothing is done.
        """
        norm, linear = head
        if not self.fused or h.dtype != linear.weight.dtype or not kernels.token_fits(h, linear.out_features):
            return False
        kernels.leave_from_token(h, norm, linear, self._exit(layer, last))
        return True

    def _exit(self, layer: int, last: bool) -> kernels.Exit:
        index = min(layer, self.gates.n_gates - 1)  # the last exit has no gate: none is read
        answers = (self.record.probabilities, self.record.exits, self.record.cost, self.costs, self.record.checks)
        gate = (self.gates.weight[index], self.gates.bias[index])
        return kernels.Exit(*gate, self.samples, self.given_away, *answers, layer, self.model == "direct", last)

    def prepare(self, keep: int) -> None:
        """Find already which rows the next `close_up` will move: nobody may `leave` between the two."""
        if self.fused:
            self._places = kernels.places(self.samples, keep)

    def close_up(self, h: Tensor, keep: int, may_write: bool = False) -> Tensor:
        """(C, ...) -> (C', ...), C' = ``keep`` < C; with ``may_write`` perhaps in the memory of h."""
        places, self._places = self._places, None
        if self.fused and may_write and h.is_contiguous() and kernels.usable(h):
            places = kernels.places(self.samples, keep) if places is None else places
            h = kernels.move(h, self.samples, self.given_away, *places, keep)
            self.samples, self.given_away = self.samples[:keep], self.given_away[:keep]
            return h
        hole, tail = self.samples[:keep] < 0, self.samples[keep:] >= 0
        first_tails = torch.argsort(~tail, stable=True) + keep
        rank = hole.cumsum(0) - 1
        filled = hole & (rank < tail.sum())
        stays = torch.arange(keep, device=h.device)
        source = torch.where(filled, first_tails[rank.clamp(0, len(tail) - 1)], stays)
        self.samples, self.given_away = (state.index_select(0, source) for state in (self.samples, self.given_away))
        return h.index_select(0, source)
