"""`moe-lab report`: one folder of HTML with everything that was run, to be opened from disk.

runs/report/index.html      notebooks that were run with their figures, and a table of all Results
runs/report/03_....html     one page per executed notebook (`report_page`)
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from nbformat import NotebookNode

from moe_lab.paths import project_root, recorded_dir, runs_dir
from moe_lab.report_page import notebook_page, page
from moe_lab.results import Result, find_results, to_frame
from moe_lab.runtime import environment


@dataclass(frozen=True)
class Executed:
    """An executed notebook as the report shows it. `status`: finished | failed | interrupted | incomplete."""

    path: Path
    notebook: NotebookNode
    title: str
    parameters: str
    status: str
    seconds: float | None


_LONGEST_CELL = 60  # lists of loads per expert would make rows as high as a page


def write_report(folder: Path | None = None) -> Path:
    """Write the report of all notebooks under `runs/notebooks` and all Results; returns the path of index.html."""
    folder = folder or runs_dir() / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.html"):
        old.unlink()
    copies = sorted((runs_dir() / "notebooks").glob("*.ipynb"), key=lambda path: path.stem)
    executed = [read_executed(path) for path in copies]
    for entry in executed:
        (folder / f"{entry.path.stem}.html").write_text(notebook_page(entry.notebook, entry.title), encoding="utf-8")
    index = folder / "index.html"
    index.write_text(page("moe_lab: what was run", "\n".join(_index(executed))), encoding="utf-8")
    return index


def read_executed(path: Path) -> Executed:
    """Read an executed copy and find out from its cells, not from papermill's notes, how far it got."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    errors = [output.ename for cell in code for output in cell.outputs if output.output_type == "error"]
    if errors:
        status = "interrupted" if errors[-1] == "KeyboardInterrupt" else "failed"
    else:
        status = "finished" if all(cell.execution_count for cell in code) else "incomplete"
    headings = [re.match(r"#+ *(.+)", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    heading = next(filter(None, headings), None)
    about = notebook.metadata.get("papermill", {})
    values = about.get("parameters", {})
    return Executed(
        path=path,
        notebook=notebook,
        title=heading[1] if heading else path.stem,
        parameters=", ".join(f"{name} = {value!r}" for name, value in values.items()) or "defaults",
        status=status,
        seconds=about.get("duration"),
    )


def _index(executed: list[Executed]) -> Iterator[str]:
    yield "<h1>moe_lab: what was run</h1>"
    now = environment()
    facts = [datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")]
    facts += [f"{name} {now[name]}" for name in ("moe_lab", "python", "torch", "numpy")]
    if now["commit"]:
        facts.append(f"commit {now['commit'][:10]}{' with local changes' if now['dirty'] else ''}")
    facts.append(f"{now['device']}, {now['cpu_count']} cores")
    yield f'<p class="note">{html.escape(" · ".join(facts))}</p>'
    yield "<h2>Notebooks</h2>"
    yield from _notebook_table(executed)
    yield "<h2>Figures</h2>"
    for entry in executed:
        figures = list(_figures(entry))
        if figures:
            yield f'<h3><a href="{_link(entry)}">{html.escape(entry.title)}</a></h3>'
            yield f'<p class="note">{html.escape(entry.parameters)}</p><p class="figures">{"".join(figures)}</p>'
    yield "<h2>Results</h2>"
    yield from _results_tables(find_results(root=runs_dir(), finished_only=False))
    recorded = find_results(root=recorded_dir())
    if recorded:
        yield f"<h2>Recorded Results</h2><details><summary>{len(recorded)} that came with the project</summary>"
        yield from _results_tables(recorded)
        yield "</details>"


def _notebook_table(executed: list[Executed]) -> Iterator[str]:
    if not executed:
        yield "<p>None yet: <code>moe-lab run --headline</code>.</p>"
        return
    yield "<table><tr><th>notebook</th><th>parameters</th><th>status</th><th>seconds</th></tr>"
    for entry in executed:
        seconds = "" if entry.seconds is None else f"{entry.seconds:.0f}"
        title = f'<a href="{_link(entry)}">{html.escape(entry.title)}</a>'
        yield f"<tr><td>{title}</td><td>{html.escape(entry.parameters)}</td>"
        yield f'<td class="{entry.status}">{entry.status}</td><td>{seconds}</td></tr>'
    yield "</table>"


def _link(entry: Executed) -> str:
    return quote(f"{entry.path.stem}.html")


def _figures(entry: Executed) -> Iterator[str]:
    """All PNG and SVG outputs as images that carry their data."""
    for cell in entry.notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                source = "data:image/png;base64," + data["image/png"].replace("\n", "")
            elif "image/svg+xml" in data:
                source = "data:image/svg+xml;base64," + base64.b64encode(data["image/svg+xml"].encode()).decode()
            else:
                continue
            yield f'<a href="{_link(entry)}"><img alt="figure of {html.escape(entry.title)}" src="{source}"></a>'


def _results_tables(results: list[Result]) -> Iterator[str]:
    """One table per experiment; columns that never vary are said once, above."""
    if not results:
        yield "<p>None yet.</p>"
    for experiment in sorted({result.experiment for result in results}):
        mine = [result for result in results if result.experiment == experiment]
        frame = to_frame(mine).drop(columns="experiment")
        frame.insert(0, "file", [_short(result.path) for result in mine])
        same = [name for name in frame if len(frame) > 1 and frame[name].astype(str).nunique() == 1]
        yield f"<h3>{html.escape(experiment)} ({len(frame)})</h3>"
        if same:
            text = ", ".join(f"{name} = {_cell(frame[name].iloc[0])}" for name in same)
            yield f'<details><summary>the same in all rows</summary><p class="note">{html.escape(text)}</p></details>'
        yield frame.drop(columns=same).map(_cell).to_html(index=False, border=0)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"


def _short(path: Path) -> str:
    """Relative to the project if it lies there: the report may be shown to others."""
    return path.relative_to(project_root()).as_posix() if path.is_relative_to(project_root()) else path.name
