"""Running means of the loss terms, and an alarm when one of them, a gradient or a weight is not a number."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

STEPS_BETWEEN_CHECKS_ON_GPU = 16  # a check waits for the device; on a CPU there is nothing to wait for


class NonFiniteLoss(FloatingPointError):
    """The loss, a gradient, a parameter or the monitored metric became NaN or infinite."""


_ADVICE = (
    "Try a lower learning rate, FitConfig(clip_norm=1.0), or a smaller coefficient; if it happens at the first step, "
    "look for NaN in the data or a division by a count that can be zero."
)


class Meter:
    """Adds up loss terms and watches that loss and gradient norm are finite.

    On a GPU the numbers are fetched every 16 steps only, so an alarm may come up to 15 steps late; it still names the
    first bad step. `flush` fetches what is outstanding: call it before anything is saved.

    Attributes:
        sums, counts: per column (``train_loss`` and ``train_<term>``) since `reset`.
    """

    def __init__(self, model: nn.Module, on_gpu: bool) -> None:
        self._model = model
        self._patience = STEPS_BETWEEN_CHECKS_ON_GPU if on_gpu else 1
        self._waiting: list[tuple[int, list[str], Tensor]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def reset(self) -> None:
        """Start a new epoch."""
        self.sums, self.counts = {}, {}

    def record(self, step: int, terms: Mapping[str, Tensor], total: Tensor, gradient_norm: Tensor) -> None:
        """Note one step; may raise `NonFiniteLoss`."""
        values = torch.stack([value.detach().double() for value in (total, gradient_norm, *terms.values())])
        self._waiting.append((step, list(terms), values))
        if len(self._waiting) >= self._patience:
            self.flush()

    def flush(self) -> None:
        """Fetch the outstanding steps, check them, add them up."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        numbers = torch.cat([values for _, _, values in waiting]).tolist()
        for step, names, values in waiting:
            total, norm, *terms = numbers[: len(values)]
            numbers = numbers[len(values) :]
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise NonFiniteLoss(self._explain(step, total, norm, dict(zip(names, terms, strict=True))))
            for name, value in [("train_loss", total), *((f"train_{n}", v) for n, v in zip(names, terms, strict=True))]:
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean over the steps in which a term was there."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def _explain(self, step: int, total: float, norm: float, terms: dict[str, float]) -> str:
        bad = {name: value for name, value in terms.items() if not math.isfinite(value)}
        if not math.isfinite(total):
            what = f"loss term {_list(bad)}" if bad else f"the total is {total} though every term is finite"
            spoiled = non_finite_parameters(self._model)
            where = f"; parameters that are already non-finite: {', '.join(spoiled[:3])}" if spoiled else ""
            return f"step {step}: {what}{where}. All terms: {_list(terms)}. {_ADVICE}"
        names = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None and not _is_finite(parameter.grad)
        ]
        which = f"of {', '.join(names[:3])}" if names else f"norm {norm} (too large to add up)"
        return f"step {step}: the gradients are non-finite: {which}. The loss was {total}. {_ADVICE}"


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(torch.isfinite(values).all())


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with a NaN or an infinity."""
    return [name for name, parameter in model.named_parameters() if not _is_finite(parameter.detach())]


def check_parameters(model: nn.Module, step: int) -> None:
    """Raise `NonFiniteLoss` if a parameter is spoiled (by the optimiser: the gradients were finite)."""
    names = non_finite_parameters(model)
    if names:
        raise NonFiniteLoss(f"after step {step} parameters are non-finite: {', '.join(names[:3])}. {_ADVICE}")


def check_metrics(metrics: Mapping[str, Any], monitor: str, epoch: int) -> None:
    """The monitored metric must be there (ValueError) and finite (`NonFiniteLoss`)."""
    if monitor not in metrics:
        near = difflib.get_close_matches(monitor, metrics, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"evaluate returns no {monitor!r} to monitor{hint} It returns: {', '.join(metrics)}.")
    if not math.isfinite(metrics[monitor]):
        raise NonFiniteLoss(f"{monitor} is {metrics[monitor]} after epoch {epoch}: {dict(metrics)}. {_ADVICE}")


def _list(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in terms.items())
