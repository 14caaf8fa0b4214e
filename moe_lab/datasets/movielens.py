"""MovieLens 100K and 1M as two-task recommenders (COMET section 5; see `moe_lab.datasets.two_task` for the
construction).

Ids are counted from 0 and the vocabularies are the official ones, including 1M's item numbers that nobody rated: 943
x 1,682 and 6,040 x 3,952. Negatives come from the items with at least one rating (1,682 and 3,706).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import archive_member, stand_ins
from moe_lab.datasets.splits import generators
from moe_lab.datasets.two_task import rated_and_not, sample_negatives, split_rows

Ratings = tuple[np.ndarray, np.ndarray, np.ndarray]  # user, item (from 0), rating


def read_ratings(path: Path, separator: str) -> Ratings:
    """``user SEP item SEP rating SEP timestamp`` lines, ids from 1 (u.data: tab; ratings.dat: ``::``)."""
    import pandas

    step = len(
        separator
    )  # pandas' fast parser knows one-character separators: '::' reads as ':' with empty columns between
    table = pandas.read_csv(path, sep=separator[0], header=None, usecols=[0, step, 2 * step], encoding="latin-1")
    user, item, rating = (table[column].to_numpy() for column in table.columns)
    if not len(user) or user.min() < 1 or item.min() < 1:
        raise ValueError(
            f"{path}: expected lines user{separator}item{separator}rating{separator}timestamp with ids from 1"
        )
    return user.astype(np.int64) - 1, item.astype(np.int64) - 1, rating.astype(np.float32)


def _two_tasks(name: str, ratings: Ratings, n_users: int, n_items: int, seed: int) -> Dataset:
    user, item, rating = ratings
    if user.max() >= n_users or item.max() >= n_items:
        raise ValueError(
            f"{name}: ids up to {user.max() + 1} x {item.max() + 1}, expected at most {n_users} x {n_items}"
        )
    negative, split = generators(seed, 2)
    rows = rated_and_not(user, item, rating, *sample_negatives(user, item, n_users, n_items, negative))
    return split_rows(name, rows, split, {"n_users": n_users, "n_items": n_items, "rating_range": (1, 5)})


def ml_100k(seed: int = 0) -> Dataset:
    """100,000 ratings and as many negatives: 157,500 / 22,500 / 20,000 rows."""
    compact = stand_ins("ml-100k")
    if compact:
        with np.load(compact[0]) as arrays:
            ratings = (arrays["user"].astype(np.int64) - 1, arrays["item"].astype(np.int64) - 1, arrays["rating"])
    else:
        ratings = read_ratings(archive_member("ml-100k", "ml-100k.zip", "u.data"), "\t")
    return _two_tasks("ml-100k", ratings, 943, 1682, seed)


def ml_1m(seed: int = 0) -> Dataset:
    """1,000,209 ratings and 999,287 negatives (one user has rated too much): 1,574,602 / 224,944 / 199,950 rows."""
    ratings = read_ratings(archive_member("ml-1m", "ml-1m.zip", "ratings.dat"), "::")
    return _two_tasks("ml-1m", ratings, 6040, 3952, seed)
