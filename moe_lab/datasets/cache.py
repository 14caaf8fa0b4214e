"""Finding files in the cache (`moe_lab.paths.data_dir`) under the paths that the registry gives them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from moe_lab.atomic import atomic_file
from moe_lab.datasets.archives import extract
from moe_lab.datasets.base import DatasetNotFound
from moe_lab.datasets.registry import SOURCES, sources_of
from moe_lab.datasets.sources import RemoteFile
from moe_lab.paths import data_dir


def unpacked_folder(path: Path) -> Path:
    """Where an archive is unpacked: beside it, under its name without the ending."""
    return path.with_name(path.name.split(".zip")[0].split(".tar")[0].split(".tgz")[0])


def has(file: RemoteFile) -> bool:
    """The file, or for an archive its unpacked folder, is in the cache (not whether it is intact: `download.check`)."""
    path = data_dir() / file.path
    return path.is_file() or (file.is_archive and unpacked_folder(path).is_dir())


def _has_official(source: str) -> bool:
    return all(has(file) for file in SOURCES[source].files)


def stand_ins(source: str) -> list[Path]:
    """The files that stand for a whole source, if the registry names some and all are in the cache; else empty.

    A lossy copy does not stand for official files that are there.
    """
    files = SOURCES[source].instead
    paths = [data_dir() / file.path for file in files]
    if any(file.lossy for file in files) and _has_official(source):
        return []
    return paths if all(path.is_file() for path in paths) else []


def lossy_copy(source: str) -> str:
    """What results must say when the source is read from a lossy copy ("JPEG"); empty when it is not."""
    notes = [file.lossy for file in SOURCES[source].instead if file.lossy]
    return notes[0] if notes and stand_ins(source) else ""


def is_available(name: str) -> bool:
    """All files that the data set needs are in the cache; always true for embedded data."""
    return all(bool(stand_ins(source)) or _has_official(source) for source in sources_of(name))


def official_file(source: str, path: str) -> Path:
    """The path of an official file in the cache.

    Raises:
        DatasetNotFound: it is not there; says how to get it.
    """
    file = next(file for file in SOURCES[source].files if file.path == path)
    if not has(file):
        raise DatasetNotFound(
            f"{SOURCES[source].title}: {data_dir() / path} is missing. Get it with `moe-lab data fetch {source}`, or "
            f"download it by hand "
            f"(see {SOURCES[source].homepage}) and put it there. Another cache folder: set MOE_LAB_DATA."
        )
    return data_dir() / path


def archive_member(source: str, path: str, member: str) -> Path:
    """A file out of an official archive: unpacked beside the archive at the first use, or already unpacked by hand.

    Args:
        path: the archive, as the registry names it.
        member: file name within the archive, in whatever folder.

    Raises:
        DatasetNotFound: neither archive nor folder, or no such member.
    """
    archive = official_file(source, path)
    folder = unpacked_folder(archive)
    if not folder.is_dir():
        unpack(archive)
    found = sorted(folder.rglob(member))
    if not found:
        raise DatasetNotFound(
            f"{SOURCES[source].title}: no file {member!r} under {folder}. Remove that folder and {archive.name}, then "
            f"`moe-lab data fetch {source}`."
        )
    return found[0]


def unpack(archive: Path) -> Path:
    """Unpack an archive into its folder, all or nothing: a crash leaves no half-filled folder behind."""
    folder = unpacked_folder(archive)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpacking-") as scratch:
        target = Path(scratch) / "content"
        extract(archive, target)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    return folder


def kept_array(source: str, name: str) -> np.ndarray | None:
    """What `keep_array` kept, as long as the files it was made from are still in the cache."""
    path = data_dir() / name
    if not path.is_file() or not _has_official(source):
        return None
    with np.load(path) as arrays:
        return arrays["array"]


def keep_array(name: str, array: np.ndarray) -> None:
    """Keep a parsed array in the cache, atomically. A cache that cannot be written to is no error: it is read anew."""
    try:
        with atomic_file(data_dir() / name) as file:
            np.savez_compressed(file, array=array)
    except OSError:
        return
