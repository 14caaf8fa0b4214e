"""Checks for the exercises of notebook 14. Solutions: notebooks/solutions/14_exits_and_uncertainty_solutions.ipynb.

Legend: n calibration scores, alpha accepted miscoverage, K classes, p a probability, T a temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from moe_lab.exercises.verdict import verdict
from moe_lab.metrics.conformal import conformal_quantile

_SCORES = [0.32, 0.05, 0.71, 0.18, 0.44, 0.02, 0.93, 0.25, 0.11]


def check_quantile(function: Callable[[Sequence[float], float], float] | None) -> bool:
    """Exercise 1: ``function(scores, alpha)``: the quantile of split conformal prediction; inf if n is too small."""
    problem = ""
    for n, alpha in ((9, 0.25), (9, 0.125), (9, 0.0625), (5, 0.5), (3, 0.125)) if function is not None else ():
        scores = _SCORES[:n]
        right = conformal_quantile(torch.tensor(scores, dtype=torch.float64), alpha)
        given = float(function(list(scores), alpha))
        if given == right or abs(given - right) < 1e-9:
            continue
        ordered, rank = sorted(scores), math.ceil((n + 1) * (1 - alpha))
        problem = f"{n} scores, alpha = {alpha:g}: you say {given:g}, it is {right:g} (rank {rank})"
        if right == math.inf:
            problem += "; there is no such score, so nothing may be left out: infinity"
        elif any(abs(given - value) < 1e-9 for value in ordered):
            problem += f"; yours has rank {ordered.index(min(ordered, key=lambda s: abs(s - given))) + 1}"
            problem += ". Is the new sample counted (n + 1), and is the first rank 1?"
        else:
            problem += "; yours is between two scores: take one of them, do not interpolate"
        break
    return verdict(function, problem, "The new score is one of n + 1, each rank as likely as another.")


def check_constant(function: Callable[[float, int], float] | None) -> bool:
    """Exercise 2: ``function(c, K)``: ECE of always the same class with confidence c, K classes equally frequent."""
    problem = ""
    for confidence, classes in ((0.9, 10), (0.1, 10), (0.25, 2), (0.5, 4)) if function is not None else ():
        given, right = float(function(confidence, classes)), abs(confidence - 1 / classes)
        if abs(given - right) > 1e-9:
            problem = f"c = {confidence:g}, K = {classes}: you say {given:g}, it is {right:g}"
            if abs(given - (1 - confidence)) < 1e-9:
                problem += "; how often is the answer right?"
            elif abs(given + right) < 1e-9:
                problem += "; an error has no sign"
            else:
                problem += "; one bin holds everybody: what are its confidence and its accuracy?"
            break
    return verdict(function, problem, "With c = 1 / K it is perfectly calibrated, and knows nothing.")


def check_smallest_alpha(function: Callable[[int], float] | None) -> bool:
    """Exercise 3: ``function(n)``: below this alpha the sets of n calibration samples are full."""
    problem = ""
    for n in (99, 9, 1) if function is not None else ():
        given = float(function(n))
        if not 0 < given < 1:
            problem = f"n = {n}: alpha is between 0 and 1, not {given:g}"
        elif abs(given - 1 / (n + 1)) > 1e-9:
            rank = math.ceil((n + 1) * (1 - given) - 1e-9)
            where = "beyond the last score" if rank > n else "and a smaller alpha would do as well"
            problem = f"n = {n}: at alpha = {given:.4g} the rank is {rank} of {n}: {where}"
        if problem:
            break
    return verdict(function, problem, "To promise one error in a hundred, one has to have seen a hundred.")


def check_temperature(function: Callable[[float], float] | None) -> bool:
    """Exercise 4: ``function(p)``: T with softmax((p, 1 - p) / T) = (p, 1 - p); p is not 1/2."""
    problem = ""
    for p in (0.9, 0.6, 0.2) if function is not None else ():
        given = float(function(p))
        if given <= 0:
            problem = f"p = {p:g}: a temperature is positive, {given:g} is not"
        else:
            found = float(torch.tensor([p, 1 - p]).double().div(given).softmax(0)[0])
            if abs(found - p) > 1e-6:
                problem = f"p = {p:g}: T = {given:.4g} gives {found:.3f}"
                problem += "; that is too hot" if abs(found - 0.5) < abs(p - 0.5) else "; that is too cold"
        if problem:
            break
    return verdict(function, problem, "It depends on p: no single temperature undoes a second softmax.")


def check_conditional(groups: tuple[Sequence[float], Sequence[float]] | None) -> bool:
    """Exercise 5: scores of (easy, hard) samples: at alpha = .05 one quantile covers 95 % of all, of the hard at most
    half. At least one sample in twenty is hard."""
    if groups is None:
        return verdict(None, "", "")
    easy, hard = (torch.tensor(list(scores), dtype=torch.float64) for scores in groups)
    problem = ""
    if not len(easy) or not len(hard) or min(easy.min(), hard.min()) < 0 or max(easy.max(), hard.max()) > 1:
        problem = "two lists of scores in [0, 1], neither empty"
    elif 20 * len(hard) < len(easy) + len(hard):
        problem = f"only {len(hard)} of {len(easy) + len(hard)} samples are hard: at least one in twenty, please"
    else:
        everybody = torch.cat((easy, hard))
        quantile = conformal_quantile(everybody, 0.05)
        marginal, inside = (float((scores <= quantile).double().mean()) for scores in (everybody, hard))
        if quantile == math.inf:
            problem = f"{len(everybody)} samples are too few for alpha = 0.05: the sets are full"
        elif inside > 0.5:
            problem = (
                f"q = {quantile:g}: {100 * marginal:.0f} % of all are covered, and {100 * inside:.0f} % of the hard"
            )
    return verdict(groups, problem, "A promise about everybody is none about anybody in particular.")
