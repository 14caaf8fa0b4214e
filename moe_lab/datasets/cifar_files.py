"""Reading CIFAR-10 and CIFAR-100: the official archives, or the JPEG copy that stands in for CIFAR-10.

Official: pickled dictionaries with ``data`` (N, 3072) bytes, red, green and blue planes of 32 x 32 one after another,
and a list of labels (`moe_lab.datasets.old_pickles` reads them without running them).

The JPEG copy is lossy: it has the same images in the same order, not the same pixels. What is made of it says so in
``info["title"]``: "CIFAR-10 (JPEG)". It is read only where the official files are not. It holds JPEG files one after
another and where each ends; only the images asked for are decoded (about 6,000 a second). The decoded pixels are not
kept in the cache: reading them back would save a few seconds and cost three times the room.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_lab.datasets.cache import archive_member, lossy_copy, stand_ins, unpacked_folder
from moe_lab.datasets.labelled_images import Pictures
from moe_lab.datasets.old_pickles import read_old_pickle
from moe_lab.paths import data_dir

SIDE = 32


@dataclass(frozen=True)
class Cifar:
    """Train and test as published, and the names of the classes in the order of the labels.

    ``lossy`` is "JPEG" for the lossy copy, empty for the official files.
    """

    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    lossy: str = ""


@dataclass(frozen=True)
class _Layout:
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


_LAYOUTS = {
    "cifar-10": _Layout(
        tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"
    ),
    "cifar-100": _Layout(("train",), "test", "meta", "fine_labels", "fine_label_names"),
}


def _batch(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of one pickled file."""
    content = read_old_pickle(path)
    data, labels = content.get("data"), content.get(key)
    if not isinstance(data, np.ndarray) or data.shape[1:] != (3 * SIDE * SIDE,):
        raise ValueError(f"{path}: no 'data' of {3 * SIDE * SIDE} bytes an image")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(data):
        raise ValueError(f"{path}: no {key!r} with a whole number for each of {len(data)} images")
    return data.reshape(-1, 3, SIDE, SIDE), np.array(labels, dtype=np.int64)


def _official(source: str, layout: _Layout) -> Cifar:
    archive = f"{source}-python.tar.gz"
    try:
        paths = {
            member: archive_member(source, archive, member) for member in (*layout.train, layout.test, layout.meta)
        }
        train = [_batch(paths[member], layout.labels) for member in layout.train]
        test = _batch(paths[layout.test], layout.labels)
        names = read_old_pickle(paths[layout.meta]).get(layout.names)
        if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
            raise ValueError(f"{paths[layout.meta]}: no list {layout.names!r}")
    except ValueError as error:
        raise ValueError(
            f"{error}. Remove {unpacked_folder(data_dir() / archive)}: it is unpacked again from {archive}. If that is "
            f"missing or `moe-lab data check` calls it corrupt, `moe-lab data fetch {source}`."
        ) from error
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return Cifar(
        Pictures(labels, images.__getitem__),
        Pictures(test[1], test[0].__getitem__),
        tuple(name.decode("ascii", "replace") for name in names),
    )


def _decode(path: Path, files: memoryview, end: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, 3, 32, 32) uint8 of those JPEG files among ``files`` that ``rows`` counts from 0."""
    from PIL import Image

    begin = np.concatenate(([0], end[:-1]))
    pixels = np.empty((len(rows), SIDE, SIDE, 3), dtype=np.uint8)
    for place, row in enumerate(rows.tolist()):
        try:
            with Image.open(io.BytesIO(files[begin[row] : end[row]]), formats=("JPEG",)) as image:
                if (image.mode, image.size) != ("RGB", (SIDE, SIDE)):
                    raise ValueError(f"{image.mode} {image.size}")
                pixels[place] = np.asarray(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path}: image {row} is no whole JPEG of 32 x 32 colours ({error})") from error
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _jpeg_part(path: Path, arrays: np.lib.npyio.NpzFile, part: str) -> Pictures:
    files, end, labels = (arrays[f"{part}_{what}"] for what in ("bytes", "end", "labels"))
    lengths = np.diff(end, prepend=0)
    if files.dtype != np.uint8 or len(end) != len(labels) or (lengths <= 0).any() or end[-1:].tolist() != [len(files)]:
        raise ValueError(f"{part}_end does not cut {part}_bytes into {len(labels)} files")
    return Pictures(labels, lambda rows: _decode(path, files.data, end, rows))


def _jpeg(path: Path, lossy: str) -> Cifar:
    try:
        with np.load(path) as arrays:
            train, test = (_jpeg_part(path, arrays, part) for part in ("train", "test"))
            return Cifar(train, test, tuple(arrays["class_name"].tolist()), lossy)
    except (KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a whole copy of CIFAR-10 as JPEG ({error}). Remove it and get the official files: "
            "`moe-lab data fetch cifar-10`."
        ) from error


def read_cifar(source: str) -> Cifar:
    """What the cache has of "cifar-10" or "cifar-100".

    Raises:
        DatasetNotFound: nothing there, or an archive without a file that belongs there; says what to do.
        ValueError: a file that is damaged, or not what its name says; says which and what to do.
    """
    copy = stand_ins(source)
    return _jpeg(copy[0], lossy_copy(source)) if copy else _official(source, _LAYOUTS[source])
