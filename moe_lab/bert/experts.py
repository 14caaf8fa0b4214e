"""A bank of experts made of BERT's feed-forward blocks.

Legend: N rows sorted by expert, T tokens, E experts, D width, W neurons per expert.

    z_e(a) = act(a W_1e + b_1e) W_2e + b_2e
    mix "after_norm":   f_e(a) = LayerNorm_e(a + dropout(z_e(a)))     a block with a norm of its own (COMET-BERT)
    mix "before_norm":  f_e(a) = z_e(a)                               residual and norm come after the mixture

Two ways to run. ``forward`` gives every expert its own rows. ``everywhere`` runs all experts on all tokens in two
batched products: for W = F/E that costs what the layer cost before it was split, and where launching kernels is what
takes the time (training on a GPU), it is the faster one; nothing in it waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_lab.experts.base import ExpertBank, check_counts
from moe_lab.experts.dropout import dropout
from moe_lab.experts.grouped import grouped_linear


class BlockExperts(ExpertBank):
    """E feed-forward layers, with or without residual and norm.

    Args:
        weights: W_1 (E, D, W), b_1 (E, W), W_2 (E, W, D), b_2 (E, D).
        activation: of the encoder.
        norm: the encoder's norm, copied to every expert; None for "before_norm".
        dropout: behind W_2 in training, drawn for each (token, expert) pair; needs ``norm``.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        activation: Callable[[Tensor], Tensor],
        norm: nn.LayerNorm | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        w1, b1, w2, b2 = (nn.Parameter(weight.detach().clone().contiguous()) for weight in weights)
        self.w1, self.b1, self.w2, self.b2 = w1, b1, w2, b2
        self.n_experts, self.out_features = b2.shape
        self.activation, self.dropout = activation, dropout
        self.norm_weight = self.norm_bias = None
        if norm is not None:
            self.eps = norm.eps
            self.norm_weight = nn.Parameter(norm.weight.detach().repeat(self.n_experts, 1))
            self.norm_bias = nn.Parameter(norm.bias.detach().repeat(self.n_experts, 1))

    def _end(self, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Dropout, residual and norm of one expert."""
        y = x + dropout(z, self.dropout, self.training)
        return nn.functional.layer_norm(y, (self.out_features,), weight, bias, self.eps)

    def forward(self, x: Tensor, counts: Sequence[int] | Tensor | None = None) -> Tensor:
        """x (N, D) sorted by expert, counts (E,) -> (N, D); None: every expert on all x (T, D) -> (E * T, D)."""
        counts = check_counts(counts, x.shape[0], self.n_experts)
        rows = [x.shape[0]] * self.n_experts if counts is None else counts
        z = grouped_linear(self.activation(grouped_linear(x, self.w1, self.b1, counts)), self.w2, self.b2, rows)
        if self.norm_weight is None:
            return z
        inputs = [x] * self.n_experts if counts is None else x.split(counts)
        norms = zip(self.norm_weight.unbind(0), self.norm_bias.unbind(0), strict=True)
        return torch.cat(
            [self._end(x_e, z_e, *norm) for x_e, z_e, norm in zip(inputs, z.split(rows), norms, strict=True)]
        )

    def everywhere(self, x: Tensor) -> Tensor:
        """Every expert on all rows of x (T, D) -> (E, T, D): ``forward`` without counts, in fewer kernels."""
        hidden = torch.baddbmm(self.b1.unsqueeze(1), x.expand(self.n_experts, -1, -1), self.w1)
        z = torch.baddbmm(self.b2.unsqueeze(1), self.activation(hidden), self.w2)
        if self.norm_weight is None:
            return z
        y = nn.functional.layer_norm(x + dropout(z, self.dropout, self.training), (self.out_features,), eps=self.eps)
        return torch.addcmul(self.norm_bias.unsqueeze(1), y, self.norm_weight.unsqueeze(1))

    def single(self, expert: int, x: Tensor) -> Tensor:
        """Expert ``expert`` on every row of x (T, D) -> (T, D), in plain layers."""
        hidden = self.activation(nn.functional.linear(x, self.w1[expert].T, self.b1[expert]))
        z = nn.functional.linear(hidden, self.w2[expert].T, self.b2[expert])
        return z if self.norm_weight is None else self._end(x, z, self.norm_weight[expert], self.norm_bias[expert])

    def extra_repr(self) -> str:
        _, width, neurons = self.w1.shape
        return f"n_experts={self.n_experts}, width={width}, neurons={neurons}, norm={self.norm_weight is not None}"
