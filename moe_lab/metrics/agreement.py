"""How well does a routing agree with the one that was planted? Experts have no names, so it is clusters that count."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix


def purity(planted: np.ndarray, assigned: np.ndarray) -> float:
    """Share of tokens that belong to the most frequent planted cluster of their expert; 1 when no expert mixes any.

    One expert per token would have purity 1 too: read it together with the number of experts used.
    """
    return float(contingency_matrix(planted, assigned).max(0).sum() / len(planted))


def agreement(planted: np.ndarray, assigned: np.ndarray) -> dict[str, float]:
    """``purity`` and ``nmi`` (normalised mutual information: 0 independent, 1 equal up to names) of (N,) labels."""
    return {"purity": purity(planted, assigned), "nmi": float(normalized_mutual_info_score(planted, assigned))}


def confusion(planted: np.ndarray, assigned: np.ndarray, n_experts: int) -> list[list[int]]:
    """Tokens of planted cluster i (row) whose largest weight is at expert e (column)."""
    table = np.zeros((int(planted.max()) + 1, n_experts), dtype=int)
    np.add.at(table, (planted, assigned), 1)
    return table.tolist()
