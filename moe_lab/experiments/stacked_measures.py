"""AUC and routing statistics of many models at once, on the device: the numbers of `metrics`, K at a time.

Legend: K models, N rows, E experts, J trees.

Measured one by one on the CPU they would cost as much as a stacked epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lab.metrics.routing import RoutingTally


def auc_each(score: Tensor, label: Tensor) -> Tensor:
    """(K,) `auc` of each row of scores, float64; NaN where a score is not finite.

        AUC = (sum of the ranks of positive rows - P (P + 1) / 2) / (P (N - P)),   equal scores share their mean rank

    Args:
        score: (K, N).
        label: (N,) 0 or 1, P of them 1.

    Raises:
        ValueError: labels of one kind only.
    """
    positive = label > 0
    n_positive = int(positive.sum())
    n_negative = len(label) - n_positive
    if n_positive == 0 or n_negative == 0:
        raise ValueError(f"all {len(label)} labels are {float(label[0]):g}: an AUC needs both kinds")
    ordered = score.sort(1).values
    mine = score[:, positive].contiguous()
    below = torch.searchsorted(ordered, mine)
    up_to = torch.searchsorted(ordered, mine, right=True)
    ranks = (below + 1 + up_to).double().sum(1) / 2
    area = (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return torch.where(score.isfinite().all(1), area, torch.nan)


def batchwise_mse_each(prediction: Tensor, target: Tensor, mask: Tensor, batch_size: int) -> Tensor:
    """(K,) `batchwise_masked_mse` of each row of predictions, float64.

    Args:
        prediction: (K, N).
        target, mask: (N,).
        batch_size: rows per batch.
    """
    n_rows = len(mask)
    batch = torch.arange(n_rows, device=mask.device) // batch_size
    error = torch.where(mask, prediction.double() - torch.where(mask, target.double(), 0), 0).square()
    n_batches = -(-n_rows // batch_size)
    sums = error.new_zeros(len(prediction), n_batches).index_add_(1, batch, error)
    rated = torch.bincount(batch[mask], minlength=n_batches).clamp(min=1)
    sizes = torch.bincount(batch, minlength=n_batches)
    return (sums / rated * sizes).sum(1) / n_rows


class StackedTally:
    """`RoutingTally` of one gate of each of K models: counted together, summarised one by one."""

    def __init__(self, k: int):
        self.k = k
        self._rows = self._trees = 0
        self._counts: dict[str, Tensor] = {}

    def _count(self, name: str, value: Tensor) -> None:
        self._counts[name] = self._counts[name] + value if name in self._counts else value

    def add(self, weights: Tensor, trees: Tensor | None) -> None:
        """Count a batch: weights (K, N, E), tree probabilities (K, N, E, J) or None."""
        active = weights != 0
        per_row = active.sum(-1)
        histogram = torch.zeros(len(weights), weights.shape[-1] + 1, dtype=torch.int64, device=weights.device)
        self._count("histogram", histogram.scatter_add_(1, per_row, torch.ones_like(per_row)))
        self._count("routed", active.sum(1))
        self._count("weight", weights.double().sum(1))
        if trees is not None:
            self._count("hard_trees", ((trees > 0).sum(2) == 1).sum((1, 2)))
            self._trees += trees.shape[1] * trees.shape[3]
        error = (weights.sum(-1) - 1).abs().amax(1)
        self._counts["mass_error"] = torch.maximum(self._counts.get("mass_error", error), error)
        self._rows += weights.shape[1]

    def summaries(self) -> list[dict[str, Any]]:
        """`RoutingTally.summary` of each model."""
        counts = {name: value.cpu() for name, value in self._counts.items()}
        answers = []
        for row in range(len(counts["histogram"])):
            tally = RoutingTally(self.k)
            tally.rows, tally.trees = self._rows, self._trees
            tally.hard_trees = int(counts["hard_trees"][row]) if self._trees else 0
            tally.mass_error = float(counts["mass_error"][row])
            tally.histogram, tally.routed, tally.weight = (
                counts[name][row] for name in ("histogram", "routed", "weight")
            )
            answers.append(tally.summary())
        return answers
