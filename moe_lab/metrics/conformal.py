"""Split-conformal prediction sets for networks with exits.

Legend: n calibration samples, K classes, alpha the miscoverage one is ready to accept.

    score s = 1 - p_y at the exit taken;  q = the ceil((n + 1)(1 - alpha))-th smallest score, inf if that exceeds n
    set = {k : 1 - p_k <= q}

If calibration and test samples are exchangeable, the true class is in the set with probability at least 1 - alpha (and
at most 1 - alpha + 1 / (n + 1) without ties).

Per exit ("gated", JEI-DNN section 5): q_l from calibration samples that leave at exit l if there are more than
``least``, else from all samples, scored at exit l. Where we differ: a rank beyond n gives the full set; the authors
take the largest score, which covers too little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRATEGIES = ("general", "gated", "gated_all")


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    """q of (n,) scores; inf if n is too small for this alpha.

    Raises:
        ValueError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    n = len(scores)
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    return math.inf if rank > n else float(scores.sort().values[rank - 1])


def exit_quantiles(
    probabilities: Tensor, labels: Tensor, exits: Tensor, alpha: float, *, strategy: str = "gated", least: int = 20
) -> Tensor:
    """One q per exit.

    Args:
        probabilities: (n, L, K) of the calibration samples at every exit.
        labels, exits: (n,) true class, exit taken.
        alpha: accepted miscoverage.
        strategy: "general": one q from all scores at the exits taken; "gated"; "gated_all": q_l from all samples
            scored at exit l.
        least: "gated" falls back to "gated_all" at exits with at most so many samples.

    Returns:
        (L,) float64.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    n, n_exits, _ = probabilities.shape
    rows = torch.arange(n, device=probabilities.device)
    scores = 1 - probabilities.double()[rows, :, labels]  # (n, L)
    if strategy == "general":
        q = conformal_quantile(scores[rows, exits], alpha)
        return torch.full((n_exits,), q, dtype=torch.float64)
    found = []
    for level in range(n_exits):
        own = scores[exits == level, level]
        use_own = strategy == "gated" and len(own) > least
        found.append(conformal_quantile(own if use_own else scores[:, level], alpha))
    return torch.tensor(found, dtype=torch.float64)


def prediction_sets(probabilities: Tensor, exits: Tensor, quantiles: Tensor) -> Tensor:
    """(N, K) bool: probabilities (N, K) at the exit taken, exits (N,), quantiles (L,)."""
    return 1 - probabilities.double() <= quantiles.to(probabilities.device)[exits].unsqueeze(-1)


def coverage_and_size(sets: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of samples whose true class is in the set, and mean number of classes in a set."""
    inside = sets.gather(1, labels.unsqueeze(1)).squeeze(1)
    return float(inside.double().mean()), float(sets.double().sum(1).mean())
