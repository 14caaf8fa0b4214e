"""Rows of figures as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_QUARTILES = ("ms_q1", "ms_q3")


def render(rows: Sequence[dict], columns: Iterable[tuple[str, str, str]]) -> str:
    """A table in plain text; ``columns``: (key, heading, format). The first column is aligned left."""
    columns = list(columns)
    lines = [[heading for _, heading, _ in columns]]
    lines += [[format(row[key], form) for key, _, form in columns] for row in rows]
    return _aligned(lines)


def render_all(rows: Sequence[dict]) -> str:
    """A table of every column that some row has, but quartiles and whatever is a list or a mapping.

    A missing figure or None is shown as "-". A row whose ``failed`` is a text gets a line below the table.
    """
    columns: dict[str, list[object]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in _QUARTILES):
        values = [row.get(name) for row in rows]
        hidden = (dict, list, tuple, str) if name == "failed" else (dict, list, tuple)
        if not any(isinstance(value, hidden) for value in values):
            columns[name] = values
    lines = [list(columns), *([_show(value) for value in line] for line in zip(*columns.values(), strict=True))]
    failed = [row for row in rows if isinstance(row.get("failed"), str)]
    return "\n".join([_aligned(lines), *(f"{next(iter(row.values()))} failed: {row['failed']}" for row in failed)])


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.0f}"
    return str(value)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *cells[1:]]) for line, cells in zip(lines, padded, strict=True)
    )
