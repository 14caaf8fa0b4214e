"""What `fit` is told, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SCHEDULES = ("cosine", "inverse_sqrt", "constant")


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a share of the optimiser's own, by the number n of the step, counted from 1.

        warm-up, n <= w:    n / w
        cosine              f + (1 - f) (1 + cos(pi r)) / 2,   r = (n - w) / (N - w), at most 1
        inverse_sqrt        sqrt(max(w, 1) / n)                                    (Vaswani et al. 2017)
        constant            1

    A value without state, as temperature schedules are: a resumed run has the rate of one that was not interrupted.

    Attributes:
        warmup: w, steps of linear rise; 0: none.
        steps: N, where the cosine ends.
        floor: f, what the cosine ends at.
        kind: cosine, inverse_sqrt or constant.
    """

    warmup: int = 0
    steps: int = 1
    floor: float = 0.1
    kind: str = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"kind must be one of {', '.join(SCHEDULES)}; got {self.kind!r}")
        if self.warmup < 0 or self.steps < 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"need warmup >= 0, steps >= 1 and floor in [0, 1], got {self}")

    def __call__(self, step: int) -> float:
        """Share for step ``step`` = 1, 2, ..."""
        if step <= self.warmup:
            return step / self.warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "inverse_sqrt":
            return (max(self.warmup, 1) / step) ** 0.5
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class FitConfig:
    """How long to train and how carefully.

    Attributes:
        epochs: passes over the data at most; None if ``max_steps`` alone decides.
        patience: stop once this many epochs in a row did not improve the monitored metric; None: never early.
        clip_norm: scale the gradient down to this norm (over all parameters) when it is longer; None: leave it.
        checkpoint_every: checkpoint after so many steps, besides those after epochs (after each, unless writing one
            takes seconds, see `trainer`); 0: epochs only. Worth it when an epoch takes longer than one is ready to
            lose.
        max_steps: optimiser steps at most, over the whole run; the epoch in which they end is evaluated as usual.
        progress: show a progress bar.
        learning_rate: how the optimisers' learning rates change; None: they stay.
    """

    epochs: int | None
    patience: int | None = None
    clip_norm: float | None = None
    checkpoint_every: int = 0
    max_steps: int | None = None
    progress: bool = True
    learning_rate: LearningRate | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps: otherwise training never ends")
        for name in ("epochs", "patience", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None, got {self.clip_norm}")
        if self.checkpoint_every < 0:
            raise ValueError(
                f"checkpoint_every must be 0 (epochs only) or a number of steps, got {self.checkpoint_every}"
            )


@dataclass
class History:
    """What happened.

    Attributes:
        rows: one per epoch: ``epoch`` (1 is the first), ``step`` (optimiser steps so far), ``train_loss`` (weighted
            total) and ``train_<term>`` (unweighted) as means over the steps, all that ``evaluate`` returned, ``lr``,
            and ``seconds`` (training and evaluation).
        steps: optimiser steps done.
        best_epoch: the epoch whose weights the model has in the end (None without ``evaluate``: the last ones).
        best_value: the monitored metric then.
        stopped: why it ended: ``epochs``, ``max_steps`` or ``patience``; empty while it runs.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    best_epoch: int | None = None
    best_value: float | None = None
    stopped: str = ""


def why_stop(config: FitConfig, history: History) -> str:
    """After an epoch: ``patience``, ``max_steps``, ``epochs``, or empty to go on."""
    epoch = len(history.rows)
    if config.patience is not None and epoch - (history.best_epoch or 0) >= config.patience:
        return "patience"
    if config.max_steps is not None and history.steps >= config.max_steps:
        return "max_steps"
    return "epochs" if config.epochs is not None and epoch >= config.epochs else ""
