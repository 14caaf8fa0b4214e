"""Find saved Results and put them in one table."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.paths import recorded_dir, runs_dir
from moe_lab.results.plain import to_plain
from moe_lab.results.result import Result


def find_results(
    experiment: str | None = None,
    root: Path | str | Iterable[Path | str] | None = None,
    *,
    finished_only: bool = True,
    **config_filters: Any,
) -> list[Result]:
    """Saved Results, sorted by experiment and file name.

    Args:
        experiment: only this experiment.
        root: one folder or several, searched with their subfolders; default: `paths.runs_dir`, then
            `paths.recorded_dir`. A run that lies in several is given once, from the first one.
        finished_only: leave out runs that are running, interrupted or failed.
        **config_filters: only Results whose config has these values (``gate="comet", seed=0``).

    Raises:
        ValueError: no config of the experiment has a field of that name (the message gives the nearest).
    """
    if root is None:
        root = [runs_dir(), recorded_dir()]
    roots = [root] if isinstance(root, Path | str) else root
    found: dict[tuple[str, str], Result] = {}
    for folder in roots:
        for path in sorted(Path(folder).rglob("*.json")):
            try:
                result = Result.load(path)
            except ValueError as error:  # one damaged file must not hide all the others
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            if experiment in (None, result.experiment) and (result.finished or not finished_only):
                found.setdefault((result.experiment, path.name), result)
    results = [found[key] for key in sorted(found)]
    fields = {name for result in results for name in result.config}
    for name in config_filters:
        if results and name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no config has a field {name!r}{hint} Fields: {', '.join(sorted(fields))}.")
    wanted = {name: to_plain(value, name) for name, value in config_filters.items()}
    return [r for r in results if all(name in r.config and r.config[name] == value for name, value in wanted.items())]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in values.items():
        row |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return row


def to_frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row per Result: experiment, config fields, metrics, status, wall_seconds, device, threads, commit.

    Nested names are joined by dots. A metric whose name is already taken is called ``metrics.<name>``.
    """
    rows = []
    for result in results:
        circumstances = {name: result.environment.get(name) for name in ("device", "threads", "commit")}
        row = {"experiment": result.experiment, **_flat(result.config)}
        about = {"status": result.status, "wall_seconds": result.wall_seconds, **circumstances}
        for name, value in _flat(result.metrics).items():
            row[f"metrics.{name}" if name in row or name in about else name] = value
        rows.append({**row, **{name: value for name, value in about.items() if name not in row}})
    return pd.DataFrame(rows)
