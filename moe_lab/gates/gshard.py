"""GShard top-2: the best expert, and a second one that must be worth it (Lepikhin et al., ICLR 2021).

Legend: T tokens, E experts.

    p = softmax(x W);  first = argmax p;  second = argmax of the logits without the first, by ``second``:
        "sampling"  with Gumbel noise, training only      "random"  kept with probability min(1, 2 p_second)
        "best"      the plain second
    weights p_1, p_2 divided by their sum; an expert takes C = floor(factor * 2 * ceil(T / E)) tokens,
    all first choices before any second one. ``load_balance`` counts first choices.

A token whose second expert is full gives all its weight to the first (``normalise_after_dropping``, as in the EvoMoE
authors' code); GShard's paper normalises before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.base import Gate
from moe_lab.gates.capacity import admit, capacity, check_capacity_factor, dropped_share
from moe_lab.gates.dense_to_sparse import gumbel_like, one_hot_of_largest
from moe_lab.gates.losses import load_balancing_loss, router_z_loss
from moe_lab.gates.softmax import glorot_affine
from moe_lab.routing import Routing

SECOND = ("sampling", "random", "best")


class GShardGate(Gate):
    """Top-2 gate with capacity.

    Args:
        in_features: D, or None for a static gate.
        n_experts: E, at least 2.
        capacity_factor: times 2 ceil(T / E); None: nobody is dropped.
        second: how the second expert is found in training; in evaluation always "best".
        normalise_after_dropping: divide by the sum of what is left.
        drop_in_eval: apply the capacity in evaluation too.
        generator: for the initial weights.

    Details: ``scores`` p (T, E), ``dropped``: share of assignments without a place (scalar).
    """

    def __init__(
        self,
        in_features: int | None,
        n_experts: int,
        *,
        capacity_factor: float | None = None,
        second: str = "sampling",
        normalise_after_dropping: bool = True,
        drop_in_eval: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, 2, in_features)
        if n_experts < 2:
            raise ValueError("GShard chooses two experts: n_experts must be at least 2")
        if second not in SECOND:
            raise ValueError(f"second must be one of {', '.join(SECOND)}; got {second!r}")
        check_capacity_factor(capacity_factor)
        self.capacity_factor, self.second = capacity_factor, second
        self.normalise_after_dropping, self.drop_in_eval = normalise_after_dropping, drop_in_eval
        self.logits = glorot_affine(in_features, n_experts, generator)

    def forward(self, x: Tensor | None = None, *, generator: torch.Generator | None = None) -> Routing:
        """x (T, D) -> Routing with at most two experts per row. ``generator`` draws the noise of the second choice."""
        logits = self.logits(x)
        p = logits.softmax(-1)
        first = one_hot_of_largest(p)
        others = logits.masked_fill(first, -torch.inf)
        if self.training and self.second == "sampling":
            others = others + gumbel_like(logits, generator)
        second = one_hot_of_largest(others)
        if self.training and self.second == "random":
            draw = torch.empty_like(p[:, :1]).uniform_(generator=generator)
            second = second & (draw < 2 * (p * second).sum(-1, keepdim=True))
        chosen = first | second
        kept = chosen
        if self.capacity_factor is not None and (self.training or self.drop_in_eval):
            limit = capacity(self.capacity_factor, *p.shape, k=2)
            kept = admit(first, limit) | admit(second, limit, already=first.sum(0).clamp(max=limit))
        counted = kept if self.normalise_after_dropping else chosen
        total = (p * counted).sum(-1, keepdim=True)
        weights = p * kept / total.clamp(min=torch.finfo(p.dtype).tiny)
        losses = {}
        if self.training:
            losses = {"load_balance": load_balancing_loss(p, first), "z": router_z_loss(logits)}
        return Routing(weights, losses, {"scores": p, "dropped": dropped_share(chosen, kept)}, most=2)
