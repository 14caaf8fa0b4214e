"""Linear inference modules on cached features of a frozen backbone, without gates: what baselines build on.

Legend: B batch, L exits, G = L - 1, D feature width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearExits(nn.Module):
    """One linear module per exit but the last, on cached features of a frozen backbone; no gates.

    Args:
        n_exits: L, at least 2.
        width: D, the same at all exits.
        n_classes: K, at least 2.
        generator: for initial weights; from the same state `JointExits` draws the same ones.
    """

    def __init__(self, n_exits: int, width: int, n_classes: int, *, generator: torch.Generator | None = None):
        super().__init__()
        if n_exits < 2 or width < 1 or n_classes < 2:
            raise ValueError(
                f"need at least 2 exits, 1 feature and 2 classes, got n_exits={n_exits}, width={width}, "
                f"n_classes={n_classes}"
            )
        self.n_exits, self.width, self.n_classes = n_exits, width, n_classes
        bound = width**-0.5
        weight = torch.empty(n_exits - 1, width, n_classes).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(n_exits - 1, n_classes))

    def modules_at(self, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, G, K) logits of the trained modules with these parameters, (G, D, K) and (G, K).

        Raises:
            ValueError: features are not (B, L, D).
        """
        if features.dim() != 3 or tuple(features.shape[1:]) != (self.n_exits, self.width):
            raise ValueError(
                f"features must be (batch, {self.n_exits} exits, {self.width} numbers), got {tuple(features.shape)}"
            )
        return torch.einsum("bgd,gdk->bgk", features[:, :-1], weight) + bias

    def logits(self, features: Tensor, last: Tensor) -> Tensor:
        """features (B, L, D), last (B, K): logits of the frozen last head -> (B, L, K)."""
        own = self.modules_at(features, self.weight, self.bias)
        return torch.cat((own, last.unsqueeze(1).to(own.dtype)), 1)
