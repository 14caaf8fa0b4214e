"""Checks for the exercises of notebook 08. Solutions: notebooks/solutions/08_one_becomes_many_solutions.ipynb.

Legend: T tokens, E experts, N = E where experts are averaged, rho mask ratio, sigma noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.experts import MLPExperts, combine_experts
from moe_lab.experts.evolve import expert_distances, spawn_experts


def check_distance(function: Callable[[float, float], float] | None) -> bool:
    """Exercise 1: ``function(rho, sigma)``, expected 1 - cosine of two experts' weight matrices, mask and noise."""
    problem = ""
    for rho, sigma in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.2, 0.5)) if function is not None else ():
        given, right = float(function(rho, sigma)), 1 - (1 - rho) ** 2 / (1 - rho + sigma**2)
        if abs(given - right) < 1e-6:
            continue
        problem = f"ρ = {rho:g}, σ = {sigma:g}: you say {given:.3f}, two such experts are {right:.3f} apart"
        if sigma and abs(given - rho) < 1e-6:
            problem += "; noise does not change the inner product, but what about the lengths?"
        elif sigma and abs(given - (1 - (1 - rho) ** 2 / (1 - rho + sigma))) < 1e-6:
            problem += "; noise of standard deviation σ adds σ² to a squared length"
        break
    return verdict(function, problem, "Masks shorten the experts, noise lengthens them; both turn them.")


def check_break_even(function: Callable[[float], float] | None) -> bool:
    """Exercise 2: ``function(rho)``, the number of averaged linear experts from which on rescaling is better."""
    problem = ""
    for rho in (0.1, 0.5, 0.8) if function is not None else ():
        given, right = float(function(rho)), (2 - rho) / (1 - rho)
        plain, rescaled = (rho**2 + rho * (1 - rho) / given, rho / (1 - rho) / given) if given > 0 else (0.0, math.inf)
        if abs(given - right) > 1e-6:
            better = "rescaled" if rescaled < plain else "plain"
            problem = f"ρ = {rho:g}: with {given:.2f} experts the errors are {plain:.3f} (plain) and {rescaled:.3f}"
            problem += f" (rescaled): {better} is better already"
            break
    return verdict(function, problem, "One expert alone is always better without rescaling; a crowd hardly ever.")


def part_copies(weights: Callable[[int, Tensor, int], Tensor], *, steps: int = 150, n_experts: int = 4) -> list[float]:
    """Train copies of one expert with given combine weights; mean distance in function at the start and at the end.

    Args:
        weights: (step, x (T, 2), n_experts) -> (T, E).
        steps: of Adam.
        n_experts: E.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=generator)
    target = (x[:, :1] * x[:, 1:]).sin()
    one = MLPExperts(1, (2, 16, 1), activation="tanh", activate_last=False, generator=generator)
    bank = spawn_experts(one, n_experts)
    adam = torch.optim.Adam(bank.parameters(), lr=0.01)

    def distance() -> float:
        return float(expert_distances(bank, x)["function"].sum()) / (n_experts * (n_experts - 1))

    distances = [distance()]
    for step in range(steps):
        (answer,) = combine_experts(bank, x, [torch.as_tensor(weights(step, x, n_experts), dtype=x.dtype)])
        adam.zero_grad()
        (answer - target).square().mean().backward()
        adam.step()
    return [*distances, distance()]


def check_breaking(weights: Callable[[int, Tensor, int], Tensor] | None) -> bool:
    """Exercise 3: combine weights (T, E) under which exact copies part, though each expert has the same total weight.

    ``weights(step, x, n_experts)``: not negative, rows that sum to 1; over 100 steps every expert gets 1/E of the sum.
    """
    if weights is None:
        return verdict(None, "", "")
    problem, n_experts = "", 4
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    given = [torch.as_tensor(weights(step, x, n_experts), dtype=torch.float32) for step in range(100)]
    shapes = {tuple(table.shape) for table in given}
    if shapes != {(64, n_experts)}:
        problem = f"64 tokens and 4 experts need weights of shape (64, 4), yours have {sorted(shapes)[0]}"
    elif min(float(table.min()) for table in given) < 0:
        problem = "some weights are negative"
    elif max(float((table.sum(1) - 1).abs().max()) for table in given) > 1e-4:
        problem = f"rows must sum to 1; one of yours sums to {float(given[0].sum(1)[0]):.2f}"
    else:
        shares = torch.stack(given).mean((0, 1))
        expert = int((shares - 1 / n_experts).abs().argmax())
        if abs(float(shares[expert]) - 1 / n_experts) > 0.02:
            problem = f"expert {expert} gets {float(shares[expert]):.0%} of all weight, not 25%: too easy"
        elif (reached := part_copies(weights)[1]) < 0.05:
            problem = f"after 150 steps the copies are {reached:.3f} apart in function: whose gradients differ?"
    return verdict(weights, problem, "Same share, other tokens: other gradients. No mask was needed.")


def check_memory(function: Callable[[float, int], int] | None) -> bool:
    """Exercise 4: ``function(beta2, n)``, the first step t after the spawn at which (5) is at least 1/2."""
    problem = ""
    for beta2, n in ((0.98, 8), (0.98, 16), (0.999, 16), (0.98, 2)) if function is not None else ():
        given = function(beta2, n)

        def size(t: float, beta2: float = beta2, n: int = n) -> float:
            return 1 / n / math.sqrt(beta2**t + (1 - beta2**t) / n**2)

        right = next(t for t in itertools.count() if size(t) >= 0.5 - 1e-9)
        if given != right:
            problem = f"β₂ = {beta2:g}, N = {n}: at t = {given} the step is {size(float(given)):.3f} of what it will be"
            problem += "; the answer is a whole number: round up" if right - 1 < given < right else ""
            break
    return verdict(function, problem, "A copied v is a brake that lets go after some multiple of 1/(1 − β₂) steps.")


def masked_mean(w: Sequence[float], x: Sequence[float]) -> tuple[float, float]:
    """relu(w · x), and its exact mean over all masks of w with rho = 1/2, rescaled by 2."""
    terms = [float(a) * float(b) for a, b in zip(w, x, strict=True)]
    means = [
        max(0.0, 2 * sum(itertools.compress(terms, kept))) for kept in itertools.product((0, 1), repeat=len(terms))
    ]
    return max(0.0, sum(terms)), sum(means) / len(means)


def check_counterexample(answer: tuple[Sequence[float], Sequence[float]] | None) -> bool:
    """Exercise 5: (w, x) for which rescaled masks change the mean answer of relu(w · x) by a tenth of sum |w_a x_a|."""
    problem = ""
    if answer is not None:
        w, x = (list(map(float, part)) for part in answer)
        terms: list[Any] = [a * b for a, b in zip(w, x, strict=False)]
        if len(w) != len(x) or not 1 <= len(w) <= 12:
            problem = f"w and x must have the same length, 1 to 12; yours have {len(w)} and {len(x)}"
        else:
            exact, mean = masked_mean(w, x)
            if abs(mean - exact) < 0.1 * sum(map(abs, terms)) or not any(terms):
                problem = f"relu(w·x) = {exact:.3f}, the mean over masks is {mean:.3f}: no real difference"
                if all(term >= 0 for term in terms) or all(term <= 0 for term in terms):
                    problem += "; every mask leaves w·x on the same side of 0, where relu is linear"
    return verdict(answer, problem, "A mean of pre-activations is kept, a mean of activations is not: relu is convex.")
