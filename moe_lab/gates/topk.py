"""Top-k: keep the k largest logits, softmax over the kept, exact zeros elsewhere (Shazeer et al. 2017).

    h = x W + b  (+ eps * softplus(x W_n), eps ~ N(0, 1), only in training, only if asked for)
    g = softmax over the k kept entries of h, 0 elsewhere

Where we differ from the COMET authors' code: the kept set is held as indices. Theirs marks "value after scattering is
0", so a chosen logit of exactly 0 disappears and an all-zero row becomes NaN. Their configurations use neither noise
nor a balancing loss; both are here because most of the literature does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lab.gates.base import Affine, Gate
from moe_lab.gates.losses import load_balancing_loss, router_z_loss
from moe_lab.gates.softmax import glorot_affine
from moe_lab.routing import Routing


class TopKGate(Gate):
    """Noisy top-k gate.

    Args:
        in_features: D, or None for a static gate.
        n_experts: E.
        k: experts per token; more than E means E.
        noise: add learned Gaussian noise to the logits in training (W_n starts at 0: standard deviation log 2).
        renormalise: True: softmax over the kept logits, rows sum to 1. False: the kept entries of the softmax over all
            experts (as Switch does), rows sum to less than 1.
        generator: for the initial weights.

    Raises:
        ValueError: k = 1 with ``renormalise``: the kept softmax is then the constant 1, no gradient reaches the gate.

    Losses in training mode: ``load_balance`` (1 at perfect balance), ``z``.
    """

    def __init__(
        self,
        in_features: int | None,
        n_experts: int,
        k: int,
        *,
        noise: bool = False,
        renormalise: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, min(k, n_experts), in_features)
        if self.k == 1 and n_experts > 1 and renormalise:
            raise ValueError(
                "top-1 with renormalise=True always has weight 1, so the gate gets no gradient: "
                "choose k >= 2, or renormalise=False (weight = probability before the selection)"
            )
        self.renormalise = renormalise
        self.logits = glorot_affine(in_features, n_experts, generator)
        self.noise_scale = None
        if noise:
            zero = torch.Tensor.zero_
            self.noise_scale = Affine(in_features, (n_experts,), weight_init=zero, bias_init=zero)

    def forward(self, x: Tensor | None = None, *, generator: torch.Generator | None = None) -> Routing:
        """x (T, D) -> Routing with exactly min(k, E) chosen experts per row.

        ``generator`` draws the noise (default: torch's global one).
        """
        logits = self.logits(x)
        if self.training and self.noise_scale is not None:
            noise = torch.randn(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
            logits = logits + noise * nn.functional.softplus(self.noise_scale(x))
        kept, experts = logits.topk(self.k, dim=-1)
        values = kept.softmax(-1) if self.renormalise else logits.softmax(-1).gather(-1, experts)
        weights = torch.zeros_like(logits).scatter(-1, experts, values)
        losses = {}
        if self.training:
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, experts, True)
            losses = {
                "load_balance": load_balancing_loss(logits.softmax(-1), chosen),
                "z": router_z_loss(logits),
            }
        return Routing(weights, losses, most=self.k)
