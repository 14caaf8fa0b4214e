"""How good is a way to leave? Accuracy, cost, calibration, prediction sets of one method at one setting.

Legend: N samples, L exits, K classes.

Two artefacts of the published comparison stand beside the honest numbers: calibration error per batch of 64, and of
probabilities that went through the softmax twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lab.exits.policies import at_exit
from moe_lab.metrics.calibration import double_softmax, expected_calibration_error, reliability
from moe_lab.metrics.conformal import STRATEGIES, coverage_and_size, exit_quantiles, prediction_sets


@dataclass(frozen=True)
class Answers:
    """What a method answers on one set of samples.

    Attributes:
        logits: (N, L, K) at every exit.
        labels: (N,).
        exits: (N,) taken.
    """

    logits: Tensor
    labels: Tensor
    exits: Tensor

    @property
    def chosen(self) -> Tensor:
        """(N, K) float64 logits at the exit taken."""
        return at_exit(self.logits, self.exits).double()

    def right(self) -> Tensor:
        """(N,) bool."""
        return self.chosen.argmax(-1) == self.labels


@dataclass(frozen=True)
class Contender:
    """A method at one setting.

    Attributes:
        method: its name.
        setting: a price, a ratio of shares, a threshold, an exit.
        test: answers on the test set.
        calibration: answers on the part of validation that is kept for calibration.
        temperatures: (L,) of its exits, fitted there.
    """

    method: str
    setting: float
    test: Answers
    calibration: Answers
    temperatures: Tensor


def mean_cost(costs: Tensor, exits: Tensor) -> float:
    """Mean relative cost of exits (N,); costs (L,)."""
    return float(costs.to(exits.device)[exits].mean())


def _sets(contender: Contender, alpha: float, strategy: str, twice: bool = False) -> tuple[float, float, int]:
    """Coverage, mean size, and exits whose sets are full for want of calibration samples."""
    known, test = contender.calibration, contender.test
    calibration, chosen = known.logits.double().softmax(-1), test.chosen.softmax(-1)
    if twice:
        calibration, chosen = double_softmax(calibration), double_softmax(chosen)
    quantiles = exit_quantiles(calibration, known.labels, known.exits, alpha, strategy=strategy, warn=False)
    coverage, size = coverage_and_size(prediction_sets(chosen, test.exits, quantiles), test.labels)
    return coverage, size, int(quantiles.isinf().sum())


def score(contender: Contender, costs: Tensor, alpha: float) -> dict[str, Any]:
    """One point: method, setting, cost (relative), accuracy, calibration errors, prediction sets, exits.

    Returns:
        ece: equal-mass bins; ece_width: equal-width bins; ece_temperature: after a temperature per exit;
        ece_per_batch, ece_double_softmax: the artefacts. coverage, set_size: at ``alpha``, quantiles per exit;
        set_size_double_softmax: the same from probabilities through the softmax twice. exits: share per exit.
    """
    test = contender.test
    right, chosen = test.right(), test.chosen
    probabilities = chosen.softmax(-1)
    top = probabilities.max(-1).values
    tempered = (chosen / contender.temperatures.to(chosen.device)[test.exits].unsqueeze(-1)).softmax(-1)
    coverage, size, _ = _sets(contender, alpha, "gated")
    _, size_twice, _ = _sets(contender, alpha, "gated", twice=True)
    return {
        "method": contender.method,
        "setting": contender.setting,
        "cost": mean_cost(costs, test.exits),
        "accuracy": float(right.double().mean()),
        "ece": expected_calibration_error(top, right),
        "ece_width": expected_calibration_error(top, right, equal_mass=False),
        "ece_temperature": expected_calibration_error(tempered.max(-1).values, right),
        "ece_per_batch": expected_calibration_error(top, right, per_batch=64),
        "ece_double_softmax": expected_calibration_error(double_softmax(probabilities).max(-1).values, right),
        "coverage": coverage,
        "set_size": size,
        "set_size_double_softmax": size_twice,
        "exits": (torch.bincount(test.exits, minlength=len(costs)).double() / len(test.exits)).tolist(),
    }


def exit_rows(contender: Contender) -> Iterator[dict[str, Any]]:
    """Per exit that somebody takes: share, accuracy and mean confidence of those, accuracy of all there, ECE, T."""
    test = contender.test
    right, top = test.right(), test.chosen.softmax(-1).max(-1).values
    of_all = (test.logits.argmax(-1) == test.labels.unsqueeze(1)).double().mean(0)
    for level in range(test.logits.shape[1]):
        here = test.exits == level
        if here.any():
            yield {
                "method": contender.method,
                "setting": contender.setting,
                "exit": level,
                "share": float(here.double().mean()),
                "accuracy": float(right[here].double().mean()),
                "confidence": float(top[here].mean()),
                "accuracy_of_all": float(of_all[level]),
                "ece": expected_calibration_error(top[here], right[here]),
                "temperature": float(contender.temperatures[level]),
            }


def conformal_rows(
    contender: Contender, alphas: Sequence[float], strategies: Sequence[str] = STRATEGIES
) -> Iterator[dict[str, Any]]:
    """Per strategy and alpha: coverage, set_size, and ``full``, the exits whose sets are full for want of samples."""
    for strategy in strategies:
        for alpha in alphas:
            coverage, size, full = _sets(contender, alpha, strategy)
            about = {"method": contender.method, "setting": contender.setting, "strategy": strategy, "alpha": alpha}
            yield about | {"coverage": coverage, "set_size": size, "full": full}


def reliability_rows(contender: Contender, n_bins: int = 15) -> Iterator[dict[str, Any]]:
    """The reliability diagram of all test samples: one row per bin."""
    top = contender.test.chosen.softmax(-1).max(-1).values
    for row in reliability(top, contender.test.right(), n_bins=n_bins).to_dict("records"):
        yield {"method": contender.method, "setting": contender.setting, **row}


def gain(
    points: pd.DataFrame,
    baseline: str,
    column: str = "accuracy",
    *,
    method: str = "jei_dnn",
    between: tuple[float, float] = (0.0, 1.0),
) -> float | None:
    """Mean of a column of one method minus that of another at equal cost.

    The baseline is interpolated between its points; points of the method outside its range of costs are left out.

    Args:
        points: columns method, cost, and ``column``.
        baseline: what is subtracted.
        column: of equally dear points of the baseline the best counts: the largest accuracy, or the smallest otherwise.
        method: from whom it is subtracted.
        between: only points of these costs.

    Returns:
        None if no point is left.
    """
    by_cost = points[points.method == baseline].groupby("cost")[column]
    other = (by_cost.max() if column == "accuracy" else by_cost.min()).sort_index()
    if other.empty:
        return None
    low, high = max(between[0], other.index.min()), min(between[1], other.index.max())
    own = points[(points.method == method) & points.cost.between(low, high)]
    if own.empty:
        return None
    return float((own[column] - np.interp(own.cost, other.index, other.to_numpy())).mean())


def nearest(contenders: Sequence[Contender], costs: Tensor, cost: float) -> Contender:
    """The contender whose cost on the calibration samples is nearest: chosen without the test set."""
    return min(contenders, key=lambda contender: abs(mean_cost(costs, contender.calibration.exits) - cost))
