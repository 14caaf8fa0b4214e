"""BASE layer: tokens are *assigned*, so that every expert gets the same number (Lewis et al., ICML 2021).

Legend: T tokens, E experts, D width.

    s_te = x_t . c_e,  c_e centroids (orthogonal start)
    training:    a = argmax of sum_t s_{t, a_t} over assignments with ceil or floor of T/E tokens per expert
    evaluation:  a_t = argmax_e s_te                                     (greedy: no token depends on another)
    g_{t, a_t} = sigmoid(s_{t, a_t}),  0 elsewhere

No balancing loss: balance is a constraint. The assignment has no gradient; centroids learn through the sigmoid.

Where we differ: the EvoMoE authors' BASE experts are deep residual stacks with a residual of their own. Here a gate is
a gate: the same experts and the same single residual connection as for every other gate, so that gates are compared.
The assignment is exact (Hungarian method, on the CPU), theirs an auction. Its cost grows with the cube of the tokens:
``group`` assigns so many at a time, as each of their devices does; balance then holds within each group.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from moe_lab.gates.base import Gate
from moe_lab.routing import Routing

_FORBIDDEN = 1e9


@torch.no_grad()
def balanced_assignment(scores: Tensor) -> Tensor:
    """The assignment with the largest total score among those that are balanced.

    Args:
        scores: (T, E).

    Returns:
        (T,) int64; every expert gets floor(T/E) or ceil(T/E) tokens.
    """
    n_tokens, n_experts = scores.shape
    places = math.ceil(n_tokens / n_experts)
    profit = np.repeat(scores.detach().cpu().double().numpy(), places, axis=1)
    missing = places * n_experts - n_tokens  # below E: one expert leaves at most one of its places empty
    if missing:
        empty = np.full((missing, profit.shape[1]), -_FORBIDDEN)
        empty[:, ::places] = 0.0
        profit = np.vstack((profit, empty))
    _, place = linear_sum_assignment(profit, maximize=True)
    return torch.from_numpy(place[:n_tokens] // places).to(scores.device)


class Centroids(nn.Module):
    """Scores s = x C^T of tokens against one vector per expert; computed in float32 at least, also under autocast."""

    def __init__(
        self, in_features: int, n_experts: int, *, gain: float = 0.1, generator: torch.Generator | None = None
    ):
        super().__init__()
        start = torch.empty(n_experts, in_features)
        nn.init.orthogonal_(start, gain=gain, generator=generator)
        self.weight = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, E)."""
        dtype = torch.float64 if torch.float64 in (x.dtype, self.weight.dtype) else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return x.to(dtype) @ self.weight.to(dtype).T


def one_expert_weights(scores: Tensor, expert: Tensor) -> Tensor:
    """(T, E) weights: sigmoid of the chosen score at the chosen expert (T,), 0 elsewhere."""
    index = expert.unsqueeze(-1)
    return torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index).sigmoid())


class BaseLayerGate(Gate):
    """Balanced assignment in training, greedy in evaluation.

    Args:
        in_features: D. There is no static form: tokens that are all alike cannot be assigned.
        n_experts: E.
        group: tokens that are assigned together; None: all of a batch.
        generator: for the initial centroids.

    Details: ``scores`` s (T, E).
    """

    def __init__(
        self,
        in_features: int,
        n_experts: int,
        *,
        group: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, 1, in_features)
        if in_features is None:
            raise ValueError("a BASE layer is per example: it needs in_features")
        if group is not None and group < n_experts:
            raise ValueError(f"group must be at least n_experts = {n_experts}, or None for all tokens; got {group}")
        self.group = group
        self.centroids = Centroids(in_features, n_experts, generator=generator)

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing with exactly one expert per row."""
        scores = self.centroids(x)
        expert = self._assigned(scores) if self.training and len(scores) else scores.argmax(-1)
        return Routing(one_expert_weights(scores, expert), {}, {"scores": scores})

    def _assigned(self, scores: Tensor) -> Tensor:
        return torch.cat([balanced_assignment(some) for some in scores.split(self.group or len(scores))])
