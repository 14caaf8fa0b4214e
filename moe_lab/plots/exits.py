"""Figures of notebook 12: where samples leave, what that costs, and what the clock says.

Draws arrays and points of `moe_lab.experiments.jei_dnn`, computes nothing. Legend: L exits, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from moe_lab.plots.sheet import INK, PALE, Box
from moe_lab.plots.style import expert_colors

METHOD_STYLES = {
    "jei_dnn": {"color": "#0072B2", "linestyle": "", "marker": "o", "label": "learned gates (JEI-DNN)"},
    "geometric": {"color": "#E69F00", "linestyle": "--", "marker": "^", "label": "thresholds, geometric shares"},
    "shared": {"color": "#D55E00", "linestyle": "-", "marker": "s", "label": "one shared threshold"},
    "static": {"color": "#7A7A7A", "linestyle": ":", "marker": "x", "label": "all at the same exit"},
    "oracle_cheapest": {"color": "#009E73", "linestyle": "-", "marker": "v", "label": "oracle: loss + λ cost"},
    "oracle_earliest": {"color": "#009E73", "linestyle": "", "marker": "*", "label": "oracle: earliest right"},
}
"""A method by its name in the curve ``points``. Oracles see the labels."""

TIME_STYLES = {
    "every head and gate": {"color": "#7A7A7A", "linestyle": ":", "marker": "x"},
    "rows leave": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "rows leave at once": {"color": "#56B4E9", "linestyle": "--", "marker": "v"},
    "rows stay to the end": {"color": "#D55E00", "linestyle": "-.", "marker": "s"},
}
"""Ways to run a network with exits: `predict_masked`, and `predict` as it is, with compact_from 0 and with 1."""

MARK = "#D55E00"
"""Colour of what is chosen: the exit that is taken, the threshold that is set."""


def draw_distribution(
    ax: Axes, box: Box, probabilities: Sequence[float], taken: int, *, title: str = "", xlabel: str = "exit"
) -> None:
    """P(leave at l) as bars in a box of a sheet, from 0 to 1; the exit that is taken is orange and hatched.

    Args:
        ax: the sheet.
        box: x, y, width, height of the bars.
        probabilities: L numbers in [0, 1].
        taken: 0 .. L - 1.
        title: above.
        xlabel: below.
    """
    x, y, width, height = box
    step = width / len(probabilities)
    ax.plot((x, x, x + width), (y + height, y, y), color=INK, linewidth=0.8)
    for tick in (0, 0.5, 1):
        ax.text(x - 0.05, y + tick * height, f"{tick:g}", ha="right", va="center", fontsize=8)
    for level, value in enumerate(probabilities):
        is_taken = level == taken
        style = {"facecolor": MARK if is_taken else PALE, "edgecolor": INK, "hatch": "///" if is_taken else None}
        left = x + (level + 0.15) * step
        ax.fill_between([left, left + 0.7 * step], y, y + value * height, linewidth=0.8, **style)
        middle = left + 0.35 * step
        ax.text(middle, y + value * height + 0.03, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
        weight = "bold" if is_taken else "normal"
        ax.text(middle, y - 0.05, f"{level + 1}", ha="center", va="top", fontsize=9, fontweight=weight)
    ax.text(x + width / 2, y - 0.22, xlabel, ha="center", va="top", fontsize=9)
    ax.text(x, y + height + 0.25, title, va="bottom", fontsize=10)


def method_look(style: Mapping[str, Any], n_points: int) -> dict[str, Any]:
    """A style of `METHOD_STYLES` for a line of so many points: about a dozen markers; single points on top of lines."""
    if not style["linestyle"]:
        return {**style, "markersize": 9 if style["marker"] == "*" else 5, "zorder": 3}
    return {**style, "markersize": 5, "markevery": -(-n_points // 14)}


def draw_tradeoff(ax: Axes, points: pd.DataFrame, *, title: str = "") -> None:
    """Accuracy against cost, a line or markers for each method (`METHOD_STYLES`).

    Args:
        ax: where.
        points: columns method, cost (relative, in [0, 1]), accuracy (in [0, 1]).
        title: of the axes.
    """
    for method, style in METHOD_STYLES.items():
        rows = points[points.method == method].sort_values("cost")
        if len(rows):
            ax.plot(rows.cost, 100 * rows.accuracy, **method_look(style, len(rows)))
    ax.set(xlabel="multiply-adds, share of the whole network", ylabel="accuracy, %", xlim=(0, 1.02), title=title)


def draw_shares(ax: Axes, shares: Mapping[str, Sequence[float]], *, title: str = "") -> None:
    """Where samples leave: one stacked bar per row, a colour and a number for each exit.

    Args:
        ax: where.
        shares: name of the row -> L shares that sum to 1; the first row on top.
        title: of the axes.
    """
    names = list(shares)
    n_exits = len(next(iter(shares.values())))
    left = np.zeros(len(names))
    for level, color in enumerate(expert_colors(n_exits)):
        widths = np.array([shares[name][level] for name in names], dtype=float)
        ax.barh(range(len(names)), widths, left=left, color=color, edgecolor="white", label=f"exit {level + 1}")
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.05:
                dark = color in ("#0072B2", "#222222", "#D55E00", "#009E73")
                ink = "white" if dark else INK
                ax.text(start + width / 2, row, f"{level + 1}", ha="center", va="center", fontsize=8, color=ink)
        left += widths
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="share of samples", title=title)
    ax.invert_yaxis()
    ax.grid(False)


def draw_times(ax: Axes, speed_ups: pd.DataFrame, *, counted: float | None = None, title: str = "") -> None:
    """Time of the plain network over time of a way to run exits, against batch size; above 1 is faster.

    Args:
        ax: where.
        speed_ups: index batch size, columns keys of `TIME_STYLES`, values ratios of seconds.
        counted: ratio of multiply-adds, as a dashed line.
        title: of the axes.
    """
    for name, style in TIME_STYLES.items():
        if name in speed_ups:
            ax.plot(speed_ups.index, speed_ups[name], label=name, markersize=5, **style)
    ax.axhline(1, color=INK, linewidth=0.8)
    if counted is not None:
        ax.axhline(counted, color=INK, linewidth=1, linestyle="--", label="multiply-adds")
    ticks = list(speed_ups.index)
    ax.set(xscale="log", xlabel="batch, images", ylabel="times faster than without exits", title=title)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, None)


def draw_readings(
    ax: Axes, gates: Sequence[float], targets: Sequence[float], taken: Mapping[str, Sequence[float]], *, title: str = ""
) -> None:
    """What gates learned beside what they were asked, all as shares that have left by an exit.

    Args:
        ax: where.
        gates: G mean gates, drawn as points.
        targets: L shares of samples whose best exit is l or earlier; the last is 1.
        taken: name -> L shares of samples that have left by exit l.
        title: of the axes.
    """
    levels = np.arange(1, len(targets) + 1)
    ax.step(levels, targets, where="mid", color=INK, linewidth=2.4, label="targets: best exit ≤ l")
    ax.plot(levels[: len(gates)], gates, "o", color="#0072B2", markersize=6, label="mean gate")
    looks: list[dict[str, Any]] = [
        {"color": "#D55E00", "linestyle": "--"},
        {"color": "#009E73", "linestyle": "-."},
        {"color": "#CC79A7", "linestyle": ":"},
    ]
    for (name, shares), look in zip(taken.items(), looks, strict=False):
        ax.step(levels, shares, where="mid", label=f"have left: {name}", **look)
    ax.set(xlabel="exit l", ylabel="share", ylim=(-0.03, 1.03), xticks=levels, title=title)
