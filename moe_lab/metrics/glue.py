"""Scores of text tasks, computed by scikit-learn.

    accuracy   share of right predictions
    f1         2 P R / (P + R) of class 1, "they are the same": precision P, recall R; 0 if class 1 is never predicted
    matthews   (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)); 0 if all predictions are equal

Which of them a task has: CoLA matthews; MRPC and QQP accuracy and f1; the others accuracy (COMET, supplement; GLUE).
In [0, 1], Matthews in [-1, 1]; papers print them times 100.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from moe_lab.datasets.glue import TextTask, metrics_of
from moe_lab.names import check_name


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    if max(labels.max(), predictions.max()) > 1:
        raise ValueError("f1 is for two classes, 0 and 1")
    return f1_score(labels, predictions, zero_division=0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": _f1,
    "matthews": matthews_corrcoef,
}


def score(task: TextTask | str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics by name, the one to choose by first.

    Args:
        task: a task, or its name.
        predictions: (N,) classes, not logits or probabilities.
        labels: (N,) classes.

    Raises:
        ValueError: unknown task; no rows; lengths that differ; something that is not (N,) integers.
    """
    names = metrics_of(task) if isinstance(task, str) else task.metrics
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    for what, values in (("predictions", predictions), ("labels", labels)):
        if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
            raise ValueError(
                f"{what} must be (N,) classes, got {values.dtype}{list(values.shape)}; take the argmax first"
            )
    if len(predictions) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{len(predictions)} predictions for {len(labels)} labels; give one for each, and at least one"
        )
    for name in names:
        check_name("metric", name, METRICS)
    return {name: float(METRICS[name](labels, predictions)) for name in names}
