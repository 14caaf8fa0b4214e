"""Checks for the exercises of notebook 00 (start here). Legend: T tokens, E experts. Weights are given as lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moe_lab.exercises.verdict import verdict
from moe_lab.routing import Routing

Rows = Sequence[Sequence[float]]


def check_balanced(rows: Rows | None) -> bool:
    """Exercise 1: six tokens, four experts, equal load, one or two experts per token."""
    problem = _no_mixture(rows, 6, 4)
    if rows is not None and not problem:
        routing = _routing(rows)
        used, load = routing.experts_per_token, routing.load
        if used.max() > 2:
            problem = f"token {int(used.argmax())} uses {int(used.max())} experts; two at most"
        elif not torch.allclose(load, torch.full((4,), 0.25, dtype=load.dtype)):
            problem = f"load is {_numbers(load)}; each expert needs a quarter of the {int(used.sum())} pairs"
    return verdict(rows, problem, "Load counts pairs, so how the weights of a token are split does not matter.")


def check_entropy(row: Sequence[float] | None) -> bool:
    """Exercise 2: three experts with the entropy of two equal ones."""
    problem = _no_mixture(row and [row], 1, 3)
    if row is not None and not problem:
        routing = _routing([row])
        entropy = float(routing.entropy)
        if routing.experts_per_token.item() < 3:
            problem = "a weight is 0: all three experts must run"
        elif abs(entropy - math.log(2)) > 1e-3:
            problem = f"the entropy is {entropy:.4f}, log 2 is {math.log(2):.4f}"
    return verdict(row, problem, "So entropy cannot tell how many experts run. Count them: experts_per_token.")


def check_disagreement(rows: Rows | None) -> bool:
    """Exercise 3: expert 0 has the largest load and the smallest importance, without ties."""
    problem = _no_mixture(rows, None, 3)
    if rows is not None and not problem:
        routing = _routing(rows)
        load, importance = routing.load, routing.importance
        if not bool((load[0] > load[1:]).all()):
            problem = f"load is {_numbers(load)}: expert 0 must have the largest"
        elif not bool((importance[0] < importance[1:]).all()):
            problem = f"importance is {_numbers(importance)}: expert 0 must have the smallest"
    return verdict(rows, problem, "Load is what a machine pays for, importance is what the output is made of.")


def check_decided_and_fair(rows: Rows | None) -> bool:
    """Exercise 4: every token decided (entropy 0), and nobody collapsed (equal load): a counterexample."""
    problem = _no_mixture(rows, None, 3)
    if rows is not None and not problem:
        routing = _routing(rows)
        if routing.entropy.max() > 1e-9:
            problem = f"token {int(routing.entropy.argmax())} is undecided: its entropy is not 0"
        elif routing.load.max() - routing.load.min() > 1e-9:
            problem = f"load is {_numbers(routing.load)}: not all alike"
    return verdict(rows, problem, "Low entropy of each token and a fair share of tokens go together: that is the goal.")


def _routing(rows: Rows) -> Routing:
    return Routing(torch.tensor(rows, dtype=torch.float64))


def _numbers(values: torch.Tensor) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values.tolist()) + ")"


def _no_mixture(rows: Rows | None, n_tokens: int | None, n_experts: int) -> str:
    """What keeps the rows from being combine weights; empty if nothing."""
    if rows is None:
        return ""
    if n_tokens is not None and len(rows) != n_tokens:
        return f"{len(rows)} rows, {n_tokens} are needed"
    for token, row in enumerate(rows):
        if len(row) != n_experts:
            return f"row {token} has {len(row)} weights, one for each of {n_experts} experts is needed"
        if min(row) < 0:
            return f"row {token} has a negative weight"
        if abs(sum(row) - 1) > 1e-6:
            return f"row {token} sums to {sum(row):.4g}, not to 1; did you renormalise?"
    return "" if rows else "no rows"
