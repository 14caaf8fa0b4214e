"""Expert choice: experts choose tokens, not tokens experts (Zhou et al., NeurIPS 2022).

Legend: T tokens, E experts.

    P = softmax over experts of x W;   each expert keeps its C = floor(factor * T / E) largest P[:, e]
    g_te = P_te where expert e kept token t, 0 elsewhere

Perfectly balanced, no balancing loss; a token gets any number of experts, also none. The price: who is chosen depends
on *all* tokens of the batch, later ones too. In a language model that is a look into the future: label its loss as
such.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lab.gates.base import Gate
from moe_lab.gates.losses import router_z_loss
from moe_lab.gates.softmax import glorot_affine
from moe_lab.routing import Routing


class ExpertChoiceGate(Gate):
    """Each expert takes its best tokens.

    Args:
        in_features: D. There is no static form: all tokens would be alike, and experts could not choose.
        n_experts: E.
        capacity_factor: mean number of experts per token.
        generator: for the initial weights.

    Losses in training: ``z``. Details: ``scores`` P (T, E).
    """

    def __init__(
        self,
        in_features: int,
        n_experts: int,
        *,
        capacity_factor: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, max(1, math.ceil(capacity_factor)), in_features)
        if in_features is None:
            raise ValueError("expert choice is per example: it needs in_features")
        if not 0 < capacity_factor <= n_experts:
            raise ValueError(f"capacity_factor must be in (0, {n_experts}] (experts per token), got {capacity_factor}")
        self.capacity_factor = capacity_factor
        self.logits = glorot_affine(in_features, n_experts, generator)

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing; every column has exactly min(T, max(1, floor(factor T / E))) non-zeros."""
        logits = self.logits(x)
        scores = logits.softmax(-1)
        n_tokens = x.shape[0]
        taken = min(n_tokens, max(1, math.floor(self.capacity_factor * n_tokens / self.n_experts)))
        tokens = scores.topk(taken, dim=0).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(0, tokens, True)
        losses = {"z": router_z_loss(logits)} if self.training else {}
        return Routing(scores * mask, losses, {"scores": scores})
