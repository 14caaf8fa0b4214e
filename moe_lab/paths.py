"""Where things live: one place that knows folders, so that notebooks, tests and the command line agree.

A notebook runs with ``notebooks/`` as its working directory, the command line with whatever the user stands in:
both must find the same ``runs/`` and ``data/``. So folders hang on the project, not on the working directory.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The checkout that holds this package, or the working directory if the package was installed without one."""
    parent = _PACKAGE.parent
    return parent if (parent / "pyproject.toml").is_file() else Path.cwd()


def _from_environment(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser().resolve() if value else default


def data_dir() -> Path:
    """The dataset cache: ``$MOE_LAB_DATA`` if set, else ``data/`` in the project."""
    return _from_environment("MOE_LAB_DATA", project_root() / "data")


def runs_dir() -> Path:
    """Where Results are written: ``$MOE_LAB_RUNS`` if set, else ``runs/`` in the project (ignored by git).

    Raises:
        ValueError: there is a file of that name.
    """
    folder = _from_environment("MOE_LAB_RUNS", project_root() / "runs")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"MOE_LAB_RUNS: {folder} is a file; give a folder, which need not exist yet")
    return folder


def recorded_dir() -> Path:
    """Results of long runs that are kept in the repository."""
    return project_root() / "data" / "recorded"


def notebooks_dir() -> Path:
    """The numbered notebooks."""
    return project_root() / "notebooks"
