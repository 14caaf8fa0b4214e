"""StableMoE: learn to route, then stop (Dai et al., ACL 2022).

Legend: T tokens, E experts, n_e tokens of expert e, n-bar = T/E; id the token's key (its word).

    stage 1, n < T_1:   a_t = argmax_e x_t . c_e            (greedy), weight sigmoid(x_t . c_{a_t})
        ``balance``     sum_e (n_e - n-bar)/n-bar * sum_{t at e} sigmoid(x_t . c_e) / T      (counts without gradient)
        ``distill``     cross entropy of a light router, z_t = Embedding(id_t), scores z_t . c'_e, towards a_t
    stage 2, n >= T_1:  a_t = argmax_e z_t . c'_e, frozen; only the weight sigmoid(x_t . c_{a_t}) still learns

The light router knows a token's word and nothing else, so in stage 2 a word always goes to the same expert: routing no
longer fluctuates. The authors' coefficients are 0.3 for both terms, stage 1 is the first tenth of training.

Where we differ: ``balance`` is a mean over tokens (theirs a sum, whose strength follows the batch size), and the expert
is the same as every other gate's (their code inserts a deep residual block).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_lab.gates.base import Gate
from moe_lab.gates.base_layer import Centroids, one_expert_weights
from moe_lab.routing import Routing


class StableGate(Gate):
    """Two stages: a learned router, distilled into a table-like one that is then frozen.

    Args:
        in_features: D.
        n_experts: E.
        n_keys: keys (token ids) are 0 .. n_keys - 1.
        stage_one_steps: T_1, at least 1.
        key_features: width of the light router's embedding; 50 in the authors' code.
        generator: for the initial weights.

    Called with a pair (x (T, D), keys (T,)). Losses in training: ``balance`` and ``distill`` (zero in stage 2).
    """

    gate_input = "features and keys"

    def __init__(
        self,
        in_features: int,
        n_experts: int,
        n_keys: int,
        *,
        stage_one_steps: int,
        key_features: int = 50,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, 1, in_features)
        if stage_one_steps < 1 or n_keys < 1:
            raise ValueError(f"need stage_one_steps >= 1 and n_keys >= 1, got {stage_one_steps} and {n_keys}")
        self.stage_one_steps = stage_one_steps
        self.centroids = Centroids(in_features, n_experts, generator=generator)
        table = torch.empty(n_keys, key_features).normal_(0.0, 0.1, generator=generator)
        self.key_embedding = nn.Parameter(table)
        self.key_centroids = Centroids(key_features, n_experts, gain=1.0, generator=generator)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(StableGate._after_load)
        self.is_frozen = False

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done; after the last of stage 1 the light router is frozen."""
        self.step += 1
        if not self.is_frozen and int(self.step) >= self.stage_one_steps:
            self._freeze()

    def _after_load(self, _) -> None:
        if int(self.step) >= self.stage_one_steps:
            self._freeze()

    def _freeze(self) -> None:
        self.is_frozen = True
        for parameter in (self.key_embedding, self.key_centroids.weight):
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser leaves parameters without a gradient alone: no decay, no momentum

    def forward(self, seen: tuple[Tensor, Tensor]) -> Routing:
        """(x (T, D), keys (T,)) -> Routing with exactly one expert per row."""
        x, keys = seen
        scores = self.centroids(x)
        light = self.key_centroids(self.key_embedding[keys])
        expert = (light if self.is_frozen else scores).argmax(-1)
        weights = one_expert_weights(scores, expert)
        losses = {}
        if self.training:
            zero = scores.new_zeros(())
            losses = {"balance": zero, "distill": zero}
            if not self.is_frozen:
                losses = {"balance": self._balance(weights), "distill": cross_entropy(light, expert)}
        return Routing(weights, losses, {"scores": scores}, most=1)

    def _balance(self, weights: Tensor) -> Tensor:
        fair = weights.shape[0] / self.n_experts
        excess = (weights.detach() != 0).sum(0).to(weights.dtype) / fair - 1
        return (excess * weights.sum(0)).sum() / max(weights.shape[0], 1)
