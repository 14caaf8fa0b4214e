"""The dense gate: every expert for every token.

    g(x) = softmax(x W + b)                                              (Jacobs et al. 1991)

W Glorot-uniform, b zero, as in the COMET authors' first public code. It is the upper bound in cost and, on small data,
often the best in accuracy: keep it in every table. A static gate starts from b ~ U(-0.05, 0.05).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.base import Affine, Gate, uniform_
from moe_lab.gates.losses import load_balancing_loss, router_z_loss
from moe_lab.routing import Routing


def glorot_affine(in_features: int | None, n_out: int, generator: torch.Generator | None) -> Affine:
    """Affine map with Keras' default start: Glorot-uniform weight, zero bias (a static one: U(-0.05, 0.05))."""
    bound = (6 / ((in_features or 1) + n_out)) ** 0.5
    bias_init = uniform_(0.05, generator) if in_features is None else torch.Tensor.zero_
    return Affine(in_features, (n_out,), weight_init=uniform_(bound, generator), bias_init=bias_init)


class SoftmaxGate(Gate):
    """Dense softmax gate.

    Args:
        in_features: D, or None for a static gate.
        n_experts: E; its ``k`` is E.
        generator: for the initial weights.

    Losses in training mode: ``load_balance`` (always 1: a dense gate chooses everybody), ``z``.
    """

    def __init__(self, in_features: int | None, n_experts: int, *, generator: torch.Generator | None = None):
        super().__init__(n_experts, n_experts, in_features)
        self.logits = glorot_affine(in_features, n_experts, generator)

    def forward(self, x: Tensor | None = None) -> Routing:
        """x (T, D) -> Routing with weights (T, E), all positive unless a logit lies 100 below the largest."""
        logits = self.logits(x)
        weights = logits.softmax(-1)
        losses = {}
        if self.training:
            losses = {
                "load_balance": load_balancing_loss(weights, weights != 0),
                "z": router_z_loss(logits),
            }
        return Routing(weights, losses, most=self.n_experts)
