"""Who is still inside, kept on the device: nothing here waits for it, so a batch can run ahead, or be a CUDA graph.

Legend: N samples, C rows of the batch at some block, C' rows at the next, K classes, L exits.

A row is a place in the batch; ``samples`` says whose it is, -1: nobody's (its sample has left, or it was padding). Rows
of nobody are computed like all others and never read.

    leave(logits)      answers of rows that leave are written down; their rows are nobody's from then on
    close_up(h, C')    rows are taken out: a row of nobody among the first C' gets what a row behind C' has, the first
                       such row what the first has, and so on; the rows that stay do not move

If more than C' samples are inside, those that find no place are lost: their exit stays -1, and the caller answers them
again. The kernels in `kernels` do the same; ``fused=False`` keeps to plain torch, the oracle.

What is known is changed in place, never replaced, except where rows are taken out: exits may run on a stream of their
own, and memory that a tensor of the main stream gives back there is used again by the next block at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.exits import kernels
from moe_lab.exits.features import N_FEATURES, uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.probability import leaves_here


class Answers:
    """Answers of a batch in one piece of memory, so that one copy takes them all.

    Args:
        n: N.
        n_classes: K.
        costs: (L,) of the network, or None.
        memory: filled already; None: new, 0 everywhere.
        device: of new memory.

    Attributes:
        exits: (N + 1,) int64; the last entry, here and below, is for nobody.
        cost: (N + 1,) of the dtype of ``costs``, or None.
        probabilities: (N + 1, K) float32.
    """

    def __init__(
        self,
        n: int,
        n_classes: int,
        costs: Tensor | None,
        memory: Tensor | None = None,
        device: torch.device | None = None,
    ):
        kinds = [(torch.int64, 1), (torch.float32, n_classes)] + ([] if costs is None else [(costs.dtype, 1)])
        sizes = [(n + 1) * columns * dtype.itemsize for dtype, columns in kinds]
        whole = [-(-size // 16) * 16 for size in sizes]  # each begins where any dtype may begin
        self.memory = torch.zeros(sum(whole), dtype=torch.uint8, device=device) if memory is None else memory
        self._arguments = n, n_classes, costs
        parts = [part[:size] for part, size in zip(self.memory.split(whole), sizes, strict=True)]
        views = [part.view(dtype).view(-1, columns) for part, (dtype, columns) in zip(parts, kinds, strict=True)]
        self.exits, self.probabilities = views[0].view(-1), views[1]
        self.cost = None if costs is None else views[2].view(-1)

    def copy(self) -> Answers:
        """The same in memory of its own."""
        return Answers(*self._arguments, self.memory.clone())


class Inside:
    """What is known of one batch.

    Args:
        n: N.
        count: () int64, on the device: real samples, the first of the batch; the rest is padding.
        n_classes: K.
        gates, model: of the network.
        fused: use the kernels where they can run (gates of `ExitGates` itself, at most 4096 classes).
        costs: (L,) of the network, or None.

    Attributes:
        samples: (C,) int32.
        given_away: (C,) float32, S_{l-1} of each row.
        answers: see `Answers`; an exit of -1: no answer yet.
        checks: (2,) float32. A sum that is NaN if an answer is, or a gate of somebody who reached the last exit; and
            the number of samples that were answered.
    """

    def __init__(
        self,
        n: int,
        count: Tensor,
        n_classes: int,
        gates: ExitGates,
        model: str,
        fused: bool = True,
        costs: Tensor | None = None,
    ):
        device = count.device
        places = torch.arange(n, dtype=torch.int32, device=device)
        self.n, self.gates, self.model, self.costs = n, gates, model, costs
        self.samples = torch.where(places < count, places, -1)
        self.given_away, self.checks = torch.zeros(n + 2, device=device).split((n, 2))
        self.answers = Answers(n, n_classes, costs, device=device)
        self.answers.exits.fill_(-1)
        plain = type(gates) is ExitGates and gates.weight.shape[-1] == N_FEATURES
        plain &= gates.weight.dtype != torch.float64 and n_classes <= kernels.MOST_CLASSES
        self.fused = fused and plain and kernels.usable(self.answers.probabilities)
        self._places: tuple[Tensor, Tensor, Tensor] | None = None

    def leave(self, logits: Tensor, layer: int, last: bool) -> None:
        """Decide at exit ``layer`` for logits (C, K); everybody leaves at the ``last``."""
        if self.fused and kernels.usable(logits):
            index = min(layer, self.gates.n_gates - 1)  # the last exit has no gate: none is read
            gate = (self.gates.weight[index], self.gates.bias[index])
            answers = (self.answers.probabilities, self.answers.exits, self.answers.cost, self.costs)
            state = (self.samples, self.given_away, *answers, self.checks)
            kernels.leave(logits, *gate, *state, layer, self.model == "direct", last)
            return
        logits, leaves = logits.float(), self.samples >= 0
        if not last:
            gate = self.gates.one(layer, uncertainty_features(logits)).float().sigmoid()
            leaves = leaves & leaves_here(gate, self.given_away, self.model)
            self.given_away.add_(gate)
        else:
            self.checks[0] += torch.where(leaves, self.given_away, 0.0).sum()
        to, probabilities = torch.where(leaves, self.samples, self.n).long(), logits.softmax(-1)
        self.answers.probabilities.index_copy_(0, to, probabilities)
        self.answers.exits.index_fill_(0, to, layer)
        if self.costs is not None:
            self.answers.cost.index_copy_(0, to, self.costs[layer].expand(len(to)))
        self.checks[0] += torch.where(leaves, probabilities.sum(-1), 0.0).sum()
        self.checks[1] += leaves.sum()
        self.samples.masked_fill_(leaves, -1)

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
