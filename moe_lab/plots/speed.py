"""Figures of notebook 15: time against experts, rooflines, stages beside their bounds, loads, tokens on their way.

Draws tables of `moe_lab.bench.roofline`, `moe_lab.bench.speed_cases` and recorded benchmarks, computes nothing. Legend:
T tokens, E experts, N routed pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from moe_lab.bench.roofline import Ceiling
from moe_lab.plots.sheet import INK, PALE, Box
from moe_lab.plots.style import expert_colors

WAY_STYLES = {
    "all experts, masked": {"color": "#D55E00", "linestyle": "-", "marker": "s"},
    "dispatched": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "dense, equal multiply-adds": {"color": "#222222", "linestyle": ":", "marker": "x"},
}
"""Ways to compute a layer, by their names in `speed_cases.growth`."""

CASE_STYLES = {
    "dense": {"color": "#222222", "hatch": ""},
    "ours": {"color": "#0072B2", "hatch": ""},
    "plain": {"color": "#E69F00", "hatch": "///"},
    "ScatterMoE": {"color": "#D55E00", "hatch": "..."},
}
"""Cases of the benchmark of MoE layers, in the order in which they are drawn."""

PRODUCT, MOVE, LOST = "#0072B2", "#E69F00", "#D55E00"
"""Colours: stages that multiply, stages that move numbers, pairs that are dropped."""


def draw_growth(ax: Axes, table: pd.DataFrame, *, title: str = "") -> None:
    """Milliseconds against the number of experts, both logarithmic; columns keys of `WAY_STYLES`."""
    for name in table:
        ax.plot(table.index, table[name], label=name, markersize=5, **WAY_STYLES[name])
    ticks = [int(e) for e in table.index]
    ax.set(xscale="log", yscale="log", xlabel="experts E (k stays the same)", ylabel="time, ms", title=title)
    ax.set_xticks(ticks, [str(e) for e in ticks])
    low, high = table.min().min(), table.max().max()
    values = [value for value in (0.3, 1, 3, 10, 30, 100, 300, 1000) if 0.7 * low <= value <= 1.4 * high]
    ax.set_yticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()


def draw_roofline(ax: Axes, ceiling: Ceiling, points: pd.DataFrame, *, title: str = "") -> None:
    """What a machine allows at each intensity (line), and what was reached (points with their index beside them).

    Args:
        ax: where.
        ceiling: of the machine.
        points: columns intensity (operations per byte) and operations_per_s.
        title: of the axes.
    """
    ends = [min(points.intensity.min(), ceiling.ridge) / 2, max(points.intensity.max(), ceiling.ridge) * 3]
    line = np.geomspace(*ends, 200)
    ax.plot(line, [ceiling.attainable(x) / 1e9 for x in line], color=INK, label="roofline")
    ax.plot(points.intensity, points.operations_per_s / 1e9, "o", color=PRODUCT, markersize=6, label="measured")
    for name, point in points.iterrows():
        place = (point.intensity, point.operations_per_s / 1e9)
        ax.annotate(str(name), place, (6, -9), textcoords="offset points", fontsize=8)
    ax.axvline(ceiling.ridge, color=PALE, linestyle="--", linewidth=1.2, zorder=0)
    ax.annotate("ridge", (ceiling.ridge, 0.02), (3, 0), ("data", "axes fraction"), "offset points", fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10⁹ operations per second", title=title)
    ax.minorticks_off()


def draw_stages(ax: Axes, table: pd.DataFrame, *, title: str = "") -> None:
    """Time of each stage as a bar, the least that its operations or bytes allow as a black stroke.

    Args:
        ax: where.
        table: of `roofline.against_ceiling`.
        title: of the axes.
    """
    places = np.arange(len(table))
    for product, color, hatch, label in ((True, PRODUCT, "", "product"), (False, MOVE, "///", "moves numbers")):
        rows = np.flatnonzero(table["product"].to_numpy(dtype=bool) == product)
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0, "label": label}
        ax.barh(places[rows], table.ms.to_numpy()[rows], height=0.7, **style)
    ax.vlines(table.bound_ms, places - 0.45, places + 0.45, color=INK, linewidth=2.5, label="least possible")
    names = [f"{name} (× {calls})" if calls > 1 else name for name, calls in zip(table.index, table.calls, strict=True)]
    ax.set_yticks(places, names, fontsize=8)
    ax.set(xlabel="time, ms", title=title)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def draw_cases(ax: Axes, rows: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Operations per second of the cases in `CASE_STYLES`, a group of bars for each shape; above: % of the dense layer.

    Args:
        ax: where.
        rows: of the curve ``moe``; cases without a time are left out.
        title: of the axes.
    """
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    step = 0.8 / len(CASE_STYLES)
    for place, (name, style) in enumerate(CASE_STYLES.items()):
        of_case = [row for row in rows if row["case"] == name and row.get("tflops")]
        x = [shapes.index(_shape(row)) + (place - 1.5) * step for row in of_case]
        bars = ax.bar(
            x, [row["tflops"] for row in of_case], 0.92 * step, label=name, edgecolor="white", linewidth=0, **style
        )
        for bar, row in zip(bars, of_case, strict=True):
            if row.get("of_dense") and name != "dense":
                middle = bar.get_x() + bar.get_width() / 2
                ax.text(middle, bar.get_height(), f"{row['of_dense']:.0%}", ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(shapes)), shapes, fontsize=8)
    ax.set(ylabel="10¹² active operations per second", title=title)
    ax.set_ylim(0, 1.12 * ax.get_ylim()[1])
    ax.grid(axis="x", visible=False)


