"""How healthy is a cooling schedule if nothing has been learned yet? Random logits at their initial size, cooled down.

For many draws L ~ U(-size, size) and every stage of a schedule: the worst row error of P, whether the best assignment
of P is that of L, how far P is from it, and the size of the gradient that reaches L. Taught in notebook 05.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lab.gates.permutation import Schedule, find_schedule
from moe_lab.gates.sinkhorn import best_assignment, permutation_matrix, row_error, sinkhorn, soft_hard_distance


def schedule_health(
    schedule: str | Schedule,
    n_experts: int,
    *,
    draws: int = 40,
    stages: int = 9,
    size: float = 0.05,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per stage (progress 0 .. 1).

    Each row: ``progress``; ``temperature``; ``iterations`` (at most); medians over the draws ``row_error``,
    ``soft_hard_distance`` and ``gradient``; ``match``, the share of draws in which P and L have the same best
    assignment.

    The gradient is that of sum(P * M) for a random M with entries of size 1, times the temperature (so that a soft P
    has the same number at any temperature): its Frobenius norm per expert. 0: P is saturated, L cannot learn.
    """
    schedule = find_schedule(schedule)
    generator = torch.Generator().manual_seed(seed)
    start = size * (2 * torch.rand(draws, n_experts, n_experts, generator=generator) - 1)
    direction = torch.randn(draws, n_experts, n_experts, generator=generator)
    best = best_assignment(start)
    rows = []
    for progress in torch.linspace(0, 1, stages):
        tau = float(schedule.temperature(float(progress)))
        iterations = schedule.iterations(progress)
        logits = start.clone().requires_grad_()
        soft = sinkhorn(logits / tau, iterations, schedule.tolerance)
        (gradient,) = torch.autograd.grad((soft * direction).sum(), logits)
        soft = soft.detach()
        rows.append(
            {
                "progress": float(progress),
                "temperature": tau,
                "iterations": int(iterations),
                "row_error": float(row_error(soft).median()),
                "match": float((best_assignment(soft) == best).all(-1).float().mean()),
                "soft_hard_distance": float(soft_hard_distance(soft, permutation_matrix(best)).median()),
                "gradient": float((tau * gradient).square().sum((-2, -1)).sqrt().median() / n_experts),
            }
        )
    return rows
