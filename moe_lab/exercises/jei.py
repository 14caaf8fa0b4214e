"""Checks for the exercises of notebook 13. Solutions: notebooks/solutions/13_jei_dnn_solutions.ipynb.

Legend: N samples, L exits (counted from 1), G = L - 1 gates, E_l cross entropy of exit l, c_l its cost, P_l probability
of leaving at exit l, l* the best exit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.exits import best_exits, gate_targets, inference_loss, positive_weights
from moe_lab.exits.phases import Phases

_SAMPLES = (
    ((1.2, 0.5, 0.3), (0.3, 0.6, 1.0)),
    ((1.2, 1.1, 0.2), (0.3, 0.6, 1.0)),  # exit 2 is never the best: the last one goes straight to the first
    ((0.4, 0.5, 0.6), (0.2, 0.5, 1.0)),  # the first is the best for nothing
    ((2.0, 1.0, 0.9, 0.1), (0.25, 0.5, 0.75, 1.0)),
)


def _show(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def check_first_exit(function: Callable[[Sequence[float], Sequence[float]], float] | None) -> bool:
    """Exercise 1: ``function(losses, costs)`` -> the least lambda at which exit 1 is a best exit."""
    problem = ""
    for losses, costs in _SAMPLES if function is not None else ():
        given = float(function(losses, costs))
        crossings = [(losses[0] - e) / (c - costs[0]) for e, c in zip(losses[1:], costs[1:], strict=True)]
        right = max(0.0, *crossings)
        if abs(given - right) < 1e-6:
            continue
        problem = f"E = {_show(losses)}, c = {_show(costs)}: you say {given:.3f}, it is {right:.3f}"
        if given < 0:
            problem += "; lambda is never negative. What if exit 1 is the best for nothing?"
        elif abs(given - max(0.0, crossings[0])) < 1e-6:
            problem += "; that is where exits 1 and 2 meet. Is a later exit better than both there?"
        elif abs(given - min(crossings)) < 1e-6:
            problem += "; exit 1 must beat all others, not only one of them"
        break
    return verdict(function, problem, "A price at which each later exit gains less than its extra cost is worth.")


def check_targets(function: Callable[[Sequence[float], Sequence[float], float], Sequence[float]] | None) -> bool:
    """Exercise 2: ``function(losses, costs, price)`` -> the G targets of one sample."""
    problem = ""
    for losses, costs in _SAMPLES if function is not None else ():
        for price in (0.0, 0.4, 1.0, 3.0):
            given = [float(value) for value in function(losses, costs, price)]
            best = best_exits(torch.tensor(losses).double(), torch.tensor(costs).double(), price)
            right = gate_targets(best, len(losses) - 1).tolist()
            if given == right:
                continue
            where = f"E = {_show(losses)}, c = {_show(costs)}, lambda {price:g}, best exit {int(best) + 1}"
            problem = f"{where}: you say {_show(given)}, targets are {_show(right)}"
            if len(given) != len(right):
                problem += f"; {len(losses)} exits have {len(right)} gates, the last exit has none"
            elif sum(given) == 1 < sum(right):
                problem += "; gates behind the best exit should fire too: better late than never"
            break
        if problem:
            break
    return verdict(function, problem, "The targets are the cumulative distribution of the best exit.")


def check_weights(function: Callable[[Sequence[int], int], Sequence[float]] | None) -> bool:
    """Exercise 3: ``function(best, n_gates)`` -> weights of positive targets, cumulative counts; exits from 1."""
    problem = ""
    for best, n_gates in (((1, 2, 2, 3), 3), ((4, 4, 4, 4), 3), ((1, 1, 1), 2), ((1, *(5,) * 19, 2, 2, 3), 4)):
        if function is None:
            break
        given = [float(value) for value in function(best, n_gates)]
        counted = torch.tensor(best) - 1
        right, other = (positive_weights(counted, n_gates, name).tolist() for name in ("cumulative", "per_layer"))
        if len(given) != len(right):
            problem = f"{n_gates} gates need {n_gates} weights, you give {len(given)}"
        elif max(abs(a - b) for a, b in zip(given, right, strict=True)) > 1e-5:
            problem = f"best exits {best}: you say {_show(given)}, weights are {_show(right)}"
            if max(given) > 5:
                problem += "; no weight is above 5"
            elif max(abs(a - b) for a, b in zip(given, other, strict=True)) < 1e-5:
                problem += "; you count samples whose best exit is here, the targets are 1 from here on"
        if problem:
            break
    return verdict(function, problem, "As many positive as negative targets, after weighing, unless 5 is not enough.")


def check_classifier_loss(function: Callable[[Tensor, Tensor, bool], Tensor] | None) -> bool:
    """Exercise 4: ``function(losses, probabilities, detach)``: mean of P_l E_l r over samples, divided by G.

    losses and probabilities are (N, G); r = sum_l E_l / sum_l P_l E_l, a constant if ``detach``.
    """
    problem = ""
    draw = torch.Generator().manual_seed(0)
    for rows, gates in ((6, 3), (5, 1), (1, 4)) if function is not None else ():
        values = torch.rand(rows, gates, dtype=torch.float64, generator=draw) + 0.1
        chances = torch.rand(rows, gates, dtype=torch.float64, generator=draw) / gates
        for detach in (False, True):
            found = []
            for loss in (
                function,
                lambda e, p, stop: inference_loss(e, p, mode="detached" if stop else "released"),
                lambda e, p, stop: inference_loss(e, mode="uniform"),
            ):
                leaf = values.clone().requires_grad_()
                value = loss(leaf, chances, detach)
                if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
                    problem = "the loss must be one number, a tensor, and depend on the cross entropies"
                    return verdict(function, problem, "")
                found.append((value.item(), torch.autograd.grad(value, leaf)[0]))
            (value, slope), (right, right_slope), (_, plain) = found
            far = float((slope - right_slope).abs().max())
            if abs(value - right) > 1e-7:
                problem = f"{rows} samples, {gates} gates: your loss is {value:.4f}, it is {right:.4f}"
                problem += "; divide by N and by G" if abs(value / right - gates) < 1e-6 < gates - 1 else ""
            elif far > 1e-7:
                problem = f"detach={detach}: the value is right, the gradient is off by {far:.1e}"
                if detach and torch.allclose(slope, plain, atol=1e-7):
                    problem += "; it is still that of plain cross entropy: r carries a gradient"
                elif not detach:
                    problem += "; as released r is not detached, and the gradient is that of plain cross entropy"
            if problem:
                return verdict(function, problem, "")
    return verdict(function, problem, "One word decides whether the gates have any influence on the classifiers.")


def check_schedule(function: Callable[[int, int, int, int, bool], int] | None) -> bool:
    """Exercise 5: ``function(batches, epochs, gate_steps, module_steps, restart)`` -> steps of the classifiers.

    Gates begin. ``restart``: they do so in every epoch of ``batches`` steps; otherwise phases go on over epochs.
    """
    problem = ""
    for batches, epochs, gates, modules in ((154, 10, 200, 200), (704, 1, 200, 200), (267, 3, 200, 100), (9, 4, 2, 5)):
        for restart in (False, True) if function is not None else ():
            given = int(function(batches, epochs, gates, modules, restart))
            steps = batches * epochs
            phases = Phases(0, gates, modules, 0, max(steps, gates))
            names = [phases.at(step % batches if restart else step) for step in range(steps)]
            right = names.count("modules")
            if given == right:
                continue
            how = "restarted in every epoch" if restart else "counted over all epochs"
            problem = f"{epochs} epochs of {batches} batches, phases of {gates} and {modules} steps {how}: "
            problem += f"you say {given}, the classifiers get {right}"
            other = [phases.at(step if restart else step % batches) for step in range(steps)].count("modules")
            if given == names.count("gates"):
                problem += "; yours are the gates' steps"
            elif given == other:
                problem += "; that is the other way to count"
            break
        if problem:
            break
    return verdict(function, problem, "Phases longer than an epoch that restart with it: the second kind never comes.")
