"""Real images with one label each, as data sets of kind "images".

    official train -> train and validation, stratified by class; validation -> three parts (0 thresholds, 1 choice of a
    model, 2 calibration), each class spread over them as evenly as its number allows
    official test  -> test, in the official order

``part`` is there in every split; only the validation's is meant. Images are standardised per channel by the mean and
the standard deviation of the *training* pixels. Both come from exact integer sums, so they do not depend on the order
of the images.

JEI-DNN's code uses constants per data set, and leaves SVHN as it is: we standardise that too, one rule for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.long_tail import long_tailed
from moe_lab.datasets.splits import generators, stratified_sample, stratified_split

N_PARTS = 3
_BLOCK = 2000  # images turned into numbers at a time


@dataclass(frozen=True)
class Pictures:
    """Labelled images whose pixels are read when they are needed.

    Attributes:
        labels: (N,) integers from 0.
        pixels: rows (n,) of them to their images (n, C, S, S) uint8.
    """

    labels: np.ndarray
    pixels: Callable[[np.ndarray], np.ndarray]


def even_parts(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) int64 in 0 .. 2: parts differ by at most one in size, in all and within every class."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    part = np.empty(len(labels), dtype=np.int64)
    part[order] = np.arange(len(labels)) % N_PARTS
    return part


def channel_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) float64 of images (N, C, S, S) uint8, in units of white (255 counts as 1)."""
    total, squares = np.zeros(pixels.shape[1]), np.zeros(pixels.shape[1])  # whole numbers below 2^53: exact
    for start in range(0, len(pixels), _BLOCK):
        block = pixels[start : start + _BLOCK].astype(np.int64)
        total += block.sum(axis=(0, 2, 3))
        squares += np.square(block).sum(axis=(0, 2, 3))
    n = pixels.size / pixels.shape[1]
    mean = total / n
    return mean / 255, np.sqrt(squares / n - mean**2) / 255


def standardised(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    """(N, C, S, S) float32, one copy; a channel that never changes (std 0) becomes 0."""
    shift = torch.from_numpy(255 * mean).float()[:, None, None]
    scale = torch.from_numpy(255 * np.where(std > 0, std, 1)).float()[:, None, None]
    return torch.from_numpy(pixels).float().sub_(shift).div_(scale)


def _subset(what: str, labels: np.ndarray, size: int | None, rng: np.random.Generator) -> np.ndarray:
    """Positions of a stratified subset, ascending; of all for None."""
    if size is None:
        return np.arange(len(labels))
    if not 1 <= size <= len(labels):
        raise ValueError(f"{what}={size}: must be between 1 and the {len(labels):,} images there are (None takes all)")
    return stratified_sample(labels, size, rng)


def labelled_images(
    name: str,
    train: Pictures,
    test: Pictures,
    *,
    seed: int,
    sizes: tuple[int | None, int, int | None],
    n_classes: int,
    imbalance: float | None = None,
    imbalanced_test: bool = False,
    **info: Any,
) -> Dataset:
    """A data set of kind "images" from the official train and test images.

    Args:
        name: of the data set.
        train, test: as published.
        seed: of the split, the parts and every subset.
        sizes: images of train, validation and test; None takes all that are left, of test all. A smaller train or test
            is stratified by class.
        n_classes: labels are 0 .. n_classes - 1.
        imbalance: first thin the training images to a long tail (`moe_lab.datasets.long_tail`); None: do not.
        imbalanced_test: thin the test images to the same profile.
        **info: facts to add: ``title`` (what to call it in results), ``flip`` (does a mirror image keep its label?).

    Raises:
        ValueError: a size out of range, or labels beyond ``n_classes``.
    """
    n_train, n_valid, n_test = sizes
    for pictures in (train, test):
        if len(pictures.labels) and not 0 <= pictures.labels.min() <= pictures.labels.max() < n_classes:
            raise ValueError(f"{name}: a label is outside 0 .. {n_classes - 1}; is it another data set's file?")
    split, fewer, fewer_test, parts, tail, test_tail = generators(seed, 6)
    kept, test_rows = np.arange(len(train.labels)), np.arange(len(test.labels))
    if imbalance is not None:
        kept = long_tailed(train.labels, n_classes, imbalance, tail)
        if imbalanced_test:
            test_rows = long_tailed(test.labels, n_classes, imbalance, test_tail)
    if not N_PARTS <= n_valid < len(kept):
        raise ValueError(f"n_valid={n_valid}: must be at least {N_PARTS} and leave some of {len(kept):,} images")
    train_rows, valid_rows, _ = (kept[index] for index in stratified_split(train.labels[kept], n_valid, 0, split))
    train_rows = train_rows[_subset("n_train", train.labels[train_rows], n_train, fewer)]
    test_rows = test_rows[_subset("n_test", test.labels[test_rows], n_test, fewer_test)]

    splits: list[dict[str, torch.Tensor]] = []
    statistics = None
    for pictures, rows in ((train, train_rows), (train, valid_rows), (test, test_rows)):
        pixels = pictures.pixels(rows)
        statistics = statistics or channel_statistics(pixels)
        labels = pictures.labels[rows].astype(np.int64)
        splits.append(
            {
                "image": standardised(pixels, *statistics),
                "label": torch.from_numpy(labels),
                "part": torch.from_numpy(even_parts(labels, parts)),
            }
        )
    _, channels, side, _ = splits[0]["image"].shape
    mean, std = (tuple(values.tolist()) for values in statistics)
    facts = {"n_classes": n_classes, "scale": 1.0, "side": side, "channels": channels, "mean": mean, "std": std}
    return Dataset(name, "images", *splits, info=facts | info)
