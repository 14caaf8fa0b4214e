"""What was asked of the fast paths, beside what the recorded GPU benchmark says (experiment ``bench_gpu``).

A curve may lie in any of several Results, and a later one may come from another card: curves are found by name, the
newest one counts, and every row says on which card it was measured. The figures asked for were set for an H200. Tables
for reading: `speed_tables`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moe_lab.bench.gpu_gates_problem import SHAPES as GATE_SHAPES
from moe_lab.bench.gpu_problem import SHAPES, Shape
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results

EXPERIMENT = "bench_gpu"
COLUMNS = ("asked", "measured", "on what", "does it hold?")
OF_DENSE = dict(zip(SHAPES, (0.90, 0.85, 0.85), strict=True))
"""Least throughput of the MoE layer over that of a dense layer of equal multiply-adds."""
OF_SCATTERMOE, OF_FIXED, TRIALS = 1.3, 0.95, 20.0
OF_TOPK = dict(zip(GATE_SHAPES, (1.0, 1.5), strict=True))
"""Most time of COMET's gate over that of the top-k softmax gate."""
REACHED, REACHED_AT = 0.90, 4096
"""Least speed-up of early exits over the ratio of multiply-adds, at that batch; at `NOT_SLOWER_AT` at least 1."""
NOT_SLOWER_AT = 64


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A curve and the Result that it is from."""

    curve: str
    rows: list[dict[str, Any]]
    result: Result

    @property
    def card(self) -> str:
        """Name of the device."""
        return self.result.environment["device"]

    @property
    def about(self) -> str:
        """``NVIDIA H100 80GB HBM3, PyTorch 2.11.0, bfloat16``."""
        version = self.result.environment["torch"].split("+")[0]
        parts = [self.card, f"PyTorch {version}", self.config.get("dtype", "")]
        return ", ".join(part for part in parts if part)

    @property
    def config(self) -> dict[str, Any]:
        """The part of the benchmark's config that this curve was measured with."""
        table = {"stages": "moe", "power": "moe", "gates_parts": "gates"}.get(self.curve, self.curve)
        found = self.result.config.get(table)
        return found if isinstance(found, dict) else {}

    @property
    def size(self) -> int:
        """Bytes per number."""
        return getattr(torch, self.config.get("dtype", "bfloat16")).itemsize


def recorded_curve(curve: str, root: Path | str | Iterable[Path | str] | None = None) -> Recorded | None:
    """The newest finished benchmark that has the curve and is no dry run; None if there is none.

    Args:
        curve: "moe", "stages", "power", "gates", "gates_parts", "exits", "trials".
        root: as in `find_results`; default: what is recorded.
    """
    found = find_results(EXPERIMENT, root=recorded_dir() if root is None else root)
    found = [result for result in found if result.curves.get(curve)]
    if not found:
        return None
    newest = max(found, key=lambda result: result.started)
    return Recorded(curve, newest.curves[curve], newest)


def rows_of(rows: Iterable[Mapping[str, Any]], sizes: Any) -> dict[str, Mapping[str, Any]]:
    """Case -> row, of the rows with these sizes that were timed (the first of each case)."""
    wanted, found = dataclasses.asdict(sizes), {}
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()) and row.get("ms"):
            found.setdefault(row["case"], row)
    return found


def sizes_text(sizes: Any) -> str:
    """``T 32768, D 1024, H 4096, E 16, k 2``."""
    letters = {"tokens": "T", "width": "D", "hidden": "H", "experts": "E", "k": "k"}
    return ", ".join(f"{letters[name]} {value}" for name, value in dataclasses.asdict(sizes).items())


def shape_of(row: Mapping[str, Any]) -> Shape:
    """The sizes in a row of ``moe`` or ``stages``."""
    return Shape(*(row[field.name] for field in dataclasses.fields(Shape)))


