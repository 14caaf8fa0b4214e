"""MNIST and Fashion-MNIST (official idx files, or MNIST as one .npz): MNIST itself, and the Multi- data sets."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import official_file, stand_ins
from moe_lab.datasets.labelled_images import Pictures, labelled_images
from moe_lab.datasets.multi_image import Images, multi_image


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes: magic 0 0 8 ndim, big-endian sizes, then the values.

    Raises:
        ValueError: not such a file, or cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); remove it and fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    n_dims = raw[3]
    shape = tuple(np.frombuffer(raw, ">u4", n_dims, offset=4).tolist())
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{path}: says it has shape {shape} but holds {values.size} values")
    return values.reshape(shape)


def read_images(source: str) -> tuple[Images, Images]:
    """Training and test images (N, 28, 28) uint8 and labels (N,) of "mnist" or "fashion-mnist", in official order."""
    compact = stand_ins(source)
    if compact:
        with np.load(compact[0]) as arrays:
            return (
                (arrays["train_images"], arrays["train_labels"]),
                (arrays["test_images"], arrays["test_labels"]),
            )

    def read(part: str) -> Images:
        images = read_idx(official_file(source, f"{source}/{part}-images-idx3-ubyte.gz"))
        labels = read_idx(official_file(source, f"{source}/{part}-labels-idx1-ubyte.gz"))
        if len(images) != len(labels):
            raise ValueError(f"{source}: {len(images)} {part} images but {len(labels)} labels")
        return images, labels

    return read("train"), read("t10k")


def mnist(seed: int = 0, *, n_train: int | None = None, n_valid: int = 10_000, n_test: int | None = None) -> Dataset:
    """MNIST: 50,000 / 10,000 / 10,000 grey digits (N, 1, 28, 28) of kind "images"."""
    return labelled_images(
        "mnist",
        *(Pictures(labels, images[:, None].__getitem__) for images, labels in read_images("mnist")),
        seed=seed,
        sizes=(n_train, n_valid, n_test),
        n_classes=10,
        title="MNIST",
        flip=False,
    )


def _multi(
    name: str, source: str, seed: int, partners: int, sizes: tuple[int | None, int | None, int | None]
) -> Dataset:
    train, test = read_images(source)
    n_train, n_valid, n_test = sizes
    sixth = round(len(train[1]) / 6)  # 10,000 of 60,000
    return multi_image(
        name, train, test, sixth, seed=seed, partners=partners, n_train=n_train, n_valid=n_valid, n_test=n_test
    )


def multimnist(
    seed: int = 0,
    *,
    partners: int = 2,
    n_train: int | None = None,
    n_valid: int | None = None,
    n_test: int | None = None,
) -> Dataset:
    """Two overlapping MNIST digits: 100,000 / 20,000 / 20,000 images (N, 1, 36, 36) int16, labels (N, 2)."""
    return _multi("multimnist", "mnist", seed, partners, (n_train, n_valid, n_test))


def multifashion(
    seed: int = 0,
    *,
    partners: int = 2,
    n_train: int | None = None,
    n_valid: int | None = None,
    n_test: int | None = None,
) -> Dataset:
    """Two overlapping Fashion-MNIST images, built like `multimnist`."""
    return _multi("multifashion", "fashion-mnist", seed, partners, (n_train, n_valid, n_test))
