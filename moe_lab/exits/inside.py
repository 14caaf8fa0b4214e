"""Who is still inside, kept on the device: nothing here waits for it, so a batch can run ahead, or be a CUDA graph.

Legend: N samples, C rows of the batch at some block, C' rows at the next, K classes, L exits.

A row is a place in the batch; ``samples`` says whose it is, -1: nobody's (its sample has left, or it was padding). Rows
of nobody are computed like all others and never read.

    leave(logits)      answers of rows that leave are written down; their rows are nobody's from then on
    close_up(h, C')    rows are taken out: a row of nobody among the first C' gets what a row behind C' has, the first
                       such row what the first has, and so on; the rows that stay do not move

If more than C' samples are inside, those that find no place are lost: their exit stays -1, and the caller answers them
again. The kernels in `kernels` do the same; ``fused=False`` keeps to plain torch, the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.exits import kernels
from moe_lab.exits.features import N_FEATURES, uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.probability import leaves_here


class Inside:
    """What is known of one batch.

    Args:
        n: N.
        count: () int64, on the device: real samples, the first of the batch; the rest is padding.
        n_classes: K.
        gates, model: of the network.
        fused: use the kernels where they can run (gates of `ExitGates` itself, at most 4096 classes).

    Attributes:
        samples: (C,) int32.
        given_away: (C,) float32, S_{l-1} of each row.
        answers: (N + 1, K) float32 logits; the last row is for nobody.
        exits: (N + 1,) int64, -1: no answer yet.
        checks: (2,) float32. A sum that is NaN if an answer is, or a gate of somebody who reached the last exit; and,
            after `finish`, the number of samples without an answer.
    """

    def __init__(self, n: int, count: Tensor, n_classes: int, gates: ExitGates, model: str, fused: bool = True):
        device = count.device
        places = torch.arange(n, dtype=torch.int32, device=device)
        self.count, self.n, self.gates, self.model = count, n, gates, model
        self.real = places < count
        self.samples = torch.where(self.real, places, -1)
        self.given_away, self.checks = torch.zeros(n, device=device), torch.zeros(2, device=device)
        self.answers = torch.zeros(n + 1, n_classes, device=device)
        self.exits = torch.full((n + 1,), -1, dtype=torch.int64, device=device)
        plain = type(gates) is ExitGates and gates.weight.shape[-1] == N_FEATURES
        plain &= gates.weight.dtype != torch.float64 and n_classes <= kernels.MOST_CLASSES
        self.fused = fused and plain and kernels.usable(self.answers)

    def leave(self, logits: Tensor, layer: int, last: bool) -> None:
        """Decide at exit ``layer`` for logits (C, K); everybody leaves at the ``last``."""
        if self.fused and kernels.usable(logits):
            index = min(layer, self.gates.n_gates - 1)  # the last exit has no gate: none is read
            gate = (self.gates.weight[index], self.gates.bias[index])
            state = (self.samples, self.given_away, self.answers, self.exits, self.checks)
            kernels.leave(logits, *gate, *state, layer, self.model == "direct", last)
            return
        logits, leaves = logits.float(), self.samples >= 0
        if not last:
            gate = self.gates.one(layer, uncertainty_features(logits)).float().sigmoid()
            leaves = leaves & leaves_here(gate, self.given_away, self.model)
            self.given_away = self.given_away + gate
        else:
            self.checks[0] += torch.where(leaves, self.given_away, 0.0).sum()
        to = torch.where(leaves, self.samples, self.n).long()
        self.answers.index_copy_(0, to, logits)
        self.exits.index_fill_(0, to, layer)
        self.samples = self.samples.masked_fill(leaves, -1)

    def close_up(self, h: Tensor, keep: int, may_write: bool = False) -> Tensor:
        """(C, ...) -> (C', ...), C' = ``keep`` < C; with ``may_write`` perhaps in the memory of h."""
        if self.fused and may_write and h.is_contiguous() and kernels.usable(h):
            h = kernels.close_up(h, self.samples, self.given_away, keep)
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

    def finish(self) -> Tensor:
        """(N, K) float32 softmax of the answers; completes ``checks``. Once, at the end."""
        if self.fused:
            return kernels.finish(self.answers, self.exits, self.count, self.checks, self.n)
        probabilities = self.answers[:-1].softmax(-1)
        self.checks[0] += torch.where(self.real, probabilities.sum(-1), 0.0).sum()
        self.checks[1] += (self.real & (self.exits[: self.n] < 0)).sum()
        return probabilities
