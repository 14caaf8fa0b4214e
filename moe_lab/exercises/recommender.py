"""Checks for the exercises of notebook 03. Solutions: notebooks/solutions/03_comet_recommender_solutions.ipynb."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.experts import MLPExperts, MoE
from moe_lab.gates import HashGate
from moe_lab.metrics.ranking import auc, batchwise_masked_mse, masked_mse
from moe_lab.results import Result


def check_auc(function: Callable[[Tensor, Tensor], float] | None) -> bool:
    """Exercise 1: ``function(score, label)`` is the exact AUC, ties counted half, without comparing all pairs."""
    problem = ""
    generator = torch.Generator().manual_seed(0)
    for n, levels in ((200, 1000), (200, 5), (20_000, 50)) if function is not None else ():
        score = torch.randint(levels, (n,), generator=generator).float()
        label = (torch.rand(n, generator=generator) < 0.3).float()
        given, right = float(function(score, label)), auc(score, label)
        if abs(given - right) > 1e-6:
            cause = "do ties count half?" if levels < n else "do larger scores count as better?"
            problem = (
                f"{n} rows with {levels} different scores: you get {given:.4f}, the exact value is {right:.4f}; {cause}"
            )
            break
    return verdict(function, problem, "Mean ranks cost one sort; comparing all pairs of 200,000 rows would cost 10^10.")


def check_artefact(error: Sequence[float] | None, rated: Sequence[bool] | None, batch_size: int) -> bool:
    """Exercise 2: errors and a mask for which the batch-weighted MSE is at least 1.8 times the exact one."""
    if error is None or rated is None:
        return verdict(None, "", "")
    error, rated = torch.tensor(error, dtype=torch.float64), torch.tensor(rated, dtype=torch.bool)
    problem = ""
    if error.shape != rated.shape or error.dim() != 1:
        problem = f"give two lists of equal length, not {tuple(error.shape)} and {tuple(rated.shape)}"
    elif not rated.any():
        problem = "nothing is rated, so both estimates are 0"
    else:
        exact = float(masked_mse(error, torch.zeros_like(error), rated))
        theirs = batchwise_masked_mse(error, torch.zeros_like(error), rated, batch_size)
        if theirs < 1.8 * exact:
            problem = (
                f"the batch-weighted value is {theirs:.3g}, the exact one {exact:.3g}. Each batch counts by its rows: "
                "which batch should hold the one bad row, and beside how many other rated ones?"
            )
    return verdict(error, problem, "A row that is rated alone in its batch counts as much as a batch full of ratings.")


def check_relabelling(function: Callable[[Tensor, Tensor], Tensor] | None) -> bool:
    """Exercise 3: ``function(table, permutation)`` is the table of a plain hash gate that does what hash+ ends with.

    Judged by outputs: the new table with the experts as they are must equal the old table with output i sent to expert
    permutation[i].
    """
    problem = ""
    if function is not None:
        generator = torch.Generator().manual_seed(0)
        gate = HashGate(50, 6, seed=1)
        bank = MLPExperts(6, (4, 3), generator=generator)
        permutation = torch.tensor([2, 0, 3, 1, 5, 4])
        keys, x = torch.arange(50), torch.randn(50, 4, generator=generator)
        with torch.no_grad():
            wanted = torch.cat([bank.single(int(permutation[gate.table[i]]), x[i : i + 1]) for i in range(50)])
            gate.table.copy_(torch.as_tensor(function(gate.table.clone(), permutation)))
            given, _ = MoE(gate, bank)(x, keys)
        wrong = int(((given - wanted).abs().amax(1) > 1e-6).sum())
        if wrong:
            problem = f"{wrong} of 50 users reach another expert than permutation[table[user]]"
    return verdict(
        function,
        problem,
        "So '+' gives a hash gate nothing that another table could not.",
    )


def check_collapse(weight: float | None, run: Callable[[float], Result], at_least: int = 4) -> bool:
    """Exercise 4: an entropy weight with which COMET uses ``at_least`` experts per task and at most k + 1 per row.

    ``run(weight)`` trains with that entropy weight, everything else as in the notebook.
    """
    if weight is None:
        return verdict(None, "", "")
    result = run(weight)
    used, per_row, k = result.metrics["used_experts"], result.metrics["experts_per_example"], result.config["k"]
    problem = ""
    if used < at_least:
        problem = f"only {used} experts are in use: trees still harden before they know the leaves. Less entropy?"
    elif per_row > k + 1:
        problem = f"{per_row:.2f} experts per row: nothing pushes the trees to be hard. More entropy, or more epochs?"
    return verdict(weight, problem, f"{used} experts in use, {per_row:.2f} per row: a compromise, not a free lunch.")