def _shape(row: Mapping[str, Any]) -> str:
    return f"T {row['tokens']:,}, D {row['width']}\nH {row['hidden']}, E {row['experts']}, k {row['k']}"


def draw_loads(ax: Axes, each: Mapping[str, Sequence[float]], *, title: str = "") -> None:
    """Milliseconds of each expert on a device of its own, a group of bars for each load; a step ends with the longest.

    Args:
        ax: where.
        each: name of the load -> E milliseconds; at most three.
        title: of the axes.
    """
    looks = ((PRODUCT, ""), (MOVE, "///"), (LOST, "..."))
    step = 0.8 / len(each)
    for place, ((name, values), (color, hatch)) in enumerate(zip(each.items(), looks, strict=False)):
        x = np.arange(len(values)) + (place + 0.5) * step - 0.4
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        ax.bar(x, values, 0.92 * step, label=name, **style)
        ax.axhline(max(values), color=color, linestyle="--", linewidth=1.2)
    ax.set(xlabel="expert = device", ylabel="time, ms", title=title, xticks=range(len(next(iter(each.values())))))
    ax.grid(axis="x", visible=False)


def draw_zeros(ax: Axes, table: pd.DataFrame, *, title: str = "") -> None:
    """Shares of `speed_cases.skipped_subtrees` against the sharpness of the splits."""
    looks = {
        "zeros": ("weights that are exactly 0", {"color": INK, "linestyle": ":", "marker": "x"}),
        "by_token": ("subtrees that a token does not reach", {"color": MOVE, "linestyle": "--", "marker": "^"}),
        "by_block": ("... that no token of a block reaches", {"color": PRODUCT, "linestyle": "-", "marker": "o"}),
    }
    for column, (label, style) in looks.items():
        ax.plot(table.index, 100 * table[column], label=label, markersize=5, **style)
    ax.set(xscale="log", xlabel="sharpness of the splits", ylabel="share, %", ylim=(-3, 103), title=title)
    ax.set_xticks(list(table.index), [f"{value:g}" for value in table.index])
    ax.minorticks_off()


def draw_exits(ax: Axes, table: pd.DataFrame, *, title: str = "") -> None:
    """Counted and measured savings of early exits against batch size, places equally far apart.

    Args:
        ax: where.
        table: index batch; columns ratio (of multiply-adds), and names of ways -> times faster.
        title: of the axes.
    """
    looks = (
        {"color": PRODUCT, "linestyle": "-", "marker": "o"},
        {"color": MOVE, "linestyle": "--", "marker": "^"},
        {"color": LOST, "linestyle": "-.", "marker": "s"},
    )
    places = range(len(table))
    ax.plot(places, table.ratio, color=INK, linestyle=":", marker="x", label="multiply-adds")
    for name, look in zip(table.columns.drop("ratio"), looks, strict=False):
        ax.plot(places, table[name], label=name, markersize=5, **look)
    ax.axhline(1, color=INK, linewidth=0.8)
    ax.set_xticks(places, [str(batch) for batch in table.index])
    ax.set(xlabel="batch, images", ylabel="times faster", title=title)
    ax.set_ylim(0, None)


