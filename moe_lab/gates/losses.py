"""Regularisers of gates: pure functions of logits, scores or probabilities, each a scalar without coefficient.

Legend: T tokens, E experts, K trees or selectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-6  # inside the logarithm, as in the COMET authors' code: keeps the slope finite where p reaches 0


def mean_over_tokens(values: Tensor) -> Tensor:
    """Mean over the first dimension of (T, ...); 0 where T is 0."""
    return values.sum(0) / max(values.shape[0], 1)


def load_balancing_loss(scores: Tensor, active: Tensor) -> Tensor:
    """E * sum_i f_i P_i (Fedus et al. 2022, eq. 4): exactly 1 at perfect balance, E when one expert gets everything.

    0 for no tokens (as every loss here: an empty batch is no reason for NaN).

    Args:
        scores: (T, E) softmax over all experts; P_i is its mean over tokens and carries the gradient.
        active: (T, E) bool, the chosen experts; f_i is expert i's share of all choices and carries none.
    """
    counts = active.sum(0).to(scores.dtype)
    share = counts / counts.sum().clamp(min=1)
    return scores.shape[-1] * (share * mean_over_tokens(scores)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens (Zoph et al. 2022, eq. 5): keeps logits (T, E) from growing."""
    return mean_over_tokens(torch.logsumexp(logits, -1).square())


def selection_entropy(probabilities: Tensor) -> Tensor:
    """Mean over tokens of sum_{j,l} -p log(p + 1e-6), nats; probabilities (E, K, T), each tree's E values sum to 1.

    COMET's and DSelect-k's entropy term: K log E when every tree spreads evenly, 0 (to 1e-6) when every tree is hard.
    Duplicating the batch changes nothing.
    """
    return -(probabilities * (probabilities + _EPSILON).log()).sum() / max(probabilities.shape[-1], 1)
