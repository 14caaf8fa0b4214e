"""SVHN, photographs of house numbers cut into digits (official .mat files), grey or in colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import official_file
from moe_lab.datasets.labelled_images import Pictures, labelled_images
from moe_lab.datasets.multi_image import Images


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """X (32, 32, 3, N) uint8 as the file has it, and labels (N,) uint8 (digit 0 is 10 in the file)."""
    from scipy.io import loadmat

    with path.open("rb") as file:
        try:
            content = loadmat(file, variable_names=("X", "y"))
            colour, labels = content["X"], content["y"].reshape(-1)
            if colour.dtype != np.uint8 or colour.shape != (32, 32, 3, len(labels)):
                raise ValueError(f"X is {colour.dtype} {colour.shape} for {len(labels)} labels")
        except Exception as error:  # a damaged file can raise anything in the reader
            raise ValueError(
                f"{path}: not a whole SVHN file with X (32, 32, 3, N) and y (N, 1): {error}. Remove it and fetch it "
                "again."
            ) from error
    return colour, (labels % 10).astype(np.uint8)


def read_svhn(path: Path) -> Images:
    """Grey images (N, 32, 32) uint8 and labels (N,) uint8.

    Raises:
        ValueError: not such a file, or cut short.
    """
    colour, labels = _read(path)
    grey = np.empty((colour.shape[3], *colour.shape[:2]), dtype=np.uint8)
    luma = np.array((0.299, 0.587, 0.114), dtype=np.float32)
    for start in range(0, len(grey), 10_000):  # 630,420 colour images as floats would be 7.7 GB
        block = colour[..., start : start + 10_000].astype(np.float32)
        grey[start : start + 10_000] = np.round(np.einsum("hwcn,c->nhw", block, luma))
    return grey, labels


def read_colour_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Colour images (N, 3, 32, 32) uint8 and labels (N,) uint8; raises like `read_svhn`."""
    colour, labels = _read(path)
    return np.ascontiguousarray(colour.transpose(3, 2, 0, 1)), labels


def svhn(seed: int = 0, *, n_train: int | None = None, n_valid: int = 5000, n_test: int | None = None) -> Dataset:
    """SVHN without its extra part: 68,257 / 5,000 / 26,032 colour digits (N, 3, 32, 32) of kind "images"."""
    train, test = (read_colour_svhn(official_file("svhn", f"svhn/{part}_32x32.mat")) for part in ("train", "test"))
    return labelled_images(
        "svhn",
        *(Pictures(labels, images.__getitem__) for images, labels in (train, test)),
        seed=seed,
        sizes=(n_train, n_valid, n_test),
        n_classes=10,
        title="SVHN",
        flip=False,
    )
