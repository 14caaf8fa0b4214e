"""A bank of multi-layer perceptrons (COMET paper §5.2: Dense + ReLU + dropout for the recommenders).

Legend: N rows, E experts, D inputs, F outputs.

    f_e(x) = dropout(relu(x W_e + b_e)),   W (E, D, F), b (E, F); deeper experts repeat it
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_lab.experts.base import ExpertBank, check_counts, glorot_uniform_
from moe_lab.experts.dropout import dropout, relu_dropout_
from moe_lab.experts.grouped import grouped_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "tanh": torch.tanh,
}


class MLPExperts(ExpertBank):
    """E perceptrons of one shape.

    Args:
        n_experts: E.
        sizes: layer widths from input to output; (256, 256) is one dense layer, (256, 1024, 256) has two.
        activation: "relu", "gelu" or "tanh", after every layer but the last.
        activate_last: also after the last one (the paper's experts do).
        dropout: probability of dropping a number behind each activation, drawn for each (token, expert) pair;
            in training only. See `moe_lab.experts.dropout` for its resolution.
        generator: for the initial weights (Glorot uniform, biases 0).
    """

    def __init__(
        self,
        n_experts: int,
        sizes: Sequence[int],
        activation: str = "relu",
        activate_last: bool = True,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if n_experts < 1 or len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"need n_experts >= 1 and at least two positive sizes; got n_experts={n_experts}, sizes={tuple(sizes)}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {dropout}")
        if activation not in ACTIVATIONS:
            nearest = difflib.get_close_matches(activation, ACTIVATIONS, 1, 0)[0]
            raise ValueError(
                f"unknown activation {activation!r}; did you mean {nearest!r}? Valid: {', '.join(ACTIVATIONS)}"
            )
        self.n_experts, self.sizes, self.out_features = n_experts, tuple(sizes), sizes[-1]
        self.activation, self.activate_last, self.dropout = activation, activate_last, dropout
        layers = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList(
            nn.Parameter(glorot_uniform_(torch.empty(n_experts, d, f), d, f, generator)) for d, f in layers
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n_experts, f)) for _, f in layers)

    def _after(self, layer: int, x: Tensor) -> Tensor:
        if layer == len(self.weights) - 1 and not self.activate_last:
            return x
        if self.activation == "relu":  # x comes from a linear layer, whose backward does not need it
            return relu_dropout_(x, self.dropout, self.training)
        return dropout(ACTIVATIONS[self.activation](x), self.dropout, self.training)

    def forward(self, x: Tensor, counts: Sequence[int] | Tensor | None = None) -> Tensor:
        """x (N, D) sorted by expert, counts (E,) -> (N, F); None: every expert on all x (T, D) -> (E * T, F)."""
        counts = check_counts(counts, x.shape[0], self.n_experts)
        rows = [x.shape[0]] * self.n_experts if counts is None else counts
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = self._after(layer, grouped_linear(x, weight, bias, counts if layer == 0 else rows))
        return x

    def single(self, expert: int, x: Tensor) -> Tensor:
        """Expert ``expert`` on every row of x (T, D) -> (T, F), in plain layers."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = self._after(layer, nn.functional.linear(x, weight[expert].T, bias[expert]))
        return x

    def extra_repr(self) -> str:
        kind = f"sizes={self.sizes}, activation={self.activation}"
        return f"n_experts={self.n_experts}, {kind}, dropout={self.dropout}"
