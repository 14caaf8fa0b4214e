"""The paper's Digits (COMET supplement): MNIST and SVHN mixed, one 10-way task, which domain an image is from is known.

    MNIST   50,000 / 10,000 / 10,000, test as published
    SVHN    train + extra + test pooled (630,420 images), 480,420 / 75,000 / 75,000

What the supplement leaves open, and our choice: 32 x 32 pixels, grey. MNIST gets a black border of 2 pixels, SVHN
becomes luma (0.299 R + 0.587 G + 0.114 B). Splits are stratified by class.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import official_file
from moe_lab.datasets.mnist import read_images
from moe_lab.datasets.splits import generators, stratified_split, thin
from moe_lab.datasets.svhn import read_svhn


def mnist_svhn(
    seed: int = 0,
    *,
    extra: bool = True,
    n_train: int | None = None,
    n_valid: int | None = None,
    n_test: int | None = None,
) -> Dataset:
    """MNIST and SVHN, shuffled together: 530,420 / 85,000 / 85,000 images with ``extra``.

    Args:
        extra: use SVHN's extra part (1.3 GB); without it the SVHN splits keep their proportions.

    Returns:
        kind "vision": image (N, 1, 32, 32) uint8, labels (N, 1), domain (N,) int64 0 = MNIST, 1 = SVHN.
    """
    mnist_split, svhn_split, order = generators(seed, 3)
    (mnist_images, mnist_labels), mnist_test = read_images("mnist")
    mnist_index = stratified_split(mnist_labels, round(len(mnist_labels) / 6), 0, mnist_split)
    parts = {"train": "svhn", "test": "svhn"} | ({"extra": "svhn-extra"} if extra else {})
    read = [read_svhn(official_file(source, f"svhn/{part}_32x32.mat")) for part, source in parts.items()]
    svhn_images, svhn_labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    n_held = round(len(svhn_labels) * 75_000 / 630_420)
    svhn_index = stratified_split(svhn_labels, n_held, n_held, svhn_split)
    mnist = [(mnist_images[index], mnist_labels[index]) for index in mnist_index[:2]] + [mnist_test]

    splits = []
    for what, size, (images, labels), index in zip(
        ("n_train", "n_valid", "n_test"), (n_train, n_valid, n_test), mnist, svhn_index, strict=True
    ):
        image = np.concatenate((np.pad(images, ((0, 0), (2, 2), (2, 2))), svhn_images[index]))
        label = np.concatenate((labels, svhn_labels[index])).astype(np.int64)
        domain = np.repeat((0, 1), (len(labels), len(index)))
        chosen = thin(what, order.permutation(len(label)), size)
        splits.append(
            {
                "image": torch.from_numpy(image[chosen]).unsqueeze(1),
                "labels": torch.from_numpy(label[chosen]).unsqueeze(1),
                "domain": torch.from_numpy(domain[chosen]),
            }
        )
    return Dataset("mnist-svhn", "vision", *splits, info={"n_tasks": 1, "n_classes": 10, "scale": 255})
