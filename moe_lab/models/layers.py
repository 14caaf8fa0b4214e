"""Small layers with Keras's defaults, which the COMET authors used: Glorot uniform weights, zero biases."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from moe_lab.experts.base import glorot_uniform_


def dense(d: int, f: int, generator: torch.Generator | None = None) -> nn.Linear:
    """A linear layer d -> f, Glorot uniform, bias 0."""
    layer = nn.Linear(d, f)
    glorot_uniform_(layer.weight, d, f, generator)
    nn.init.zeros_(layer.bias)
    return layer


def head(sizes: tuple[int, ...], generator: torch.Generator | None = None) -> nn.Sequential:
    """Dense layers of these widths with ReLU between them (none behind the last)."""
    layers: list[nn.Module] = []
    for d, f in itertools.pairwise(sizes):
        layers += [dense(d, f, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
