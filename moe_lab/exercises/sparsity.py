"""Checks for the exercises of notebook 09. Solutions: notebooks/solutions/09_dense_to_sparse_solutions.ipynb.

Legend: T tokens, E experts, tau temperature, c threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.gates.dense_to_sparse import gumbel_like
from moe_lab.widgets.sparsity import ScheduleReplay


def untrained_experts(n_experts: int, tau: float, threshold: float, n_tokens: int = 20_000, seed: int = 0) -> float:
    """Mean experts per token of an untrained gate in the soft phase: logits all 0, Gumbel noise. Monte Carlo."""
    noise = gumbel_like(torch.empty(n_tokens, n_experts), torch.Generator().manual_seed(seed))
    q = (noise / tau).softmax(-1)
    return float((q > threshold).sum(-1).clamp(min=1).double().mean())


def two_experts(tau: float, threshold: float, gap: float = 0.0) -> float:
    """Mean experts per token for two experts whose logits differ by ``gap``, with Gumbel noise; exact."""
    if threshold >= 0.5:
        return 1.0
    window = tau * math.log((1 - threshold) / threshold) if threshold > 0 else math.inf
    # q_1 / q_2 = exp((gap + L) / tau), L logistic; both pass if |gap + L| < window
    upper, lower = (1 / (1 + math.exp(-min(max(x, -700), 700))) for x in (window - gap, -window - gap))
    return 1 + upper - lower


def check_threshold(threshold: float | None) -> bool:
    """Exercise 1: the c with which 16 untrained experts at tau = 0.3 leave 2.0 (± 0.1) per token."""
    problem = ""
    if threshold is not None and not 0 < threshold < 1:
        problem = f"a threshold lies between 0 and 1, got {threshold:g}"
    elif threshold is not None:
        experts = untrained_experts(16, 0.3, threshold)
        if abs(experts - 2) > 0.1:
            more = "a larger" if experts > 2 else "a smaller"
            problem = f"with c = {threshold:g} they are {experts:.2f}; you need {more} c"
    return verdict(threshold, problem, "Fifty times the authors' c. How many pass it at τ = 2, and which?")


def check_two_experts(function: Callable[[float, float, float], float] | None) -> bool:
    """Exercise 2: ``function(tau, c, gap)`` -> mean experts per token for two experts with noise, c < 1/2."""
    problem = ""
    cases = [(0.5, 0.001, 0.0), (0.3, 0.001, 0.0), (1.0, 0.02, 0.0), (0.3, 0.001, 2.0), (0.1, 0.02, -1.0)]
    for tau, c, gap in cases if function is not None else ():
        given, right = float(function(tau, c, gap)), two_experts(tau, c, gap)
        if abs(given - right) < 1e-4:
            continue
        problem = f"τ = {tau:g}, c = {c:g}, gap = {gap:g}: {given:.4f}, Monte Carlo says {right:.3f}"
        if abs(given - (right - 1)) < 1e-4:
            problem += "; that is the probability of a second expert, one runs in any case"
        elif gap and abs(given - two_experts(tau, c)) < 1e-4:
            problem += "; where is the gap?"
        elif abs(given - two_experts(1.0, c, gap)) < 1e-4:
            problem += "; where is τ?"
        break
    return verdict(function, problem, "At gap 0 it depends on τ log((1 - c) / c) alone: a law of the noise.")


def check_mask(function: Callable[[Tensor, Tensor, float, float], Tensor] | None) -> bool:
    """Exercise 3: ``function(logits, noise, tau, c)`` -> (T, E) bool, who runs in the soft phase."""
    problem = ""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, generator=generator)
    noise = gumbel_like(logits, generator)
    for tau, c in ((2.0, 0.001), (0.5, 0.001), (0.1, 0.02), (5.0, 0.3)) if function is not None else ():
        given = function(logits, noise, tau, c)
        q = ((logits + noise) / tau).softmax(-1)
        right = (q > c) | (q == q.amax(-1, keepdim=True))
        where = f"τ = {tau:g}, c = {c:g}"
        best_quiet, quiet = (logits == logits.amax(-1, keepdim=True)), (logits / tau).softmax(-1)
        if given.shape != right.shape or given.dtype != torch.bool:
            problem = f"expected (200, 8) of bool, got {tuple(given.shape)} of {given.dtype}"
        elif torch.equal(given, right):
            continue
        elif not given.any(1).all():
            lost = int((~given.any(1)).sum())
            problem = f"{where}: {lost} of 200 tokens have no expert. Who must always stay?"
        elif torch.equal(given, (quiet > c) | best_quiet):
            problem = f"{where}: where is the noise?"
        elif torch.equal(given, (q > c) | best_quiet):
            problem = f"{where}: the best is that of the noisy logits, since q is made of them"
        else:
            problem = f"{where}: {int((given != right).sum())} of 1600 entries differ; q = softmax((l + ζ) / τ)"
        if problem:
            break
    return verdict(function, problem, "The authors' code has no such guard: with their c = 0.001 it needs none.")


def check_schedule(
    settings: Mapping[str, Any] | None, replay: ScheduleReplay, *, mean: float = 2.6, end: float = 1.2
) -> bool:
    """Exercise 4: a schedule without hard switch that starts with all experts and is cheap and sparse in the end.

    ``settings``: arguments of `ScheduleReplay.simulate`; mean over the run at most ``mean`` experts per token, at most
    ``end`` at the last step, all of them at the first.
    """
    if settings is None:
        return verdict(None, "", "")
    played = replay.simulate(**{**settings, "hard": False})
    cost, last, first = played.experts.mean(), played.experts[-1], played.experts[0]
    problem = ""
    if first < 0.98 * replay.n_experts:
        problem = f"the first step runs {first:.2f} of {replay.n_experts} experts: a start that is not dense"
    elif last > end:
        problem = f"{last:.2f} experts per token are left at the last step; {end:g} are allowed"
    elif cost > mean:
        problem = f"the run costs {cost:.2f} experts per token on average; {mean:g} are allowed"
    praise = f"{cost:.2f} over the run, {last:.2f} at the end, and nobody switched anything."
    return verdict(settings, problem, praise)


def check_rising(
    logits: Sequence[float] | None, threshold: float | None, high: float | None, low: float | None
) -> bool:
    """Exercise 5: logits of one token, a threshold, and two temperatures with more experts at the lower one."""
    if logits is None or threshold is None or high is None or low is None:
        return verdict(None, "", "")

    def count(tau: float) -> int:
        q = (torch.tensor(logits, dtype=torch.float64) / tau).softmax(-1)
        return max(1, int((q > threshold).sum()))

    problem = ""
    if not high > low > 0:
        problem = f"temperatures must fall and stay positive, got {high:g}, then {low:g}"
    elif not 0 <= threshold < 1:
        problem = f"a threshold lies in [0, 1), got {threshold:g}"
    elif count(low) <= count(high):
        problem = f"{count(high)} experts at τ = {high:g}, {count(low)} at τ = {low:g}: not more"
        if threshold < 1 / len(logits):
            problem += f". With c < 1/{len(logits)} it cannot be: each q falls through c at most once"
    return verdict(logits, problem, f"{count(high)} at τ = {high:g}, {count(low)} at τ = {low:g}. It takes c ≥ 1/E.")
