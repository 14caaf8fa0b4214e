"""Not a test: a model of one weight, so that every training step can be followed by hand."""

from __future__ import annotations

import torch
from torch import nn

from moe_lab.batches import Batches
from moe_lab.train import FitConfig, fit


class Scalar(nn.Module):
    """One weight w."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start]))


def pull(model, batch):
    """Gradient is the batch mean of x: w falls by learning rate times that."""
    return {"pull": (model.w * batch["x"]).mean()}


def train(model, *, x=(1.0,), loss=pull, coefficients=None, batch_size=1, rate=0.1, **options):
    config = {"epochs": 1, "progress": False, **options.pop("config", {})}
    return fit(
        model,
        Batches({"x": torch.tensor(x)}, batch_size),
        loss,
        optimizer=options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=rate),
        coefficients=coefficients or {"pull": 1.0},
        config=FitConfig(**config),
        **options,
    )


def by_list(values):
    """An evaluation that returns these monitored values, one per epoch."""
    values = iter(values)
    return lambda model: {"valid_loss": next(values)}