def _shown(value: float, least: float) -> str:
    """Two digits; four where two would look like ``least`` although the value is below: judged is what was measured."""
    return f"{value:.4f}" if value < least <= round(value, 2) else f"{value:.2f}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _moe_claims(moe: Recorded) -> list[tuple[str, str, str, str]]:
    rows, lowest, captured = [], {}, []
    for shape, least in OF_DENSE.items():
        cases = rows_of(moe.rows, shape)
        if "ours" not in cases:
            continue
        on = f"{sizes_text(shape)}; {moe.card}"
        ours = cases["ours"]
        if ours.get("of_dense"):
            fixed = {n: r["of_dense"] for n, r in cases.items() if n.startswith("ours") and "variable" not in n}
            best = max(fixed, key=fixed.get)
            text, at_best = (_shown(value, least) for value in (ours["of_dense"], fixed[best]))
            text += f"; at best {at_best} ({best})" * (at_best != text)
            asked = f"MoE layer: at least {least:.2f} of a dense layer"
            rows.append((asked, text, on, _yes(ours["of_dense"] >= least)))
        if ours.get("of_scattermoe"):
            ratio = ours["of_scattermoe"]
            asked = f"at least {OF_SCATTERMOE} times ScatterMoE"
            rows.append((asked, f"{_shown(ratio, OF_SCATTERMOE)} times", on, _yes(ratio >= OF_SCATTERMOE)))
        for name in ("ours, variable k, bounded", "ours, variable k"):
            if name in cases and cases[name].get("of_fixed"):
                lowest.setdefault(name, []).append(cases[name]["of_fixed"])
        captured.append("ours, CUDA graph" in cases)
    for name, values in list(lowest.items())[:1]:
        asked = f"variable number of experts: at least {OF_FIXED} of fixed k, per pair"
        text = f"{min(values):.2f} to {max(values):.2f} ({name})"
        rows.append((asked, text, f"{len(values)} sizes; {moe.card}", _yes(min(values) >= OF_FIXED)))
    if captured:
        asked = "fixed k: no waiting for the host (runs as a CUDA graph)"
        rows.append((asked, f"{sum(captured)} of {len(captured)} sizes", moe.card, _yes(all(captured))))
    return rows


def _gate_claims(gates: Recorded) -> list[tuple[str, str, str, str]]:
    rows = []
    for shape, most in OF_TOPK.items():
        cases = rows_of([row for row in gates.rows if row.get("sharpness") == 1], shape)
        if "COMET, kernels" not in cases or "top-k" not in cases:
            continue
        ratio = cases["COMET, kernels"]["of_topk"]
        text = f"{ratio:.2f}"
        graphs = [cases.get(name) for name in ("COMET, kernels, graph", "top-k, graph", "top-k, x's dtype, graph")]
        if all(graphs):
            ours, topk, narrow = (row["ms"] for row in graphs)
            text += f"; as graphs {ours / topk:.2f}, over top-k in x's dtype {ours / narrow:.2f}"
        asked = f"COMET's gate: at most {most:.1f} of the time of top-k"
        rows.append((asked, text, f"{sizes_text(shape)}; {gates.card}", _yes(ratio <= most)))
    return rows


def _exit_claims(exits: Recorded) -> list[tuple[str, str, str, str]]:
    rows = []
    for batch, column, least, asked in (
        (REACHED_AT, "reached", REACHED, f"early exits: at least {REACHED:.2f} of the saved multiply-adds"),
        (NOT_SLOWER_AT, "speed_up", 1.0, "early exits: not slower than the full network"),
    ):
        found = {row["case"]: row for row in exits.rows if row["batch"] == batch and row.get(column)}
        fast = {case: row[column] for case, row in found.items() if case.startswith("fast")}
        if fast:
            best = max(fast, key=fast.get)
            text = f"{_shown(fast[best], least)} ({best})"
            if "plain" in found:
                text += f"; plain compaction {found['plain'][column]:.2f}"
            if column == "speed_up":
                text += f", against the fastest of {sum(case.startswith('full') for case in found)} full networks"
            eager = found[best].get("over_eager")
            text += f"; {eager:.1f} times the full network run eagerly" if eager and column == "speed_up" else ""
            rows.append((asked, text, f"batch {batch}; {exits.card}", _yes(fast[best] >= least)))
    return rows


def _trial_claims(trials: Recorded) -> list[tuple[str, str, str, str]]:
    times = [row["times"] for row in trials.rows if row.get("times")]
    asked = f"many trials at once: at least {TRIALS:.0f} times the trials per hour"
    text = f"{min(times):.1f} to {max(times):.1f} times"
    on = f"recommender, {len(times)} gate{'s' * (len(times) > 1)}; {trials.card}"
    return [(asked, text, on, _yes(min(times) >= TRIALS))]


CLAIMS: dict[str, Callable[[Recorded], list[tuple[str, str, str, str]]]] = {
    "moe": _moe_claims,
    "gates": _gate_claims,
    "exits": _exit_claims,
    "trials": _trial_claims,
}
"""Curve -> its rows of the table."""


def speed_claims(curves: Mapping[str, Recorded | None]) -> pd.DataFrame:
    """The table "asked / measured / on what / does it hold?"; a curve that is missing or says nothing has a row too.

    Args:
        curves: name -> what `recorded_curve` found; those of `CLAIMS` are read.
    """
    rows = []
    for name, judge in CLAIMS.items():
        recorded = curves.get(name)
        found = judge(recorded) if recorded is not None else []
        rows += found or [(f"(curve {name!r})", "nothing recorded", "", "open")]
    return pd.DataFrame(rows, columns=COLUMNS)
