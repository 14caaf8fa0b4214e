"""Figures of notebook 13: how a price chooses exits, when gates and classifiers learn, and what came out.

Draws arrays and curves of `moe_lab.experiments.jei_dnn`, computes nothing but places. Legend: L exits, G = L - 1 gates,
E_l cross entropy, c_l relative cost, lambda the price of the whole network's cost in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from moe_lab.plots.exits import MARK, METHOD_STYLES, method_look
from moe_lab.plots.sheet import INK, PALE
from moe_lab.plots.style import expert_colors

_MORE = {
    "target_accuracy": {"color": "#5A4B3C", "linestyle": "-.", "marker": "d", "label": "thresholds, target accuracy"},
    "boosted": {"color": "#CC79A7", "linestyle": "--", "marker": "D", "label": "BoostedNet, geometric shares"},
    "weighted": {"color": "#56B4E9", "linestyle": "-.", "marker": "P", "label": "L2W-DEN, geometric shares"},
}
STYLES: dict[str, dict[str, Any]] = {**_MORE, **METHOD_STYLES}
"""Look of a method of the curve ``points``."""

MODE_STYLES = {
    "released": {"color": "#0072B2", "marker": "o"},
    "detached": {"color": "#D55E00", "marker": "s"},
    "expected": {"color": "#009E73", "marker": "^"},
    "single": {"color": "#CC79A7", "marker": "D"},
}
"""Look of a mode of `exits.losses.inference_loss`; "uniform" is "released"."""

PHASES = {"warmup": (PALE, None), "gates": ("#56B4E9", None), "modules": ("#E69F00", "///")}
"""Colour and hatch of a phase."""

_LINES = ("-", "--", "-.", ":")


def draw_prices(ax: Axes, losses: Sequence[float], costs: Sequence[float], most: float, *, title: str = "") -> None:
    """E_l + lambda c_l of one sample against lambda: a line per exit, the lowest in orange below them all.

    Args:
        ax: where.
        losses, costs: (L,) of the sample; costs relative.
        most: largest lambda shown.
        title: of the axes.
    """
    prices = np.linspace(0, most, 400)
    values = np.array(losses)[:, None] + np.array(costs)[:, None] * prices
    ax.plot(prices, values.min(0), color=MARK, linewidth=6, alpha=0.45, label="best exit", solid_capstyle="butt")
    for level, (line, color) in enumerate(zip(values, expert_colors(len(values)), strict=True)):
        ax.plot(prices, line, color=color, linestyle=_LINES[level % 4], label=f"exit {level + 1}")
    best = values.argmin(0)
    for level, group in groupby(range(len(prices)), key=lambda i: best[i]):
        places = list(group)
        if places[0]:
            ax.axvline(prices[places[0]], color=INK, linewidth=0.8, linestyle=":")
        ax.text(prices[places].mean(), 0.02, f"exit {level + 1}", transform=ax.get_xaxis_transform(), ha="center")
    ax.set(xlabel="λ, nats for the whole network", ylabel="E + λ c, nats", xlim=(0, most), ylim=(0, None), title=title)


def draw_methods(ax: Axes, points: pd.DataFrame, methods: Sequence[str], *, title: str = "") -> None:
    """Accuracy against cost of these methods (`STYLES`); others in ``points`` are left out.

    Args:
        ax: where.
        points: columns method, cost (relative), accuracy (in [0, 1]).
        methods: what to draw, in this order.
        title: of the axes.
    """
    for method in methods:
        rows = points[points.method == method].sort_values("cost")
        if len(rows):
            ax.plot(rows.cost, 100 * rows.accuracy, **method_look(STYLES[method], len(rows)))
    ax.set(xlabel="multiply-adds, share of the whole network", ylabel="accuracy, %", title=title)


def draw_modes(
    ax: Axes, points: Mapping[str, Sequence[tuple[float, float]]], others: pd.DataFrame, *, title: str = ""
) -> None:
    """Accuracy against cost of gates and classifiers trained in different modes; the shared threshold as a pale line.

    Args:
        ax: where.
        points: mode -> (cost, accuracy) pairs, one per price.
        others: points of other methods, as for `draw_methods`.
        title: of the axes.
    """
    costs, accuracies = zip(*(pair for pairs in points.values() for pair in pairs), strict=True)
    line = others[others.method == "shared"].sort_values("cost")
    ax.plot(line.cost, 100 * line.accuracy, color=PALE, linewidth=4, zorder=1, label="one shared threshold")
    for mode, pairs in points.items():
        x, y = np.array(pairs).T
        ax.plot(x, 100 * y, linestyle="", markersize=7, alpha=0.8, label=mode, **MODE_STYLES[mode])
    ax.set(xlabel="multiply-adds, share of the whole network", ylabel="accuracy, %", title=title)
    ax.set(xlim=(min(costs) - 0.03, max(costs) + 0.03), ylim=(100 * min(accuracies) - 2, 100 * max(accuracies) + 2))


def draw_by_exit(ax: Axes, rows: Sequence[Mapping[str, Any]], everybody: Sequence[float], *, title: str = "") -> None:
    """The paper's figure 2: per exit the accuracy on all samples (crosses) and on those that leave there (circles).

    Args:
        ax: where.
        rows: of one method and setting in the curve ``by_exit``: exit (0 is the first), share, accuracy. The area of a
            circle is the share; below half a per cent there is none.
        everybody: (L,) accuracies of the exits on all samples, in [0, 1].
        title: of the axes.
    """
    levels = np.arange(1, len(everybody) + 1)
    ax.plot(levels, 100 * np.array(everybody), "x--", color="#7A7A7A", label="on all samples", markersize=7)
    look = {"color": "#56B4E9", "edgecolor": INK, "zorder": 3}
    ax.scatter([], [], s=60, label="on those that leave there; area: their share", **look)
    for row in rows:
        if row["share"] >= 0.005:
            place, size = (row["exit"] + 1, 100 * row["accuracy"]), 1500 * row["share"] + 6
            ax.scatter(*place, s=size, **look)
            above = {"xytext": (0, size**0.5 / 2 + 2), "textcoords": "offset points"}
            ax.annotate(f"{row['share']:.0%}", place, ha="center", va="bottom", fontsize=8, zorder=4, **above)
    ax.set(xlabel="exit", ylabel="accuracy, %", xticks=levels, xlim=(0.5, len(levels) + 0.5), title=title)
    ax.margins(y=0.18)


def draw_phases(ax: Axes, rows: Mapping[str, Iterable[str]], *, title: str = "", ends: int | None = None) -> None:
    """Whose turn it is, step by step: a bar per row, gates blue, classifiers orange and hatched, warm-up grey.

    Args:
        ax: where.
        rows: name -> a phase ("warmup", "gates", "modules") for every step; the first row on top.
        title: of the axes.
        ends: steps per epoch; a vertical line after each.
    """
    named, longest = set(), 0
    for place, phases in enumerate(rows.values()):
        start = 0
        for name, group in groupby(phases):
            length = len(list(group))
            color, hatch = PHASES[name]
            label = None if name in named else {"modules": "classifiers"}.get(name, name)
            ax.barh(place, length, 0.7, start, color=color, hatch=hatch, edgecolor=INK, linewidth=0.5, label=label)
            named.add(name)
            start += length
        longest = max(longest, start)
    for end in range(ends, longest, ends) if ends else ():
        ax.axvline(end, color=INK, linewidth=0.8, linestyle=":")
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="steps", xlim=(0, longest), title=title)
    ax.invert_yaxis()
    ax.grid(False)


def draw_training(
    ax: Axes,
    rows: Sequence[Mapping[str, float]],
    phases: Sequence[str],
    columns: Mapping[str, str],
    *,
    ylabel: str = "",
    title: str = "",
) -> None:
    """Columns of a training curve against steps, on a ground that says whose turn it was.

    Args:
        ax: where.
        rows: with ``step``; a row without a column, or with None in it, is left out.
        phases: a phase for every step from the first.
        columns: name in the rows -> label.
        ylabel, title: of the axes.
    """
    start = 0
    for name, group in groupby(phases):
        length = len(list(group))
        ax.axvspan(start, start + length, color=PHASES[name][0], alpha=0.18, linewidth=0)
        start += length
    for (column, label), look in zip(columns.items(), ("o-", "s--", "^-."), strict=False):
        pairs = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        ax.plot(*zip(*pairs, strict=True), look, markersize=4, label=label)
    ax.set(xlabel="steps", ylabel=ylabel, xlim=(0, start), title=title)
