"""How sure is an inference module? Four numbers of its softmax that an exit gate sees (JEI-DNN, section 4.1).

Legend: K classes, p the softmax of K logits, sorted p_(1) >= p_(2) >= ...

    u_1 = p_(1)                        largest probability
    u_2 = -sum_k p_k ln p_k            entropy, nats
    u_3 = p_(1) - p_(2)                margin
    u_4 = -sum_k r_k ln r_k            entropy of r = p^2 / sum p^2, which is the softmax of *twice* the logits

One-hot: (1, 0, 1, 0). Uniform: (1/K, ln K, 0, ln K). Always u_4 <= u_2.

No gradient reaches the logits: a gate must not change the module that it judges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

N_FEATURES = 4


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)  # 0 ln 0 = 0, also where ln p is -inf


@torch.no_grad()
def uncertainty_features(logits: Tensor, *, scale: bool = False) -> Tensor:
    """u_1 .. u_4 of logits.

    Args:
        logits: (..., K), K at least 2.
        scale: divide the entropies by ln K, so that all four lie in [0, 1] (ours; helps for hundreds of classes).

    Returns:
        (..., 4), in float32 at least, without gradient.

    Raises:
        ValueError: a single class.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"uncertainty needs at least 2 classes, got {logits.shape[-1]}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    first, second = logits.softmax(-1).topk(2, -1).values.unbind(-1)
    entropies = _entropy(logits), _entropy(2 * logits)
    if scale:
        entropies = tuple(entropy / math.log(logits.shape[-1]) for entropy in entropies)
    return torch.stack((first, entropies[0], first - second, entropies[1]), -1)
