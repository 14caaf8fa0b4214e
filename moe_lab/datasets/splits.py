"""Splitting and thinning row indices, reproducibly: every function takes its own numpy Generator."""

from __future__ import annotations

import math

import numpy as np


def generators(seed: int, n: int) -> list[np.random.Generator]:
    """Independent streams for the n stages of building a data set: changing one leaves the others as they were."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return np.random.default_rng(seed).spawn(n)


def stratified_sample(strata: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``size`` rows drawn without replacement, each stratum represented in proportion.

    Shares are rounded down and the rows still missing go to the largest remainders, so every stratum is within one
    row of its exact share.

    Args:
        strata: (N,) stratum of each row.
        size: 0..N.

    Returns:
        (size,) row indices, ascending.
    """
    if not 0 <= size <= len(strata):
        raise ValueError(f"cannot draw {size} of {len(strata)} rows")
    _, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
    share = counts * (size / max(len(strata), 1))
    quota = np.floor(share + 1e-9).astype(int)
    missing = size - quota.sum()
    quota[np.argsort(quota - share, kind="stable")[:missing]] += 1
    shuffled = rng.permutation(len(strata))
    by_stratum = shuffled[np.argsort(stratum[shuffled], kind="stable")]
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... within a stratum
    return np.sort(by_stratum[rank < np.repeat(quota, counts)])


def stratified_split(
    strata: np.ndarray, n_valid: int, n_test: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, validation and test rows, each in random order. Test is drawn first."""
    test = stratified_sample(strata, n_test, rng)
    rest = np.setdiff1d(np.arange(len(strata)), test, assume_unique=True)
    valid = rest[stratified_sample(strata[rest], n_valid, rng)]
    train = np.setdiff1d(rest, valid, assume_unique=True)
    return rng.permutation(train), rng.permutation(valid), rng.permutation(test)


def split_sizes(n: int, test: float, valid_of_rest: float) -> tuple[int, int]:
    """Rows of validation and test, rounded up as in the authors' scripts (COMET: 0.10, then 0.125 of what is left)."""
    n_test = math.ceil(n * test - 1e-9)
    return math.ceil((n - n_test) * valid_of_rest - 1e-9), n_test


def thin(what: str, index: np.ndarray, size: int | None) -> np.ndarray:
    """The first ``size`` of indices already in random order; all of them for None.

    Raises:
        ValueError: more rows asked for than there are.
    """
    if size is None:
        return index
    if not 1 <= size <= len(index):
        raise ValueError(f"{what}={size}: must be between 1 and the {len(index):,} rows there are (None takes all)")
    return index[:size]