def draw_flow(ax: Axes, box: Box, row: np.ndarray, chosen: np.ndarray) -> None:
    """Tokens (left) on their way to rows sorted by expert (right), in a box of a sheet.

    Args:
        ax: the sheet.
        box: x, y, width, height.
        row: (T, E) the row of each pair, -1 where there is none.
        chosen: (T, E) bool, what the gate asked for: a pair of it without a row was dropped. Tokens with such a pair
            are orange, those left with nothing are crossed out.
    """
    x, y, width, height = box
    n_tokens, n_experts = row.shape
    colors, n_rows = expert_colors(n_experts), max(int(row.max()) + 1, 1)

    def token_y(token):
        return y + height * (1 - (token + 0.5) / n_tokens)

    def row_y(place):
        return y + height * (1 - place / n_rows)

    tokens, experts = np.nonzero(row >= 0)
    ends = zip(token_y(tokens), row_y(row[tokens, experts] + 0.5), strict=True)
    lines = [[(x + 0.1, start), (x + width - 0.28, end)] for start, end in ends]
    ax.add_collection(LineCollection(lines, colors=[colors[e] for e in experts], linewidths=0.8))
    lost, kept = chosen & (row < 0), (row >= 0).any(1)
    for state, marker, color in (
        (~lost.any(1), "s", INK),
        (lost.any(1) & kept, "s", LOST),
        (lost.any(1) & ~kept, "x", LOST),
    ):
        which = np.flatnonzero(state)
        ax.plot(np.full(len(which), x), token_y(which), marker, color=color, markersize=3.5)
    start = 0
    for expert, count in enumerate((row >= 0).sum(0).tolist()):
        bottom, top = row_y(start + count), row_y(start)
        ax.fill_between([x + width - 0.25, x + width], bottom, top, facecolor=colors[expert], edgecolor="white")
        if count:
            ax.text(x + width + 0.05, (bottom + top) / 2, f"{expert}", fontsize=8, va="center")
        start += count


def draw_rows(ax: Axes, box: Box, kept: Sequence[int], asked: Sequence[int], limit: int | None) -> None:
    """Rows of each expert as horizontal bars in a box of a sheet: kept, dropped (hatched), and idle up to the capacity.

    Args:
        ax: the sheet.
        box: x, y, width, height.
        kept, asked: E numbers each, kept <= asked.
        limit: C, as a line; None: a line at the mean instead.
    """
    x, y, width, height = box
    colors, step = expert_colors(len(kept)), height / len(kept)
    mean = sum(asked) / len(asked)
    longest = max(*asked, limit or 0, 4 * mean, 1)  # as wide for moderate loads, so that bars can be compared
    for expert, (inside, wanted) in enumerate(zip(kept, asked, strict=True)):
        top = y + height - expert * step - 0.12 * step
        span = (top - 0.76 * step, top)
        end, full = x + width * inside / longest, x + width * wanted / longest
        ax.fill_between([x, end], *span, facecolor=colors[expert], edgecolor=INK, linewidth=0.8)
        ax.fill_between([end, full], *span, facecolor="white", edgecolor=LOST, hatch="////", linewidth=0.8)
        if limit is not None and inside < limit:
            idle = [full, x + width * limit / longest]
            ax.fill_between(idle, *span, facecolor="white", edgecolor=PALE, linewidth=0.8)
        ax.text(x - 0.06, top - 0.38 * step, f"{expert}", ha="right", va="center", fontsize=8)
        last = max(full, x + width * limit / longest if limit is not None else 0)
        text = f"{inside}" + f" ({wanted - inside} dropped)" * (wanted > inside)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # above the line of the mean
        ax.text(last + 0.06, top - 0.38 * step, text, va="center", fontsize=8, bbox=paper)
    mark = x + width * (mean if limit is None else limit) / longest
    ax.plot((mark, mark), (y, y + height), color=INK, linestyle="--", linewidth=1)
    label = "mean" if limit is None else f"capacity {limit}"
    ax.text(mark, y - 0.05, label, ha="center", va="top", fontsize=8)
