"""Files that are either the old version or the new one, whenever the process dies."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; once the block ends, it takes the name ``path`` in one step.

    If the block raises, ``path`` stays as it was. If the process is killed, ``path`` stays as it was too, and the
    temporary file is left over until the next write.

    Args:
        path: the file to write; its folder is made if missing.
        previous: the old version gets this name instead of being lost. A process killed between the two renamings
            leaves ``previous`` and no ``path``: readers must look at both.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            with suppress(FileNotFoundError):
                os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":  # there is no harmless question to a process: do not touch its files
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files of ``path`` whose process is dead."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        pid = leftover.name.removeprefix(f".{path.name}.").partition(".")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            leftover.unlink(missing_ok=True)
