"""Getting official files into the cache: mirrors in turn, checksum, nothing half-written, errors that say what to do.

A file appears under its final name only after its checksum was right (`pooch` downloads to a temporary folder and
compares; we move it). An interrupted download starts anew. Archives are unpacked at once, by
`moe_lab.datasets.archives`; one that cannot be unpacked safely is removed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from moe_lab.datasets import cache
from moe_lab.datasets.registry import SOURCES, sources_of
from moe_lab.datasets.sources import RemoteFile, Source
from moe_lab.paths import data_dir

ATTEMPTS = 3  # per URL, for connections that break; a wrong answer is not asked for again


class DownloadFailed(RuntimeError):
    """A file could not be had from any of its URLs. The message names it, each URL's answer, and what to do."""


@dataclass(frozen=True)
class FileStatus:
    """State of one file: "ok", "missing", "corrupt" (checksum differs) or "unpacked" (only its folder is there).

    ``needed`` is False for a file that another one in the cache replaces.
    """

    source: str
    path: Path
    state: str
    needed: bool


def is_intact(path: Path, checksum: str) -> bool:
    """The file exists and has this "md5:..." or "sha256:..." checksum."""
    if not path.is_file():
        return False
    algorithm, expected = checksum.split(":")
    with path.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest() == expected


def _retrieve(url: str, file: RemoteFile, target: Path, progress: bool) -> None:
    """One URL to the final name. Exceptions of `requests` and pooch's ValueError (wrong checksum) pass through."""
    import pooch
    import requests

    log = pooch.get_logger()
    level = log.level
    log.setLevel(logging.WARNING)  # pooch would announce its temporary file as if it were the result
    downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=30)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".downloading-") as scratch:
            for attempts_left in reversed(range(ATTEMPTS)):
                try:
                    pooch.retrieve(url, file.checksum, fname=target.name, path=scratch, downloader=downloader)
                    break
                except requests.RequestException as error:
                    if isinstance(error, requests.HTTPError) or not attempts_left:
                        raise
            os.replace(Path(scratch) / target.name, target)
    finally:
        log.setLevel(level)


def download(file: RemoteFile, source: Source, folder: Path, progress: bool = True) -> Path:
    """One file into ``folder`` (nothing is done if it is there and intact), unpacked if it is an archive.

    Raises:
        DownloadFailed: no URL gave the right file, the archive is unsafe, or the folder cannot be written to.
    """
    import requests

    target = folder / file.path
    if is_intact(target, file.checksum):
        return target
    answers = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in file.urls:
            try:
                _retrieve(url, file, target, progress)
                if file.is_archive:
                    cache.unpack(target)
                return target
            except requests.RequestException as error:
                answers.append(f"{url}: {error}")
            except ValueError as error:
                if is_intact(target, file.checksum):  # the right file, but an archive that was refused
                    target.unlink()
                    answers.append(f"{url}: {error}")
                else:
                    answers.append(f"{url}: not the expected file, or cut short (its checksum is not {file.checksum})")
    except OSError as error:
        answers.append(f"{target.parent} cannot be written to: {error}")
    raise DownloadFailed(
        f"could not get {file.path} ({file.size / 1e6:.1f} MB) of {source.title}.\n  "
        + "\n  ".join(answers)
        + f"\nWhat to do: check the connection and try again; or download the file by hand (from {source.homepage}, or "
        f"any copy with {file.checksum}), put it at {target} and run `moe-lab data check`. "
        "Another cache folder: set MOE_LAB_DATA. Another server: `--mirror URL`."
    )


def fetch(name: str, mirror: str | None = None, folder: Path | None = None, progress: bool = True) -> list[Path]:
    """All files of a data set (or of one source) into the cache.

    Args:
        name: a data set ("multimnist") or a source ("mnist"). Embedded data: nothing to do.
        mirror: a server to ask first, as in a classroom. It holds the files under their cache paths
            (``MIRROR/ml-100k.zip``, ``MIRROR/mnist/train-images-idx3-ubyte.gz``); checksums stay those of the registry.
        folder: instead of `moe_lab.paths.data_dir`.

    Returns:
        where the files are. Files that stand for a source count, if all are intact and none is lossy.

    Raises:
        ValueError: unknown name, with the nearest one.
        DownloadFailed: see `download`.
    """
    folder = folder or data_dir()
    paths = []
    for source in sources_of(name).values():
        stands = not any(file.lossy for file in source.instead)  # who fetches has asked for the official pixels
        if source.instead and stands and all(is_intact(folder / file.path, file.checksum) for file in source.instead):
            paths += [folder / file.path for file in source.instead]
            continue
        for file in source.files:
            own = (f"{mirror.rstrip('/')}/{file.path}",) if mirror else ()
            paths.append(download(replace(file, urls=own + file.urls), source, folder, progress))
    return paths


def check(folder: Path | None = None) -> list[FileStatus]:
    """The state of every file of the registry in the cache; reads each one completely."""
    folder = folder or data_dir()
    report = []
    for name, source in SOURCES.items():
        replaced = bool(source.instead) and all((folder / file.path).is_file() for file in source.instead)
        files = [(file, not replaced) for file in source.files] + [(file, replaced) for file in source.instead]
        for file, needed in files:
            path = folder / file.path
            if path.is_file():
                state = "ok" if is_intact(path, file.checksum) else "corrupt"
            elif file.is_archive and cache.unpacked_folder(path).is_dir():
                state = "unpacked"
            else:
                state = "missing"
            report.append(FileStatus(name, path, state, needed))
    return report
