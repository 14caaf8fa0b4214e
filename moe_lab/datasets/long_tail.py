"""Long-tailed versions of a data set: class c of C keeps n_c images.

    n_c = floor(n_0 * imbalance^(c / (C - 1)))        c = 0 .. C - 1 in the order of the labels

Source: Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, Class-Balanced Loss Based on Effective Number of Samples, CVPR
2019, section 5.1 and the code beside it. ``imbalance`` = n_{C-1} / n_0; 0.01 makes CIFAR-10-LT of 12,406 images and
CIFAR-100-LT of 10,847.
"""

from __future__ import annotations

import numpy as np


def long_tail_counts(n_first: int, n_classes: int, imbalance: float) -> np.ndarray:
    """(n_classes,) int64 images per class, from ``n_first`` down.

    Args:
        n_first: images of class 0.
        n_classes: C, 2 or more.
        imbalance: in (0, 1]; 1 keeps all classes equal.

    Raises:
        ValueError: an argument out of range, or a last class without a single image.
    """
    if n_classes < 2:
        raise ValueError(f"a long tail needs 2 classes or more, got {n_classes}")
    if not 0 < imbalance <= 1:
        raise ValueError(f"imbalance must be above 0 and at most 1, got {imbalance}")
    # the published code's order of operations, so that no count differs by a rounding
    counts = [int(n_first * imbalance ** (c / (n_classes - 1.0))) for c in range(n_classes)]
    if not counts[-1]:
        raise ValueError(
            f"imbalance={imbalance} leaves the last class without an image; with {n_first} in the first one, take "
            f"{1 / max(n_first, 1):.2g} or more"
        )
    return np.array(counts)


def long_tailed(labels: np.ndarray, n_classes: int, imbalance: float, rng: np.random.Generator) -> np.ndarray:
    """Rows of a long-tailed subset, ascending; which images of a class stay is drawn.

    The first class keeps as many images as the smallest class has (in CIFAR all are equally large).
    """
    counts = long_tail_counts(int(np.bincount(labels, minlength=n_classes).min()), n_classes, imbalance)
    shuffled = rng.permutation(len(labels))
    kept = [shuffled[labels[shuffled] == c][:count] for c, count in enumerate(counts)]
    return np.sort(np.concatenate(kept))
