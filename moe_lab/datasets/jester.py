"""Jester dataset 1 as a two-task recommender (COMET supplement): 73,421 users x 100 jokes, every pair is a row.

    task 1   did user u rate joke i?                 negatives are *all* unrated pairs, not a sample
    task 2   the rating, in [-10, 10]                on rated pairs
    split    70 / 15 / 15 %, stratified on task 1    5.1 M / 1.1 M / 1.1 M rows; stratification is our choice

Official format: three zipped Excel 97 sheets, one row per user, first the number of jokes rated, then 100 ratings,
where 99 means not rated. Reading them takes about a minute and a half, so the matrix is kept beside them as .npz.

Where we differ: a rating of exactly 0.0 is a rating (``has_rating`` is True); the authors' mask drops it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import archive_member, keep_array, kept_array
from moe_lab.datasets.splits import generators
from moe_lab.datasets.two_task import rated_and_not, split_rows

NOT_RATED = 99.0
PARSED = "jester_dataset_1.npz"


def read_sheet(path: Path) -> np.ndarray:
    """(users, jokes) float32 ratings of one Excel sheet, NaN where not rated."""
    import xlrd

    sheet = xlrd.open_workbook(str(path)).sheet_by_index(0)
    cells = np.array([sheet.row_values(row) for row in range(sheet.nrows)], dtype=np.float32)
    ratings = cells[:, 1:]
    ratings = np.where(ratings == NOT_RATED, np.float32(np.nan), ratings)
    if np.nanmax(np.abs(ratings), initial=0.0) > 10:
        raise ValueError(f"{path}: ratings outside [-10, 10]; expected a count, then ratings or {NOT_RATED:g}, per row")
    return ratings


def read_ratings() -> np.ndarray:
    """The three sheets one below the other, (73421, 100) float32, NaN where not rated."""
    kept = kept_array("jester", PARSED)
    if kept is not None:
        return kept
    parts = (1, 2, 3)
    sheets = [archive_member("jester", f"jester_dataset_1_{part}.zip", f"jester-data-{part}.xls") for part in parts]
    ratings = np.concatenate([read_sheet(sheet) for sheet in sheets])
    keep_array(PARSED, ratings)
    return ratings


def jester(seed: int = 0) -> Dataset:
    """Every (user, joke) pair as a row of the two tasks."""
    ratings = read_ratings()
    (split,) = generators(seed, 1)
    user, item = np.nonzero(~np.isnan(ratings))
    rows = rated_and_not(user, item, ratings[user, item], *np.nonzero(np.isnan(ratings)))
    n_users, n_items = ratings.shape
    info = {"n_users": n_users, "n_items": n_items, "rating_range": (-10, 10)}
    return split_rows("jester", rows, split, info, test=0.15, valid_of_rest=0.15 / 0.85)
