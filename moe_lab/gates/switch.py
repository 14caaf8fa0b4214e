"""Switch routing: the single best expert, capacity, tokens dropped (Fedus et al., JMLR 2022).

Legend: T tokens, E experts.

    p = softmax(x W)        a = argmax p        g_a = p_a, 0 elsewhere
    an expert takes C = floor(factor * ceil(T / E)) tokens, in order; who does not fit has a row of zeros

The weight is the probability *before* the choice, below 1: that is how the router learns at k = 1. Losses in training:
``load_balance`` with shares counted before dropping (eq. 4 there), ``z``.

Where we differ: no capacity by default. Much of what separates Switch from other gates in the literature is dropping;
make it a deliberate switch. Theirs (and the EvoMoE authors') has factor 1.0.

Taught in notebook 09.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.base import Gate
from moe_lab.gates.capacity import admit, capacity, check_capacity_factor, dropped_share
from moe_lab.gates.losses import load_balancing_loss, router_z_loss
from moe_lab.gates.softmax import glorot_affine
from moe_lab.routing import Routing


class SwitchGate(Gate):
    """Top-1 gate with capacity.

    Args:
        in_features: D, or None for a static gate.
        n_experts: E.
        capacity_factor: times the fair share; None: nobody is dropped.
        drop_in_eval: apply the capacity in evaluation too.
        generator: for the initial weights.

    Details: ``scores`` p (T, E), ``dropped``: share of tokens without a place (scalar).
    """

    def __init__(
        self,
        in_features: int | None,
        n_experts: int,
        *,
        capacity_factor: float | None = None,
        drop_in_eval: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, 1, in_features)
        check_capacity_factor(capacity_factor)
        self.capacity_factor, self.drop_in_eval = capacity_factor, drop_in_eval
        self.logits = glorot_affine(in_features, n_experts, generator)

    def forward(self, x: Tensor | None = None) -> Routing:
        """x (T, D) -> Routing with one expert per row, or none."""
        logits = self.logits(x)
        p = logits.softmax(-1)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.argmax(-1, keepdim=True), True)
        kept = chosen
        if self.capacity_factor is not None and (self.training or self.drop_in_eval):
            kept = admit(chosen, capacity(self.capacity_factor, *p.shape))
        losses = {}
        if self.training:
            losses = {"load_balance": load_balancing_loss(p, chosen), "z": router_z_loss(logits)}
        return Routing(p * kept, losses, {"scores": p, "dropped": dropped_share(chosen, kept)}, most=1)
