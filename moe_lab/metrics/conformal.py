"""Split-conformal prediction sets for networks with exits.

Legend: n calibration samples, K classes, alpha the miscoverage one is ready to accept.

    score s = 1 - p_y at the exit taken;  q = the ceil((n + 1)(1 - alpha))-th smallest score, inf if that exceeds n
    set = {k : 1 - p_k <= q}

If calibration and test samples are exchangeable, the true class is in the set with probability at least 1 - alpha (and
at most 1 - alpha + 1 / (n + 1) without ties).

Four strategies (JEI-DNN, section 5):

    "general"        one q from all samples, scored at the exits they take
    "gated"          q_l from samples that leave at exit l if there are more than ``least``, else from all, scored at l
    "gated_all"      q_l from all samples, scored at exit l
    "gated_strict"   q_l from samples that leave at exit l, however few

Where we differ: a rank beyond n gives the full set (`too_few` says so); the authors take the largest score, which
covers too little. The set sizes in their figures belong to the largest nominal alpha that covers enough *on the test
set*; ours to the alpha that was asked for.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from moe_lab.names import check_name

STRATEGIES = ("general", "gated", "gated_all", "gated_strict")


def too_few(n: int, alpha: float) -> bool:
    """n calibration samples cannot exclude anything at this alpha: at least ceil(1 / alpha) - 1 can."""
    return math.ceil((n + 1) * (1 - alpha) - 1e-9) > n


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    """q of (n,) scores; inf if n is too small for this alpha.

    Raises:
        ValueError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if too_few(len(scores), alpha):
        return math.inf
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(scores.sort().values[rank - 1])


def exit_quantiles(
    probabilities: Tensor,
    labels: Tensor,
    exits: Tensor,
    alpha: float,
    *,
    strategy: str = "gated",
    least: int = 20,
    warn: bool = True,
) -> Tensor:
    """One q per exit.

    Args:
        probabilities: (n, L, K) of the calibration samples at every exit.
        labels, exits: (n,) true class, exit taken.
        alpha: accepted miscoverage.
        strategy: see the module's text.
        least: "gated" falls back to "gated_all" at exits with at most so many samples.
        warn: tell of exits with too few samples for this alpha, where q is inf and sets are full.

    Returns:
        (L,) float64.

    Raises:
        ValueError: unknown strategy, with the nearest one; alpha outside (0, 1).
    """
    check_name("strategy", strategy, STRATEGIES)
    n, n_exits, _ = probabilities.shape
    rows = torch.arange(n, device=probabilities.device)
    scores = 1 - probabilities.double()[rows, :, labels]  # (n, L)
    used = []
    for level in range(n_exits):
        here = exits == level
        own = strategy == "gated_strict" or (strategy == "gated" and int(here.sum()) > least)
        used.append(scores[here, level] if own else scores[:, level])
    if strategy == "general":
        used = [scores[rows, exits]] * n_exits
    found = torch.tensor([conformal_quantile(values, alpha) for values in used], dtype=torch.float64)
    if warn and found.isinf().any():
        few = ", ".join(f"exit {level + 1}: {len(used[level])}" for level in range(n_exits) if found[level].isinf())
        warnings.warn(
            f"too few calibration samples for alpha = {alpha}, which needs {math.ceil(1 / alpha) - 1}: {few}. "
            "Prediction sets there are full.",
            stacklevel=2,
        )
    return found


def prediction_sets(probabilities: Tensor, exits: Tensor, quantiles: Tensor) -> Tensor:
    """(N, K) bool: probabilities (N, K) at the exit taken, exits (N,), quantiles (L,)."""
    return 1 - probabilities.double() <= quantiles.to(probabilities.device)[exits].unsqueeze(-1)


def coverage_and_size(sets: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of samples whose true class is in the set, and mean number of classes in a set."""
    inside = sets.gather(1, labels.unsqueeze(1)).squeeze(1)
    return float(inside.double().mean()), float(sets.double().sum(1).mean())
