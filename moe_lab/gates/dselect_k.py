"""DSelect-k (Hazimeh et al., NeurIPS 2021): k differentiable selectors, each picking an expert by its binary code.

Symbols: m = ceil(log2 E) bits, most significant first; z (T, m, K) code logits; S smooth-step of width gamma.

    r_ij(x) = prod_t  S(z_tj) if bit t of i is 1 else S(-z_tj)        selector j on expert i
    g_i(x)  = sum_j softmax_j(x W + b) r_ij                           selectors mixed

All experts whose codes share a bit share the hyperplane of that bit: a tree with one split per *level* (COMET: one per
node). If E is no power of two some codes belong to nobody and rows sum to less than 1. Loss ``code_mass``, the mean of
sum_j 1/(1e-6 + sum_i r_ij), pushes probability to codes that exist (its best value is K).

Where we differ: the authors' code *sums* ``code_mass`` over the batch, so its strength follows the batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.base import Affine, Gate, uniform_
from moe_lab.gates.losses import mean_over_tokens, selection_entropy
from moe_lab.gates.smooth_step import smooth_step
from moe_lab.routing import Routing


def code_probabilities(code_logits: Tensor, gamma: float, n_experts: int) -> Tensor:
    """r (E, K, T) of code logits (m, K, T): codes in counting order, those from ``n_experts`` on cut off."""
    steps = smooth_step(torch.stack((-code_logits, code_logits), 1), gamma)  # (m, 2, K, T): bit 0, bit 1
    r = code_logits.new_ones(1, *code_logits.shape[1:])
    for bit in steps:
        r = (r.unsqueeze(1) * bit).flatten(0, 1)
    return r[:n_experts]


class DSelectKGate(Gate):
    """DSelect-k gate.

    Args:
        in_features: D, or None for a static gate.
        n_experts: E, any number.
        k: selectors; once they have converged a row has at most k non-zeros (not before).
        gamma: width of the smooth-step; code logits start in U(-gamma/100, gamma/100).
        generator: for the initial weights.

    Losses in training mode: ``entropy`` of the selectors; ``code_mass`` if E is no power of two.
    Details: ``tree_probabilities`` r (T, E, K), ``tree_weights`` (T, E, K) whose sum over K is ``weights``.
    """

    def __init__(
        self,
        in_features: int | None,
        n_experts: int,
        k: int,
        gamma: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, k, in_features)
        if not gamma > 0:
            raise ValueError(f"gamma, the width of the smooth-step, must be positive; got {gamma}")
        self.gamma = float(gamma)
        n_bits = (n_experts - 1).bit_length()
        code, mix = uniform_(gamma / 100, generator), uniform_(0.05, generator)
        self.code = Affine(in_features, (n_bits, k), weight_init=code, bias_init=code)
        self.mixture = Affine(in_features, (k,), weight_init=mix, bias_init=mix)

    def forward(self, x: Tensor | None = None) -> Routing:
        """x (T, D) -> Routing."""
        r = code_probabilities(self.code.tokens_last(x), self.gamma, self.n_experts)
        tree_weights = r * self.mixture.tokens_last(x).softmax(0)
        losses = {}
        if self.training:
            losses["entropy"] = selection_entropy(r)
            if self.n_experts & (self.n_experts - 1):
                losses["code_mass"] = mean_over_tokens((1 / (r.sum(0) + 1e-6)).sum(0))
        details = {"tree_probabilities": r.movedim(-1, 0), "tree_weights": tree_weights.movedim(-1, 0)}
        return Routing(tree_weights.sum(1).T, losses, details)

    @classmethod
    def from_arrays(
        cls, code_weight, code_bias, mixture_weight, mixture_bias, *, n_experts: int, gamma: float
    ) -> DSelectKGate:
        """Bring in a gate trained elsewhere.

        Args:
            code_weight: (m, D, K), most significant bit first; None for a static gate.
            code_bias: (m, K).
            mixture_weight: (D, K), or None.
            mixture_bias: (K,).
            n_experts: E; must need exactly m bits.
            gamma: width it was trained with.

        Raises:
            ValueError: shapes do not fit each other.
        """
        code_bias, mixture_bias = torch.as_tensor(code_bias), torch.as_tensor(mixture_bias)
        if code_bias.dim() != 2 or code_bias.shape[0] != (n_experts - 1).bit_length():
            raise ValueError(
                f"{n_experts} experts need a code_bias of shape ({(n_experts - 1).bit_length()}, k), "
                f"got {tuple(code_bias.shape)}"
            )
        in_features = None if code_weight is None else torch.as_tensor(code_weight).shape[1]
        gate = cls(in_features, n_experts, code_bias.shape[1], gamma).to(code_bias.dtype)
        gate.code.load_arrays(code_weight, code_bias)
        transposed = None if mixture_weight is None else torch.as_tensor(mixture_weight).T
        gate.mixture.load_arrays(transposed, mixture_bias)
        return gate
