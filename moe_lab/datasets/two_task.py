"""Two-task recommender rows from ratings (COMET, Ibrahim et al., KDD 2023, arXiv 2306.02824, section 5 and supplement).

Task 1, "watched": did user u rate item i? Task 2, "rating": which rating, on rated pairs only.

    positives  every rating
    negatives  per user as many as positives, uniform without replacement from the items that user did not rate, out of
               the catalogue of items with at least one rating: min(positives, catalogue - positives)
    split      stratified on `watched`: 10 % test, then 12.5 % of the rest validation (rows, not users or time)

Uniform negatives make "watched" largely a question of popularity: counting an item's ratings already reaches an AUC of
about 0.85 on MovieLens. Every table of results has that baseline beside it.

Where we differ: the authors write a missing rating as 0 and mask on ``target == 0``, so that a genuine rating of 0.0
(Jester) counts as missing. Here ``has_rating`` is the mask and ``rating`` is 0 where it is False.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.splits import split_sizes, stratified_split

Rows = dict[str, np.ndarray]


def sample_negatives(
    user: np.ndarray, item: np.ndarray, n_users: int, n_items: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Unrated (user, item) pairs, as many per user as rated ones if the catalogue allows.

    Args:
        user, item: (P,) rated pairs, no pair twice; 0 <= user < n_users, 0 <= item < n_items.

    Returns:
        user, item of the negatives, (M,) each with M <= P.

    Raises:
        ValueError: a pair occurs twice (its user would get too many negatives).
    """
    pair = user.astype(np.int64) * n_items + item
    if len(np.unique(pair)) != len(pair):
        raise ValueError("a (user, item) pair is rated twice; keep one rating per pair")
    catalogue = np.unique(item)
    items_of = np.split(item[np.argsort(user, kind="stable")], np.cumsum(np.bincount(user, minlength=n_users))[:-1])
    drawn = []
    for rated in items_of:
        unrated = np.setdiff1d(catalogue, rated, assume_unique=True)
        drawn.append(rng.choice(unrated, size=min(len(rated), len(unrated)), replace=False))
    return np.repeat(np.arange(n_users), [len(items) for items in drawn]), np.concatenate(drawn)


def rated_and_not(
    user: np.ndarray, item: np.ndarray, rating: np.ndarray, other_user: np.ndarray, other_item: np.ndarray
) -> Rows:
    """Rated pairs first, then pairs without a rating, as rows of the two tasks."""
    n, m = len(user), len(other_user)
    has_rating = np.concatenate((np.ones(n, dtype=bool), np.zeros(m, dtype=bool)))
    return {
        "user": np.concatenate((user, other_user)).astype(np.int64),
        "item": np.concatenate((item, other_item)).astype(np.int64),
        "watched": has_rating.astype(np.float32),
        "rating": np.concatenate((rating, np.zeros(m))).astype(np.float32),
        "has_rating": has_rating,
    }


def split_rows(
    name: str,
    rows: Rows,
    rng: np.random.Generator,
    info: dict[str, Any],
    *,
    test: float = 0.10,
    valid_of_rest: float = 0.125,
) -> Dataset:
    """A recommender `Dataset` from rows, stratified on `watched`; ``test`` and ``valid_of_rest`` are fractions."""
    sizes = split_sizes(len(rows["watched"]), test, valid_of_rest)
    parts = [
        {key: torch.from_numpy(array[index]) for key, array in rows.items()}
        for index in stratified_split(rows["watched"], *sizes, rng)
    ]
    return Dataset(name, "recommender", *parts, info=info)
