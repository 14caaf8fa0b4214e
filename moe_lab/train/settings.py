"""What a run that resumes another one must have in common with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moe_lab.batches import Batches
from moe_lab.results.plain import to_plain
from moe_lab.train.config import FitConfig

_HYPERPARAMETERS = ("lr", "betas", "eps", "momentum", "weight_decay")


def settings_of(
    model: nn.Module,
    train: Batches,
    optimizers: Sequence[Optimizer],
    coefficients: Mapping[str, float],
    config: FitConfig,
    monitor: str | None,
) -> dict[str, Any]:
    """Flat names -> plain values: config, coefficients, data, optimisers, shapes of the model, monitored metric."""
    parts: dict[str, Mapping[str, Any]] = {
        "config": asdict(config),
        "coefficients": coefficients,
        "train": train.describe(),
        "model": {name: tuple(value.shape) for name, value in model.state_dict().items()},
        "evaluation": {"monitor": monitor},
    }
    for index, optimizer in enumerate(optimizers):
        parts[f"optimizer{index}"] = {"kind": type(optimizer).__name__}
        for number, group in enumerate(optimizer.param_groups):
            known = {name: group[name] for name in _HYPERPARAMETERS if name in group}
            parts[f"optimizer{index}.group{number}"] = known
    flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    del flat["config.progress"], flat["config.checkpoint_every"]  # they change nothing in the outcome
    return to_plain(flat, "settings")
