"""Unpacking archives that came over a network: only plain files and folders, inside the target, up to a size limit."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

MAX_UNPACKED_BYTES = 4 * 2**30


class UnsafeArchive(ValueError):
    """An archive that wants to write outside its folder, holds links or devices, or unpacks to too much."""


def safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    """The parts of a member's path; refuses absolute paths, drive letters and '..'."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise UnsafeArchive(f"{archive}: refused, member {name!r} would be written outside the target folder")
    return path.parts


def _zip_members(archive: Path, opened: zipfile.ZipFile) -> Iterator[tuple[tuple[str, ...], IO[bytes]]]:
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UnsafeArchive(f"{archive}: refused, member {info.filename!r} is a link or a device")
        parts = safe_parts(archive, info.filename)
        if not info.is_dir():
            yield parts, opened.open(info)


def _tar_members(archive: Path, opened: tarfile.TarFile) -> Iterator[tuple[tuple[str, ...], IO[bytes]]]:
    for info in opened:
        if not (info.isfile() or info.isdir()):
            raise UnsafeArchive(f"{archive}: refused, member {info.name!r} is a link or a device")
        parts = safe_parts(archive, info.name)
        content = opened.extractfile(info)
        if content is not None:
            yield parts, content


def extract(archive: Path, target: Path, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
    """Unpack a zip or tar (plain, gz, bz2, xz) into ``target``, which is created.

    Bytes are counted as they are written, not as the archive declares them. Permissions and owners of the archive are
    not applied.

    Raises:
        UnsafeArchive: see there. What was unpacked before the bad member stays in ``target``: give it a scratch folder.
        ValueError: not a zip or tar, or a damaged one.
    """
    target.mkdir(parents=True, exist_ok=True)
    left = max_bytes
    try:
        is_zip = zipfile.is_zipfile(archive)
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            for parts, content in (_zip_members if is_zip else _tar_members)(archive, opened):
                path = target.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with content, path.open("wb") as out:
                    while chunk := content.read(min(left + 1, 2**20)):
                        left -= len(chunk)
                        if left < 0:
                            raise UnsafeArchive(f"{archive}: refused, it unpacks to more than {max_bytes:,} bytes")
                        out.write(chunk)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # disk full, no permission: not the archive's fault
        raise ValueError(f"{archive}: not a zip or tar archive, or a damaged one ({error})") from error
