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


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)  # -p ln p in one pass; 0 ln 0 = 0


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
    # A dozen small operations, where a log-softmax for each entropy took twenty: 24 instead of 46 microseconds for one
    # sample, which is what counts in `MultiExitNetwork.predict` (10 classes, one core).
    p = logits.softmax(-1)
    squares = p * p
    first, second = p.topk(2, -1).values.unbind(-1)
    entropies = _entropy(p), _entropy(squares / squares.sum(-1, keepdim=True))
    if scale:
        entropies = tuple(entropy / math.log(logits.shape[-1]) for entropy in entropies)
    return torch.stack((first, entropies[0], first - second, entropies[1]), -1)
