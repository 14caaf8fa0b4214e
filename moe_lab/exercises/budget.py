"""Checks for the exercises of notebook 06. Solutions: notebooks/solutions/06_tuning_budget_solutions.ipynb."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moe_lab.exercises.verdict import verdict
from moe_lab.tuning import Pool, expected_best, rank_probabilities


def check_three_trials(answer: float | None) -> bool:
    """Exercise 1: test losses 4, 1, 7 in order of validation, two draws with replacement."""
    problem = ""
    if answer is not None and abs(answer - 30 / 9) > 1e-3:
        if abs(answer - 3.0) < 1e-3:
            problem = "that is without replacement; both draws may hit the same trial"
        elif abs(answer - 4.0) < 1e-3:
            problem = "each rank is not equally likely: the first wins unless both draws miss it"
        else:
            problem = "P(rank 1) = 1 - (2/3)^2, P(rank 3) = (1/3)^2, and the three sum to 1"
    return verdict(answer, problem, "5/9 x 4 + 3/9 x 1 + 1/9 x 7.")


def check_sure_of_the_top(answer: int | None) -> bool:
    """Exercise 2: trials needed to hit the best 5 % of the space with probability 0.95."""
    problem = ""
    if answer is not None:
        chance = 1 - 0.95**answer
        if chance < 0.95:
            problem = f"{answer} draws miss the top 5 % with probability {1 - chance:.3f}"
        elif 1 - 0.95 ** (answer - 1) >= 0.95:
            problem = f"{answer - 1} would do"
    return verdict(
        answer, problem, "It does not depend on the space's size or dimension: that is why random search works."
    )


def check_without_replacement(function: Callable[[int, int], Sequence[float]] | None) -> bool:
    """Exercise 3: ``function(n, budget)`` gives the probabilities of rank 1 .. n for draws without replacement."""
    problem = ""
    for n, budget in ((5, 2), (20, 7), (4, 4), (6, 1)) if function is not None else ():
        given, right = np.asarray(function(n, budget), float), rank_probabilities(n, budget, replacement=False)
        if given.shape != right.shape:
            problem = f"n = {n}: expected {n} probabilities, got shape {given.shape}"
        elif not abs(given.sum() - 1) <= 1e-6:
            problem = f"n = {n}, budget {budget}: they sum to {given.sum():.3f}"
        elif np.abs(given - right).max() > 1e-6:
            rank = int(np.abs(given - right).argmax())
            problem = f"n = {n}, budget {budget}: rank {rank + 1} should have {right[rank]:.4f}, not {given[rank]:.4f}"
        if problem:
            break
    return verdict(function, problem, "With all n drawn the best is certain; with replacement it never is.")


def check_rising_curve(valid: Sequence[float] | None, test: Sequence[float] | None) -> bool:
    """Exercise 4: a pool whose expected test loss *rises* with the budget somewhere."""
    if valid is None or test is None:
        return verdict(None, "", "")
    try:
        curve = expected_best(Pool.of(valid, test), range(1, 31))
    except ValueError as error:
        return verdict(valid, str(error), "")
    problem = ""
    if not (np.diff(curve) > 1e-9).any():
        problem = (
            f"your curve only falls, from {curve[0]:.3g} to {curve[-1]:.3g}: what if validation prefers a bad trial?"
        )
    return verdict(valid, problem, "More tuning helps only as far as validation ranks like test.")


def check_headline(answer: int | None, ratio: float) -> bool:
    """Exercise 5: comparisons without any difference until the largest race ratio is rather ``ratio`` or more than not.

    One comparison reaches it with probability 1 / (1 + ratio).
    """

    def chance(comparisons: int) -> float:
        return 1 - (ratio / (1 + ratio)) ** comparisons

    problem = ""
    if answer is not None and chance(answer) < 0.5:
        problem = f"the largest of {answer} reaches {ratio:g} with probability {chance(answer):.2f}"
        if abs(answer - (1 + ratio) / 2) <= 1:
            problem += "; chances of several do not add up, multiply those of staying below"
    elif answer is not None and chance(answer - 1) >= 0.5:
        problem = f"{answer - 1} would do: {chance(answer - 1):.2f}"
    return verdict(answer, problem, "'Up to' is the maximum of as many numbers as were looked at: count them first.")
