"""When do gates learn, when inference modules? (JEI-DNN, section 4.4)

    warm-up        inference modules only, cross entropies, early exits weigh most
    then in turn   ``gate_steps`` of the gates' loss, ``module_steps`` of the inference modules' loss
    at the end     gates only, for ``final_gate_steps``: they should fit the modules as they are in the end

Phases are counted over all steps, not per epoch. The authors restart with a gate phase in every epoch: with few batches
per epoch (CIFAR100-LT: 154, phases of 200) their modules never train after the warm-up.

Dynamic warm-up (the authors' later code): each module has a patience of its own. One whose validation accuracy has not
improved for so many evaluations gets its best weights back and waits; when all wait, or after the longest warm-up,
everything is free again and the phases begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Phases:
    """Lengths of the phases, in optimiser steps.

    Attributes:
        warmup: inference modules only; the longest that it may be, if warm-up is dynamic.
        gate_steps, module_steps: then in turn; 200 batches each in the authors' code.
        final_gate_steps: gates only, at the end.
        steps: all together.

    Raises:
        ValueError: lengths that leave no gate phase.
    """

    warmup: int = 600
    gate_steps: int = 100
    module_steps: int = 100
    final_gate_steps: int = 200
    steps: int = 1600

    def __post_init__(self) -> None:
        if self.gate_steps < 1 or self.module_steps < 0 or self.warmup < 0 or self.final_gate_steps < 0:
            raise ValueError(f"gate_steps must be at least 1, the others not negative; got {self}")
        if self.steps < self.warmup + self.gate_steps:
            raise ValueError(
                f"{self.steps} steps leave no gate phase after a warm-up of {self.warmup}: at least "
                f"{self.warmup + self.gate_steps}"
            )

    def at(self, step: int, warmup: int | None = None) -> str:
        """ "warmup", "gates" or "modules" for the step after ``step`` completed ones.

        Args:
            step: completed steps.
            warmup: how long the warm-up really was; None: as planned.
        """
        warmup = self.warmup if warmup is None else warmup
        if step < warmup:
            return "warmup"
        if step >= self.steps - self.final_gate_steps:
            return "gates"
        place = (step - warmup) % (self.gate_steps + self.module_steps)
        return "gates" if place < self.gate_steps else "modules"


class DynamicWarmup(nn.Module):
    """Which modules still warm up, and their best weights. All state is in buffers, so that a killed run goes on.

    Args:
        weight: (G, D, K) of the modules, for the shape.
        bias: (G, K).
        patience: evaluations without a better accuracy before a module waits.
    """

    def __init__(self, weight: Tensor, bias: Tensor, patience: int):
        super().__init__()
        if patience < 1:
            raise ValueError(f"patience of the warm-up must be at least 1 evaluation, got {patience}")
        self.patience = patience
        n_gates = len(weight)
        self.register_buffer("best", torch.full((n_gates,), -1.0))
        self.register_buffer("waited", torch.zeros(n_gates, dtype=torch.int64))
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())
        self.register_buffer("ended_at", torch.tensor(-1))

    @property
    def done(self) -> Tensor:
        """(G,) bool: modules that wait."""
        return self.waited >= self.patience

    @torch.no_grad()
    def watch(self, accuracy: Tensor, weight: Tensor, bias: Tensor) -> None:
        """One evaluation: accuracy (G,) of modules with these weights; those that wait already are not looked at."""
        better = (accuracy.to(self.best) > self.best) & ~self.done
        self.best[better] = accuracy.to(self.best)[better]
        self.weight[better], self.bias[better] = weight[better], bias[better]
        self.waited[~better] += 1
        self.waited[better] = 0
