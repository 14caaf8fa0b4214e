"""Does 80 % confidence mean 80 % right? Calibration of predicted probabilities.

Legend: N samples, B bins, n_b samples, acc_b accuracy and conf_b mean confidence of bin b.

    ECE = sum_b n_b / N |acc_b - conf_b|

Once over the whole data set: ECE is biased upward in small samples. Perfectly calibrated confidences, uniform on
[.5, 1], have an ECE of 0.003 at N = 100,000 and of 0.15 as a mean over batches of 64 (the artefact in JEI-DNN's
published comparison; ``per_batch`` switches it on). The other artefact is a softmax applied twice:
`double_softmax`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor


def _edges(confidence: np.ndarray, n_bins: int, equal_mass: bool) -> np.ndarray:
    if not equal_mass:
        return np.linspace(0, 1, n_bins + 1)
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, n_bins + 1)))  # ties make bins fall together
    return edges if len(edges) > 1 else np.array([edges[0] - 1e-9, edges[0] + 1e-9])


def _bins(confidence: Tensor, right: Tensor, n_bins: int, equal_mass: bool) -> tuple[np.ndarray, ...]:
    """low, high, share, confidence, accuracy of the bins that are not empty."""
    c, r = confidence.detach().cpu().double().numpy(), right.detach().cpu().double().numpy()
    if len(c) == 0:
        raise ValueError("calibration needs at least one sample")
    if c.min() < 0 or c.max() > 1 + 1e-6:
        raise ValueError("confidences are probabilities in [0, 1]; were these logits?")
    edges = _edges(c, n_bins, equal_mass)
    place = np.clip(np.searchsorted(edges, c, side="left") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    used = counts > 0
    mean = [np.bincount(place, values, minlength=len(edges) - 1)[used] / counts[used] for values in (c, r)]
    return edges[:-1][used], edges[1:][used], counts[used] / len(c), *mean


def reliability(confidence: Tensor, right: Tensor, *, n_bins: int = 15, equal_mass: bool = True) -> pd.DataFrame:
    """One row per bin that is not empty.

    Args:
        confidence: (N,) of the predicted class, in [0, 1].
        right: (N,) bool.
        n_bins: B.
        equal_mass: bins of equally many samples, else of equal width.

    Returns:
        columns low, high (edges), share (of samples), confidence, accuracy.

    Raises:
        ValueError: no samples, or confidences outside [0, 1].
    """
    names = ("low", "high", "share", "confidence", "accuracy")
    return pd.DataFrame(dict(zip(names, _bins(confidence, right, n_bins, equal_mass), strict=True)))


def expected_calibration_error(
    confidence: Tensor, right: Tensor, *, n_bins: int = 15, equal_mass: bool = True, per_batch: int | None = None
) -> float:
    """ECE, in [0, 1].

    Args:
        confidence, right, n_bins, equal_mass: see `reliability`.
        per_batch: mean of the ECE of batches of this size (the published artefact); None: of the whole set.
    """
    if per_batch is not None:
        batches = zip(confidence.split(per_batch), right.split(per_batch), strict=True)
        return float(
            np.mean([expected_calibration_error(c, r, n_bins=n_bins, equal_mass=equal_mass) for c, r in batches])
        )
    _, _, share, mean, accuracy = _bins(confidence, right, n_bins, equal_mass)
    return float((share * np.abs(accuracy - mean)).sum())


def double_softmax(probabilities: Tensor) -> Tensor:
    """What comes out when probabilities are taken for logits: with K classes no confidence above e / (e + K - 1)."""
    return probabilities.softmax(-1)


def best_temperature(logits: Tensor, labels: Tensor, *, low: float = 0.05, high: float = 20.0) -> float:
    """The temperature T that minimises the cross entropy of logits / T (Guo et al. 2017), by a bounded search.

    Args:
        logits: (N, K).
        labels: (N,) int64.
        low, high: ends of the search, in T.
    """
    logits = logits.double()

    def loss(log_t: float) -> float:
        return torch.nn.functional.cross_entropy(logits / np.exp(log_t), labels).item()

    found = minimize_scalar(loss, bounds=(np.log(low), np.log(high)), method="bounded")
    return float(np.exp(found.x))


def exit_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """(L,) float64: the best temperature of every exit on its own; logits (N, L, K), labels (N,)."""
    return torch.tensor([best_temperature(logits[:, level], labels) for level in range(logits.shape[1])]).double()
