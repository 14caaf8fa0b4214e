"""Temperature as a function of the step (EvoMoE, section 3: tau falls while the gate goes from dense to sparse).

n = completed optimiser steps, D = ``steps``, tau_0 = ``start``, tau_1 = ``end``, r = min(n / D, 1):

    linear        tau_0 - r (tau_0 - tau_1)
    exponential   tau_0 (tau_1 / tau_0)^r
    cosine        tau_1 + (tau_0 - tau_1) (1 + cos(pi r)) / 2
    constant      tau_0

tau(0) = tau_0, tau(n) = tau_1 for n >= D, never rising. A schedule is a value: it has no state, so a run that is
resumed at step n has the temperature of one that was not interrupted. (The authors' code keeps tau in a module-level
variable outside the checkpoint, and its defaults, D = 1, reach tau_1 after one step.)

Taught in notebook 09.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("linear", "exponential", "cosine", "constant")


@dataclass(frozen=True)
class TemperatureSchedule:
    """tau(n).

    Attributes:
        start: tau_0, positive; the authors' scripts have 2.
        end: tau_1, positive and at most ``start``; 0.3 to 0.5 in public code.
        steps: D, at least 1: steps until ``end`` is reached.
        kind: linear, exponential, cosine or constant.

    Raises:
        ValueError: a temperature that is not positive or that would rise, D < 1, unknown kind.
    """

    start: float = 2.0
    end: float = 0.3
    steps: int = 1000
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(str(self.kind), KINDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown schedule {self.kind!r}{hint} Valid: {', '.join(KINDS)}")
        if not self.end > 0:
            raise ValueError(f"temperatures must be positive, got end = {self.end}; for a hard choice use hard mode")
        if self.end > self.start:
            raise ValueError(f"the temperature must not rise: start = {self.start}, end = {self.end}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def progress(self, step: int | Tensor) -> float | Tensor:
        """r in [0, 1]."""
        if isinstance(step, Tensor):
            return (step / self.steps).clamp(0.0, 1.0)
        return min(max(step / self.steps, 0.0), 1.0)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        """tau after ``step`` completed steps: a float, or a scalar tensor for a scalar tensor."""
        r = self.progress(step)
        if self.kind == "linear":
            return self.start - r * (self.start - self.end)
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** r
        if self.kind == "cosine":
            cosine = torch.cos(math.pi * r) if isinstance(r, Tensor) else math.cos(math.pi * r)
            return self.end + (self.start - self.end) * (1 + cosine) / 2
        return self.start + 0 * r
