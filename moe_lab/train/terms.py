"""Named loss terms: their weighted total and its gradients.

Every paper here trains on a sum of a task loss and regularisers. The terms stay apart and unweighted, so that each can
be looked at; only `weighted_total` adds them up.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_coefficients(coefficients: Mapping[str, float]) -> None:
    """Finite numbers, under names that are free."""
    for name, value in coefficients.items():
        if not math.isfinite(value):
            raise ValueError(f"coefficients[{name!r}] must be a finite number, got {value}")
        if name == "loss":
            raise ValueError("'loss' is the weighted total; name the term after what it measures ('cross_entropy')")


def check_names(terms: Mapping[str, Tensor], coefficients: Mapping[str, float], first_step: bool) -> None:
    """Each term needs a coefficient; on the first step each coefficient needs a term; terms are scalars."""
    for name, term in terms.items():
        if name not in coefficients:
            raise ValueError(
                f"loss term {name!r} has no coefficient; add coefficients[{name!r}] (0.0 to only log it). "
                f"Coefficients: {dict(coefficients)}."
            )
        if not isinstance(term, Tensor) or term.ndim:
            what = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ValueError(f"loss term {name!r} must be a tensor of no dimensions (take a mean), got {what}")
    if not first_step:
        return
    for name in coefficients:
        if name not in terms:
            near = difflib.get_close_matches(name, terms, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"coefficient {name!r} has no loss term{hint} Terms: {', '.join(terms)}. A term that starts later must "
                "be a zero until then."
            )


def weighted_total(terms: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """Sum of coefficient times term. A coefficient of 0 leaves the term out, so that 0 times NaN does no harm."""
    parts = [coefficients[name] * term for name, term in terms.items() if coefficients[name] != 0]
    if not parts:
        raise ValueError(f"all coefficients of the terms {list(terms)} are 0: nothing to learn from")
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that exist, sparse ones as their stored values (changing those changes the gradient)."""
    found = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # rows hit twice are added up before a norm means anything
            found.append(parameter.grad.values())
        else:
            found.append(parameter.grad)
    return found


def clip(found: list[Tensor], norm: Tensor, longest: float) -> None:
    """Scale the gradients down, in place, so that their common norm is at most ``longest``."""
    scale = (longest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in found:
        gradient.mul_(scale)
