"""Running means of the loss terms of all trials, and who met something that is not a number. See `meter`.

Legend: K living trials, C columns (total, gradient norm, one per term).

Numbers stay on the device until somebody asks: nothing waits for a GPU within an epoch. An alarm therefore comes at the
epoch's end; it still names the first bad step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_WAITING = 512  # steps whose numbers may lie on the device
_ADVICE = "Try a lower learning rate for this trial, FitConfig(clip_norm=1.0), or a smaller coefficient."


class StackMeter:
    """Sums over the steps since `reset`.

    Attributes:
        bad: row -> what was not finite, and at which step, of the trials that met it.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Start a new epoch."""
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0
        self.bad: dict[int, str] = {}

    def record(self, step: int, terms: Mapping[str, Tensor], total: Tensor, norm: Tensor) -> None:
        """Note one step; all tensors (K,)."""
        self._names = list(terms)
        self._waiting.append((step, torch.stack([value.detach().double() for value in (total, norm, *terms.values())])))
        if len(self._waiting) >= _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Fetch the outstanding steps and add them up, one by one: the sums do not depend on when this is called."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        values = torch.stack([numbers for _, numbers in waiting]).cpu()  # (steps, C, K)
        fine = values[:, :2].isfinite().all(1)
        for row in (~fine.all(0)).nonzero().flatten().tolist():
            place = int((~fine[:, row]).nonzero()[0])
            self.bad.setdefault(row, self._explain(waiting[place][0], values[place, :, row].tolist()))
        for numbers in values:
            self._sums = numbers.clone() if self._sums is None else self._sums.add_(numbers)
        self._count += len(values)

    def means(self, row: int) -> dict[str, float]:
        """Of one trial: ``train_loss`` and ``train_<term>``."""
        if self._sums is None:
            return {}
        total, _, *terms = (self._sums[:, row] / self._count).tolist()
        return {"train_loss": total, **{f"train_{n}": value for n, value in zip(self._names, terms, strict=True)}}

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the other trials."""
        if self._sums is not None:
            self._sums = self._sums[:, list(rows)]
        self.bad = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `flush` first."""
        return {"names": self._names, "sums": self._sums, "count": self._count, "bad": self.bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self._names, self._sums = state["names"], state["sums"]
        self._count, self.bad = state["count"], dict(state["bad"])

    def _explain(self, step: int, numbers: list[float]) -> str:
        total, norm, *terms = numbers
        listed = ", ".join(f"{name} = {value:g}" for name, value in zip(self._names, terms, strict=True))
        return f"step {step}: the loss was {total:g}, the gradient norm {norm:g}; {listed}. {_ADVICE}"
