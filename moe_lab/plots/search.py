"""Draw permutation search: soft matrices with their permutation, cooling schedules, and the study of notebook 05."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_lab.plots.sheet import INK, Box, draw_table

SEARCH_STYLES = {
    "none": {"color": "#7A7A7A", "marker": "s", "label": "no search"},
    "shuffle": {"color": "#CC79A7", "marker": "x", "label": "random relabelling"},
    "official": {"color": "#E69F00", "marker": "^", "label": "search, official schedule"},
    "default": {"color": "#0072B2", "marker": "o", "label": "search, default schedule"},
    "one_shot": {"color": "#009E73", "marker": "D", "label": "one assignment before training"},
}
"""Colour, marker and name of each search of `moe_lab.experiments.search_config.SEARCHES`."""


def draw_matrix(ax: Axes, box: Box, matrix: Any, assignment: Sequence[int] | None = None, *, title: str = "") -> None:
    """P (E, E) as shades in a box of a sheet, rows = outputs; rings mark the permutation, row sums at the right."""
    matrix = np.asarray(matrix, dtype=float)
    n = len(matrix)
    x, y, width, height = box
    cell = width / n, height / n
    draw_table(ax, box, matrix, xlabel="expert", ylabel="output of the gate", title=title)
    if assignment is not None:
        columns = x + (np.asarray(assignment) + 0.5) * cell[0]
        rows = y + height - (np.arange(n) + 0.5) * cell[1]
        size = 0.5 * 72 * min(cell)
        ax.plot(columns, rows, "o", markersize=size, markerfacecolor="none", markeredgecolor="#D55E00", zorder=2)
    for row, total in enumerate(matrix.sum(-1)):
        color = INK if abs(total - 1) < 0.01 else "#D55E00"
        middle = y + height - (row + 0.5) * cell[1]
        ax.text(x + width + 0.06, middle, f"{total:.2f}", va="center", fontsize=min(8, 72 * cell[1]), color=color)
    ax.text(x + width + 0.06, y + height + 0.08, "row sum", va="bottom", fontsize=8)


def draw_schedules(axes: Sequence[Axes], health: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Row error, share with the best assignment of L, and gradient over the progress of each schedule."""
    quantities = (
        ("row_error", "median row error"),
        ("match", "P and L: same best assignment"),
        ("gradient", "gradient at L, times τ"),
    )
    for ax, (name, title) in zip(axes, quantities, strict=True):
        for search, rows in health.items():
            style = SEARCH_STYLES[search]
            ax.plot([row["progress"] for row in rows], [row[name] for row in rows], markersize=4, **style)
        ax.set(title=title, xlabel="progress s / S")
    axes[0].set(ylim=(-0.05, None))
    axes[1].set(ylim=(-0.05, 1.05))
    axes[2].set(yscale="log")


def draw_study(ax: Axes, frame: Any, searches: Sequence[str] = tuple(SEARCH_STYLES)) -> None:
    """Test loss of every scenario (rows) and search (markers): mean over seeds, on a logarithmic scale.

    A black tick is the best relabelling of the start, averaged over seeds: what a permutation could reach if nothing
    else learned.

    Args:
        frame: one row per run, as `moe_lab.experiments.search_study.runs_frame` gives it.
    """
    scenarios = list(dict.fromkeys(frame["scenario"]))
    means = frame.groupby(["scenario", "search"])["test_loss"].mean()
    bounds = frame.groupby("scenario")["best_relabelling"].mean()
    places = {scenario: -row for row, scenario in enumerate(scenarios)}
    shift = np.linspace(0.26, -0.26, len(searches))
    for offset, search in zip(shift, searches, strict=True):
        values = [means[scenario, search] for scenario in scenarios]
        rows = [places[scenario] + offset for scenario in scenarios]
        ax.plot(values, rows, linestyle="", markersize=5, **SEARCH_STYLES[search])
    for scenario in scenarios:
        ax.plot([bounds[scenario]] * 2, [places[scenario] - 0.38, places[scenario] + 0.38], color=INK, linewidth=1.6)
        ax.axhline(places[scenario] - 0.5, color="#DDDDDD", linewidth=0.8)
    ax.plot([], [], color=INK, linewidth=1.6, label="best relabelling of the start")
    ax.set(xscale="log", xlabel="test loss (noise variance: 0.01)", ylim=(-len(scenarios) + 0.5, 0.5))
    ax.set_yticks(list(places.values()), scenarios)
    ax.grid(False, axis="y")


def draw_curves(ax: Axes, frame: Any, scenario: str, searches: Sequence[str], *, search_epochs: int) -> None:
    """Validation loss over epochs, mean over seeds with its standard error; the search ends at the dotted line."""
    for search in searches:
        part = frame[(frame["scenario"] == scenario) & (frame["search"] == search)]
        curves = np.array(part["valid"].tolist())
        epochs = np.arange(1, curves.shape[1] + 1)
        mean, error = curves.mean(0), curves.std(0, ddof=1) / np.sqrt(len(curves))
        style = {name: value for name, value in SEARCH_STYLES[search].items() if name != "marker"}
        ax.plot(epochs, mean, **style)
        ax.fill_between(epochs, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
    ax.axvline(search_epochs, color=INK, linestyle=":", linewidth=1)
    ax.set(yscale="log", xlabel="epoch", title=scenario)
