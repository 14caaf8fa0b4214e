"""Statistics of a gate over a whole split, gathered batch by batch.

Legend: N tokens, E experts, K trees.

Counts are of *exact* zeros: a weight of 1e-30 is an expert that runs. (The COMET authors' code counts weights < 1e-5.)
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lab.routing import Routing


class RoutingTally:
    """Adds up the Routings of one gate.

    Example::

        tally = RoutingTally(k=2)
        for batch in batches:
            tally.add(model(batch).routings[0])
        tally.summary()["experts_mean"]
    """

    def __init__(self, k: int):
        self.k = k
        self.rows = 0
        self.hard_trees = self.trees = 0
        self.mass_error = 0.0
        self.histogram = self.routed = self.weight = None

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Count one batch."""
        per_token = torch.bincount(routing.experts_per_token, minlength=routing.n_experts + 1)
        routed, weight = routing.active.sum(0), routing.weights.double().sum(0)
        if self.rows == 0:
            self.histogram, self.routed, self.weight = per_token, routed, weight
        else:
            self.histogram, self.routed, self.weight = (
                self.histogram + per_token,
                self.routed + routed,
                self.weight + weight,
            )
        self.rows += routing.weights.shape[0]
        self.mass_error = max(self.mass_error, float((routing.weights.sum(-1) - 1).abs().max()))
        leaves = routing.details.get("tree_probabilities")
        if leaves is not None:
            self.hard_trees += int(((leaves > 0).sum(1) == 1).sum())
            self.trees += leaves.shape[0] * leaves.shape[2]

    def summary(self) -> dict[str, Any]:
        """Plain numbers and lists.

        Returns:
            experts_mean, experts_max: experts per token. within_k: share of tokens with at most k experts.
            histogram: share of tokens with 0, 1, ... E experts. load: share of routed pairs per expert (sums to 1).
            importance: mean weight per expert. used: experts whose importance is at least a tenth of the fair share
                1/E.
            mass_error: largest distance of a row sum from 1.
            saturation: share of (token, tree) pairs that reach a single leaf, i.e. whose path is hard; only for
            gates with trees or selectors.

        Raises:
            ValueError: nothing was added.
        """
        if self.rows == 0:
            raise ValueError("no Routing was added: the split is empty")
        share = self.histogram.double() / self.rows
        n_experts = len(self.routed)
        importance = self.weight / self.rows
        summary = {
            "experts_mean": float((share * torch.arange(n_experts + 1, device=share.device)).sum()),
            "experts_max": int(self.histogram.nonzero().max()),
            "within_k": float(share[: self.k + 1].sum()),
            "histogram": share.tolist(),
            "load": (self.routed.double() / self.routed.sum().clamp(min=1)).tolist(),
            "importance": importance.tolist(),
            "used": int((importance >= 0.1 / n_experts).sum()),
            "mass_error": self.mass_error,
        }
        if self.trees:
            summary["saturation"] = self.hard_trees / self.trees
        return summary
