"""Checks for the exercises of notebook 05 (local search). Solutions: notebooks/solutions/."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.experiments.search_schedule import schedule_health
from moe_lab.experiments.search_study import paired
from moe_lab.gates import TopKGate
from moe_lab.gates.local_search import Permutation, PermutationSearch
from moe_lab.gates.permutation import Schedule


def check_temperature(gap: float, tau: float | None) -> bool:
    """Exercise 1: the temperature at which a 2 x 2 Sinkhorn matrix has 0.99 on its diagonal; gap = a + d - b - c."""
    problem = ""
    if tau is not None:
        p = 1 / (1 + math.exp(-gap / (2 * tau))) if tau > 0 else float("nan")
        if not tau > 0:
            problem = "a temperature is positive"
        elif abs(p - 0.99) > 1e-3:
            problem = f"at τ = {tau:.4g} the diagonal is {p:.3f}. Solve p = sigmoid(gap / (2 τ)) for τ"
    return verdict(tau, problem, "Logits of initial size are frozen well before the official first step's τ = 0.001.")


def check_schedule(schedule: Schedule | None) -> bool:
    """Exercise 2: a schedule with 150 iterations, no tolerance, and healthy for 16 experts from start to end."""
    problem = ""
    if schedule is not None:
        if schedule.tolerance or max(schedule.iterations_start, schedule.iterations_end) > 150:
            problem = "at most 150 iterations, tolerance 0: only the temperatures are yours"
        else:
            health = schedule_health(schedule, 16, draws=40, stages=5)
            worst = max(row["row_error"] for row in health)
            gradient = min(row["gradient"] for row in health)
            far = health[-1]["soft_hard_distance"]
            if worst >= 0.01:
                problem = f"the median row error reaches {worst:.2g}: too cold for 150 iterations"
            elif gradient < 0.01:
                problem = f"the gradient falls to {gradient:.1e}: L stops learning"
            elif far > 2.5:
                problem = (
                    f"at the end P is still {far:.1f} from a permutation (uniform: {math.sqrt(15):.1f}): cool further"
                )
    return verdict(schedule, problem, "Between too hot to choose and too cold to learn there is room.")


def check_reordering(reorder: Callable[[Tensor, Tensor], Tensor] | None) -> bool:
    """Exercise 3: ``reorder(bank, assignment)`` such that the bare gate on it equals the searched gate on ``bank``."""
    problem = ""
    if reorder is not None:
        generator = torch.Generator().manual_seed(0)
        gate = TopKGate(4, 6, 2, generator=generator)
        x = torch.randn(50, 4, generator=generator)
        bank = torch.randn(6, 4, 3, generator=generator)
        assignment = torch.tensor([2, 0, 1, 4, 5, 3])  # not its own inverse
        searched = PermutationSearch(gate, permutation=Permutation.fixed(assignment))

        def mixture(weights: Tensor, bank: Tensor) -> Tensor:
            return torch.einsum("te,td,edf->tf", weights, x, bank)

        with torch.no_grad():
            wanted = mixture(searched(x).weights, bank)
            given = reorder(bank, assignment)
            if given.shape != bank.shape:
                problem = f"the bank had shape {tuple(bank.shape)}, yours has {tuple(given.shape)}"
            elif not torch.allclose(mixture(gate(x).weights, given), wanted, atol=1e-5):
                inverse = torch.equal(given, bank[assignment.argsort()])
                hint = "that is the inverse" if inverse else "output i must find at place i the expert it was sent to"
                problem = f"the outputs differ: {hint}"
    return verdict(reorder, problem, "A hard permutation adds nothing at inference: reorder the bank once and drop it.")


def check_counterexample(answers: Sequence[float] | None, targets: Sequence[float] | None) -> bool:
    """Exercise 4: constant experts and one constant target per output, where a soft matrix beats every permutation."""
    problem = ""
    if answers is None or targets is None:
        return verdict(None, "", "")
    f, y = np.asarray(answers, dtype=float), np.asarray(targets, dtype=float)
    if f.shape != y.shape or f.ndim != 1 or len(f) < 2:
        problem = "give as many answers (one per expert) as targets (one per output), two or more"
    else:
        hard = min(np.mean((f[list(order)] - y) ** 2) for order in itertools.permutations(range(len(f))))
        soft = np.mean((f.mean() - y) ** 2)  # the uniform matrix
        if hard - soft < 0.1:
            problem = (
                f"best permutation {hard:.3g}, uniform matrix {soft:.3g}: the soft one must be better by 0.1. "
                "When is an average of experts nearer to the target than each of them?"
            )
    return verdict(answers, problem, "The relaxation minimises the loss of a mixture, not the mean loss of its parts.")


def check_help(study: Any, helped: Iterable[str] | None) -> bool:
    """Exercise 5: scenarios where the default search beats one assignment before training by two standard errors."""
    problem = ""
    if helped is not None:
        table = paired(study, "default", "one_shot")
        right = set(table.index[table["difference"] < -2 * table["standard_error"]])
        unknown = set(helped) - set(table.index)
        if unknown:
            problem = f"no such scenario: {sorted(unknown)}"
        elif set(helped) != right:
            missing, extra = sorted(right - set(helped)), sorted(set(helped) - right)
            problem = f"{len(missing)} missing, {len(extra)} too many" + (
                f" (look at {extra[0]!r} again)" if extra else ""
            )
    return verdict(helped, problem, "There something must still learn: only then can searching while training pay.")
