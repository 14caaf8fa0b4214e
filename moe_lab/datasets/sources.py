"""What the registry says of a file, a source and a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """A file of the cache and where to get it.

    Attributes:
        path: within the cache folder.
        urls: tried in order; none for a file that cannot be downloaded (put it there by hand).
        checksum: "sha256:..." or "md5:...": what the file is recognised by.
        size: bytes, for information.
        lossy: for a stand-in whose content is not quite the official one: the word that the names of results get
            ("JPEG"); empty for the same content.
    """

    path: str
    urls: tuple[str, ...]
    checksum: str
    size: int
    lossy: str = ""

    @property
    def is_archive(self) -> bool:
        """A zip or tar that is unpacked beside itself (a single gzipped file is read as it is)."""
        return self.path.endswith((".zip", ".tar", ".tar.gz", ".tgz"))


@dataclass(frozen=True)
class Source:
    """Something that can be downloaded.

    Attributes:
        files: the official files; all of them are needed.
        instead: files that are accepted instead, with the same content unless they are marked ``lossy``; all of them
            are needed. A lossy one is used only where the official files are missing.
        checksum_from: where the checksums were found.
    """

    title: str
    citation: str
    licence: str
    homepage: str
    files: tuple[RemoteFile, ...]
    checksum_from: str
    instead: tuple[RemoteFile, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A name that `load` knows.

    Attributes:
        sources: what has to be downloaded; empty for embedded data.
        yours: the reader brings the data; nothing can be fetched.
    """

    summary: str
    used_for: str
    sources: tuple[str, ...] = ()
    yours: bool = False


def stand_in(path: str, sha256: str, size: int, lossy: str = "") -> RemoteFile:
    """A file that is accepted instead of official ones and cannot be downloaded."""
    return RemoteFile(path, (), f"sha256:{sha256}", size, lossy)
