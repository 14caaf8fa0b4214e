"""Book-Crossing as a two-task recommender (COMET supplement: 18,960 users, 31,070 books, 556,724 rows, 70 / 15 / 15 %).

    rows     the records of users and books with at least 5 records
    task 1   read or not; task 2 the rating, 1..10

What the supplement leaves open, and our choice:

    negatives   not stated. The file holds "implicit" records (rating 0) beside ratings, and the row count suggests that
                these are the negatives: here a record is positive if it has a rating, negative if it is implicit.
    filter      not stated whether "at least 5" holds before or after the other half is filtered. Here it holds after:
                the filter is repeated until nothing changes (``repeat_filter=False`` applies it once).
    split       stratified on task 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import archive_member
from moe_lab.datasets.splits import generators
from moe_lab.datasets.two_task import rated_and_not, split_rows


def read_records(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, ISBN and rating (0 = implicit) of BX-Book-Ratings.csv: latin-1, semicolons, quoted."""
    import pandas

    table = pandas.read_csv(path, sep=";", encoding="latin-1", dtype={"ISBN": str}, keep_default_na=False)
    expected = ["User-ID", "ISBN", "Book-Rating"]
    if list(table.columns) != expected:
        raise ValueError(f"{path}: columns {list(table.columns)}, expected {expected}")
    return (
        table["User-ID"].to_numpy(np.int64),
        table["ISBN"].to_numpy(str),
        table["Book-Rating"].to_numpy(np.float32),
    )


def frequent(user: np.ndarray, item: np.ndarray, min_records: int, repeat: bool) -> np.ndarray:
    """Indices of the records whose user and item both have ``min_records`` or more (after filtering, if repeated)."""
    kept = np.arange(len(user))
    while True:
        enough = np.bincount(user[kept])[user[kept]] >= min_records
        enough &= np.bincount(item[kept])[item[kept]] >= min_records
        if enough.all() or not repeat:
            return kept[enough]
        kept = kept[enough]
        if not len(kept):
            return kept


def books(seed: int = 0, *, min_records: int = 5, repeat_filter: bool = True) -> Dataset:
    """Records of frequent users and books; ids are counted from 0 in the order of user number and ISBN."""
    user, isbn, rating = read_records(archive_member("book-crossing", "BX-CSV-Dump.zip", "BX-Book-Ratings.csv"))
    user, item = (np.unique(column, return_inverse=True)[1] for column in (user, isbn))
    kept = frequent(user, item, min_records, repeat_filter)
    if not len(kept):
        raise ValueError(f"min_records={min_records}: no user and book is left; choose a smaller number")
    user, item = (np.unique(column[kept], return_inverse=True)[1] for column in (user, item))
    rating = rating[kept]
    rated = rating > 0
    rows = rated_and_not(user[rated], item[rated], rating[rated], user[~rated], item[~rated])
    (split,) = generators(seed, 1)
    info = {"n_users": int(user.max()) + 1, "n_items": int(item.max()) + 1, "rating_range": (1, 10)}
    return split_rows("books", rows, split, info, test=0.15, valid_of_rest=0.15 / 0.85)
