"""Exit gates: one logistic regression on four uncertainty features per exit (JEI-DNN, section 4.1).

Legend: G gates, N samples, R runs that are trained side by side (another lambda each).

    g_l = sigmoid(w_l . u^l + b_l)         5 G numbers in all
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lab.exits.features import N_FEATURES


class ExitGates(nn.Module):
    """All gates of a network, perhaps of several runs.

    Args:
        n_gates: G, at least 1: exits without the last.
        runs: R; None: no such dimension.
        n_features: inputs of each gate.
        generator: for the initial weights, U(-1/2, 1/2) as PyTorch's linear layers have for 4 inputs; equal in all
            runs.
    """

    def __init__(
        self,
        n_gates: int,
        *,
        runs: int | None = None,
        n_features: int = N_FEATURES,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if n_gates < 1 or n_features < 1 or (runs is not None and runs < 1):
            raise ValueError(f"need n_gates, n_features and runs of at least 1, got {n_gates}, {n_features} and {runs}")
        self.n_gates, self.runs = n_gates, runs
        bound = n_features**-0.5
        weight = torch.empty(n_gates, n_features).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(n_gates).uniform_(-bound, bound, generator=generator)
        if runs is not None:
            weight, bias = weight.expand(runs, -1, -1).clone(), bias.expand(runs, -1).clone()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: Tensor) -> Tensor:
        """features (N, G, 4), or (R, N, G, 4) with runs -> gate logits of the same leading shape, (..., N, G)."""
        if self.runs is None:
            return (features * self.weight).sum(-1) + self.bias
        return (features * self.weight.unsqueeze(1)).sum(-1) + self.bias.unsqueeze(1)

    def one(self, index: int, features: Tensor) -> Tensor:
        """Gate ``index`` alone, without runs: features (N, 4) -> logits (N,)."""
        return (features * self.weight[index]).sum(-1) + self.bias[index]  # no product: autocast would round it
