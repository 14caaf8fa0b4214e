"""Figures of notebook 14: what confidence is worth after stopping early, and prediction sets.

Draws arrays and curves of `moe_lab.experiments.jei_dnn`, computes nothing. Legend: L exits, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from moe_lab.names import check_name
from moe_lab.plots.jei import STYLES
from moe_lab.plots.sheet import INK, PALE

STRATEGY_STYLES: dict[str, dict[str, Any]] = {
    "general": {"color": "#D55E00", "linestyle": "-", "marker": "s", "markersize": 5},
    "gated": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 9, "markerfacecolor": "none"},
    "gated_all": {"color": "#E69F00", "linestyle": "--", "marker": "^", "markersize": 6},
    "gated_strict": {"color": "#009E73", "linestyle": ":", "marker": "D", "markersize": 4},
}
"""A strategy of `moe_lab.metrics.conformal.STRATEGIES` by its name."""


def method_style(method: str) -> dict[str, Any]:
    """Keywords of `Axes.plot` for a method of the curve ``points``: colour, line style, marker, label, a small marker.

    Raises:
        ValueError: no look for this method, with the nearest one that has.
    """
    check_name("method", method, STYLES)
    return STYLES[method] | {"markersize": 6 if method == "jei_dnn" else 4}


def draw_reliability(ax: Axes, table: pd.DataFrame, *, color: str, title: str = "") -> None:
    """Accuracy against confidence, a point per bin; sticks to the diagonal, weighted by share, are the ECE.

    Args:
        ax: where.
        table: columns share, confidence, accuracy, one row per bin (`metrics.calibration.reliability`).
        color: of points and sticks.
        title: of the axes.
    """
    ax.plot((0, 100), (0, 100), color=INK, linewidth=0.8, linestyle="--")
    sure, right = 100 * table.confidence, 100 * table.accuracy
    ax.vlines(sure, sure, right, color=color, linewidth=2, alpha=0.6)
    ax.plot(sure, right, "o", color=color, markersize=4)
    ax.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 102), ylim=(0, 102), title=title)
    ax.set_aspect("equal")


def draw_bias(ax: Axes, sizes: Sequence[int], measured: Sequence[float], formula: Sequence[float]) -> None:
    """ECE of perfectly calibrated data against the number of samples, both axes logarithmic.

    Args:
        ax: where.
        sizes: samples.
        measured, formula: ECE, in [0, 1].
    """
    ax.plot(sizes, formula, color=INK, linewidth=1.2, linestyle="--", label="formula (2)")
    ax.plot(sizes, measured, "o", color="#0072B2", markersize=6, label="measured")
    ticks, shares = [64, 1000, 10_000, 100_000], [0.003, 0.01, 0.03, 0.1, 0.3]
    ax.set(xscale="log", yscale="log", xlabel="samples", ylabel="ECE, though nothing is wrong")
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_yticks(shares, [f"{share:g}" for share in shares])
    ax.minorticks_off()
    ax.legend(fontsize=8)


def draw_column(
    ax: Axes,
    points: pd.DataFrame,
    column: str,
    *,
    methods: Sequence[str] = ("jei_dnn", "geometric", "shared"),
    scale: float = 1.0,
    ylabel: str = "",
    title: str = "",
) -> None:
    """A column of the points against cost, a line for each method.

    Args:
        ax: where.
        points: columns method, cost (relative, in [0, 1]), and ``column``.
        column: what is drawn upwards.
        methods: names in `plots.jei.STYLES`; those without points are left out.
        scale: 100 for per cent.
        ylabel, title: of the axes.
    """
    for method in methods:
        rows = points[points.method == method].sort_values("cost")
        if len(rows):
            ax.plot(rows.cost, scale * rows[column], **method_style(method))
    ax.set(xlabel="multiply-adds, share of the whole network", ylabel=ylabel, xlim=(0, 1.02), title=title)


def draw_bars(
    ax: Axes, values: Mapping[str, Sequence[float]], looks: Mapping[str, Mapping[str, Any]], *, title: str = ""
) -> None:
    """Bars beside each other for each exit; an exit that nobody takes (nan) has none.

    Args:
        ax: where.
        values: name -> L numbers, e.g. points of confidence - accuracy.
        looks: name -> keywords of `Axes.bar` (color, hatch).
        title: of the axes.
    """
    width = 0.8 / len(values)
    for place, (name, heights) in enumerate(values.items()):
        x = np.arange(1, len(heights) + 1) + (place - (len(values) - 1) / 2) * width
        ax.bar(x, heights, 0.92 * width, label=name, edgecolor=INK, linewidth=0.5, **looks[name])
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="exit", xticks=range(1, len(next(iter(values.values()))) + 1), title=title)
    ax.grid(axis="x", visible=False)


def draw_alphas(
    ax: Axes, rows: pd.DataFrame, value: str, *, ylabel: str, title: str = "", chance: Sequence[float] | None = None
) -> None:
    """A number against alpha, a line per strategy.

    Args:
        ax: where.
        rows: columns strategy, alpha, and ``value``.
        value: column.
        ylabel, title: of the axes.
        chance: half width of a band around 0, one number per alpha in increasing order.
    """
    if chance is not None:
        alphas = sorted(rows.alpha.unique())
        band = np.asarray(chance, dtype=float)
        ax.fill_between(alphas, -band, band, color=PALE, alpha=0.6, linewidth=0, label="chance, two deviations")
        ax.axhline(0, color=INK, linewidth=0.8)
    for strategy, style in STRATEGY_STYLES.items():
        of = rows[rows.strategy == strategy].sort_values("alpha")
        if len(of):
            ax.plot(of.alpha, of[value], label=strategy, **style)
    ticks = sorted(rows.alpha.unique())
    ax.set(xscale="log", xlabel="α, accepted miscoverage", ylabel=ylabel, title=title)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def draw_conditional(
    ax: Axes, coverages: Mapping[str, Sequence[float]], names: Sequence[str], wanted: float, *, title: str = ""
) -> None:
    """Coverage in groups of samples, markers per strategy, a line where it should be.

    Args:
        ax: where.
        coverages: strategy -> coverage in [0, 1] of each group; nan: nobody in it.
        names: of the groups.
        wanted: 1 - alpha.
        title: of the axes.
    """
    ax.axhline(100 * wanted, color=INK, linewidth=1, linestyle="--")
    for place, (strategy, values) in enumerate(coverages.items()):
        x = np.arange(len(names)) + (place - (len(coverages) - 1) / 2) * 0.16
        style = STRATEGY_STYLES[strategy] | {"linestyle": ""}
        ax.plot(x, 100 * np.asarray(values, dtype=float), label=strategy, **style)
    ax.set(xlim=(-0.6, len(names) - 0.4), ylabel="covered, %", title=title)
    ax.set_xticks(range(len(names)), names)
    ax.grid(axis="x", visible=False)
