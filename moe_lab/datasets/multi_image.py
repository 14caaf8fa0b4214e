"""Two overlapping images in one, one classification task per position (COMET's MultiMNIST, supplement and data script).

    sources   60,000 training images split 50,000 / 10,000 stratified, test 10,000: splits share no source image
    pairs     every image is the top-left one of `partners` = 2 examples; the bottom-right one is another image of
              the same split
    canvas    28 + 8 pixels square; top-left at (0, 0), bottom-right at (8, 8): each 4 pixels from the centre
    pixel     *sum* of the two, without clipping (0..510, so int16); a model divides by 255 (`info["scale"]`)
    labels    (top-left class, bottom-right class)

Where we differ: the authors' script can never draw the last image of a split as a partner (an off-by-one); here all
others are equally likely. An image's partners are distinct here.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.splits import generators, stratified_split, thin

Images = tuple[np.ndarray, np.ndarray]  # (N, H, W) uint8, (N,) labels


def offset_for(size: int) -> int:
    """How far the second image is shifted: 8 pixels for 28, in proportion for others."""
    return round(size * 8 / 28)


def overlay(first: np.ndarray, second: np.ndarray, offset: int) -> np.ndarray:
    """Sum of two image stacks on a larger canvas, the first at the top left, the second at the bottom right.

    Args:
        first, second: (N, S, S) uint8.
        offset: 0 or more pixels, down and right.

    Returns:
        (N, S + offset, S + offset) int16, values 0..510.
    """
    n, size, _ = first.shape
    canvas = np.zeros((n, size + offset, size + offset), dtype=np.int16)
    canvas[:, :size, :size] += first
    canvas[:, offset:, offset:] += second
    return canvas


def draw_partners(n: int, partners: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices (first, second) of n * partners pairs: each of n images first with `partners` distinct others.

    Returns:
        two (n * partners,) arrays; first[i] != second[i].
    """
    if not 1 <= partners < n:
        raise ValueError(f"partners={partners}: must be between 1 and {n - 1}, the other images of the smallest split")
    # k distinct steps 1..n-1 around the circle of images: never the image itself, all others equally likely.
    steps = np.empty((n, partners), dtype=np.int64)
    for column in range(partners):
        # Floyd's sampling without replacement, all rows at once.
        top = n - partners + column  # draw from 1..top; a repeat becomes top, which cannot have been drawn yet
        drawn = rng.integers(1, top + 1, size=n)
        repeated = (steps[:, :column] == drawn[:, None]).any(axis=1)
        steps[:, column] = np.where(repeated, top, drawn)
    first = np.repeat(np.arange(n), partners)
    return first, (first + steps.reshape(-1)) % n


def multi_image(
    name: str,
    train_source: Images,
    test_source: Images,
    n_valid_source: int,
    *,
    seed: int,
    partners: int,
    n_train: int | None,
    n_valid: int | None,
    n_test: int | None,
) -> Dataset:
    """A two-task vision `Dataset`; ``n_valid_source`` of the training sources (stratified) make the validation split.

    Args:
        n_train, n_valid, n_test: keep only so many examples of a split, at random.
    """
    split, train_rng, valid_rng, test_rng = generators(seed, 4)
    images, labels = train_source
    train_index, valid_index, _ = stratified_split(labels, n_valid_source, 0, split)
    splits = []
    for what, size, (split_images, split_labels), rng in (
        ("n_train", n_train, (images[train_index], labels[train_index]), train_rng),
        ("n_valid", n_valid, (images[valid_index], labels[valid_index]), valid_rng),
        ("n_test", n_test, test_source, test_rng),
    ):
        first, second = draw_partners(len(split_labels), partners, rng)
        chosen = thin(what, rng.permutation(len(first)), size)
        first, second = first[chosen], second[chosen]
        image = overlay(split_images[first], split_images[second], offset_for(split_images.shape[1]))
        pair = np.stack((split_labels[first], split_labels[second]), axis=1).astype(np.int64)
        splits.append({"image": torch.from_numpy(image).unsqueeze(1), "labels": torch.from_numpy(pair)})
    info = {"n_tasks": 2, "n_classes": 10, "scale": 255}
    return Dataset(name, "vision", *splits, info=info)
