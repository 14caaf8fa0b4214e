"""Checks for the exercises of notebook 12. Solutions: notebooks/solutions/12_early_exits_solutions.ipynb.

Legend: G gates, L = G + 1 exits (counted from 1), g_l gates, S_l their running sum, p_l probability of leaving at l.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_lab.exercises.verdict import verdict
from moe_lab.exits import exit_probabilities, exits_taken, multiply_adds
from moe_lab.models.vit import EncoderBlock

_GATES = ((0.2, 0.3, 0.4), (0.6, 0.7), (0.9, 0.9, 0.1), (0.0, 0.0), (1.0, 0.5))


def _show(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values) + ")"


def check_distribution(function: Callable[[Sequence[float]], Sequence[float]] | None) -> bool:
    """Exercise 1: ``function(gates)`` -> the L = G + 1 numbers p_l of the direct model."""
    problem = ""
    for gates in _GATES if function is not None else ():
        given = [float(value) for value in function(gates)]
        right = exit_probabilities(torch.tensor(gates, dtype=torch.float64)).tolist()
        if len(given) != len(right):
            problem = f"{len(gates)} gates make {len(right)} exits, you give {len(given)} numbers"
            problem += "; the last exit has no gate, but it has a probability" if len(given) == len(gates) else ""
        elif min(given) < -1e-9:
            problem = f"g = {_show(gates)}: {_show(given)} has a negative entry; what is left is never below 0"
        elif abs(sum(given) - 1) > 1e-6:
            problem = f"g = {_show(gates)}: {_show(given)} sums to {sum(given):.2f}; a gate takes at most what is left"
        elif max(abs(a - b) for a, b in zip(given, right, strict=True)) > 1e-6:
            problem = f"g = {_show(gates)}: you say {_show(given)}, direct is {_show(right)}"
            broken = exit_probabilities(torch.tensor(gates, dtype=torch.float64), "stick_breaking").tolist()
            if max(abs(a - b) for a, b in zip(given, broken, strict=True)) < 1e-6:
                problem += "; yours multiplies by what is left, direct takes g itself as long as it is there"
        if problem:
            break
    return verdict(function, problem, "Gates hand out probability until there is none left.")


def check_equal_gates(function: Callable[[int], int] | None) -> bool:
    """Exercise 2: ``function(m)``: exit (from 1) at which all gates = 1 / m leave in the direct model, many gates."""
    problem = ""
    for m in (5, 2, 1, 10) if function is not None else ():
        given, right = int(function(m)), max(1, m - 1)
        if given != right:
            value = (2 + given - 1) / m
            enough = "not yet 1" if value < 1 - 1e-9 else "1 or more, but so it was before" if given > 1 else "enough"
            problem = f"m = {m}: at exit {given} the number 2 g + S is {value:.2f}: {enough}"
            break
    return verdict(function, problem, "Sure by a little at every exit adds up: S remembers what earlier gates said.")


def check_block_cost(function: Callable[[int, int], int] | None) -> bool:
    """Exercise 3: ``function(tokens, width)``: multiply-adds of an encoder block, hidden width of its FFN 2 width."""
    problem = ""
    for tokens, width in ((5, 8), (17, 16), (1, 8)) if function is not None else ():
        given = int(function(tokens, width))
        right = multiply_adds(EncoderBlock(width, 2), torch.zeros(1, tokens, width))
        if given == right:
            continue
        linear = 8 * tokens * width**2
        problem = f"{tokens} tokens of width {width}: you say {given:,}, the counter {right:,}"
        if given == 8 * width**2:
            problem += "; that is one token: the layers run on every one"
        elif given == linear:
            problem += "; linear layers are right. Which products have no weights?"
        elif given == linear + tokens**2 * width:
            problem += "; attention has two products: scores, and the sum of values"
        break
    return verdict(function, problem, "Linear in tokens but for attention, which is quadratic.")


def check_neither(gates: Sequence[float] | None) -> bool:
    """Exercise 4: three gates whose exit taken (direct) is neither the most probable one nor the median exit."""
    if gates is None:
        return verdict(None, "", "")
    problem = ""
    g = torch.tensor([float(value) for value in gates], dtype=torch.float64)
    if len(g) != 3 or g.min() < 0 or g.max() > 1:
        problem = "three numbers in [0, 1], please"
    else:
        p, taken = exit_probabilities(g), int(exits_taken(g)) + 1
        modes = [level + 1 for level, value in enumerate(p.tolist()) if value > float(p.max()) - 1e-9]
        median = int((p.cumsum(0) >= 0.5 - 1e-9).to(torch.uint8).argmax()) + 1
        if taken in modes:
            problem = f"p = {_show(p.tolist())}: leaves at {taken}, and no exit is more probable"
        elif taken == median:
            problem = f"p = {_show(p.tolist())}: leaves at {taken}, where half has left: that is the median"
    return verdict(gates, problem, "The rule asks about those still inside, not about the whole distribution.")


def check_speed_up(function: Callable[[Sequence[int], float, float], float] | None) -> bool:
    """Exercise 5: ``function(rows_run, a, b)``: time without exits over time with them; a block takes a + b rows.

    A block that no row reaches is not called. Without exits all ``rows_run[0]`` rows go through all blocks.
    """
    problem = ""
    for rows, a, b in (((100, 50, 50, 0), 0.0, 1.0), ((8, 4, 4, 2), 10.0, 1.0), ((1, 1, 0, 0), 5.0, 1.0)):
        if function is None:
            break
        given = float(function(rows, a, b))
        full = len(rows) * (a + b * rows[0])
        early = sum(a + b * n for n in rows if n)
        if abs(given - full / early) > 1e-6:
            problem = f"rows {rows}, a = {a:g}, b = {b:g}: you say {given:.2f}, it is {full / early:.2f}"
            if abs(given - full / sum(a + b * n for n in rows)) < 1e-6:
                problem += "; a block without rows is not called and costs no a either"
            elif abs(given - early / full) < 1e-6:
                problem += "; the other way round: larger is faster"
            break
    return verdict(
        function, problem, "Where a dominates, leaving rows save nothing: only blocks that nobody enters do."
    )
