"""Figures of notebook 08: what spawned experts compute, how far apart they are, what the shared phase is worth.

Draws Results of `moe_lab.experiments.evomoe_language` and arrays, computes nothing. Legend: T points, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.plots.sheet import INK, Box, Chart
from moe_lab.plots.style import expert_colors
from moe_lab.results import Result

RUN_STYLES = {
    "evomoe": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "evomoe: one expert, then spawned"},
    "dts": {"color": "#D55E00", "linestyle": "--", "marker": "s", "label": "dts: different from the start"},
}
"""The two ways to begin, by name of the gate."""

START_STYLES = {
    "copies": {"color": "#222222", "linestyle": "-", "marker": "o"},
    "masks": {"color": "#0072B2", "linestyle": "-", "marker": "s"},
    "noise": {"color": "#009E73", "linestyle": "--", "marker": "^"},
    "neurons": {"color": "#E69F00", "linestyle": "-.", "marker": "D"},
    "fresh": {"color": "#CC79A7", "linestyle": ":", "marker": "x"},
    "copies, no noise": {"color": "#999999", "linestyle": "-", "marker": "P"},
    "masks, no noise": {"color": "#56B4E9", "linestyle": "--", "marker": "v"},
}
"""How experts were made different; "fresh" ones never had a common origin."""

STATE_STYLES = {
    "reset": {"color": "#D55E00", "linestyle": "-"},
    "copy": {"color": "#0072B2", "linestyle": "--"},
    "copy_v": {"color": "#009E73", "linestyle": "-."},
}
"""What the optimiser remembers of the shared expert."""

FAR = 1.5
"""Distance in function that is drawn darkest; independent functions of equal size are sqrt(2) apart."""


def draw_functions(ax: Axes, x: Any, outputs: Any, *, target: Any = None, title: str = "") -> None:
    """Experts on a line: outputs (E, T) over x (T,) in expert colours, their mean in black, the target dotted."""
    x, outputs = np.ravel(x), np.asarray(outputs, dtype=float)
    for expert, color in enumerate(expert_colors(len(outputs))):
        ax.plot(x, outputs[expert], color=color, linewidth=1.2)
    ax.plot(x, outputs.mean(0), color=INK, linewidth=2.4, label="their mean")
    if target is not None:
        ax.plot(x, np.ravel(target), color=INK, linestyle=":", linewidth=1.4, label="target")
    ax.set(xlabel="x", title=title)


def draw_tracks(
    ax: Axes,
    tracks: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Distance over steps, a line for each way to make experts different.

    Args:
        ax: where.
        tracks: key of `START_STYLES` -> steps, values.
        marks: what happened -> step, as dotted verticals.
        title: of the axes.
    """
    for name, (steps, values) in tracks.items():
        ax.plot(steps, values, label=name, markevery=max(1, len(steps) // 6), markersize=5, **START_STYLES[name])
    for label, step in (marks or {}).items():
        ax.axvline(step, color=INK, linestyle=":", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -2), "textcoords": "offset points"}
        ax.annotate(label, (step, 1), va="top", fontsize=8, **place)
    ax.set(xlabel="optimiser step after the spawn", ylim=(-0.05, None), title=title)


def draw_states(
    ax: Axes,
    values: Mapping[str, Sequence[float]],
    *,
    formula: Sequence[float] | None = None,
    first: int = 1,
    log: bool = True,
    title: str = "",
) -> None:
    """One line for each optimiser state (`STATE_STYLES`) over steps; ``formula``: grey, for comparison.

    Args:
        ax: where.
        values: state -> one positive value per step.
        formula: one value per step.
        first: number of the first step.
        log: logarithmic values; else from 0.
        title: of the axes.
    """
    if formula is not None:
        steps = range(first, first + len(formula))
        ax.plot(steps, formula, color="#AAAAAA", linewidth=4, label="equation (5)", zorder=1)
    for state, numbers in values.items():
        ax.plot(range(first, first + len(numbers)), numbers, label=state, **STATE_STYLES[state])
    ax.set(xlabel="optimiser step after the spawn", title=title, **({"yscale": "log"} if log else {"ylim": (0, None)}))


def over_layers(result: Result, name: str) -> tuple[list[int], list[float]]:
    """Steps of the curve ``distances``, and the mean over mixtures of its column ``name``."""
    rows = result.curves["distances"]
    steps = sorted({row["step"] for row in rows})
    return steps, [float(np.mean([row[name] for row in rows if row["step"] == step])) for step in steps]


def _band(ax: Axes, curves: Sequence[tuple[Sequence[int], Sequence[float]]], style: Mapping[str, Any]) -> None:
    steps = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    values = np.array([[dict(zip(*curve, strict=True))[step] for step in steps] for curve in curves])
    ax.plot(steps, values.mean(0), markevery=max(1, len(steps) // 6), markersize=4, **style)
    ax.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)


def draw_runs(results: Mapping[str, Sequence[Result]], *, spawn: int | None = None) -> Figure:
    """Distance in parameters, in function, and validation loss over steps: mean over seeds, their range shaded.

    The distances of an "evomoe" run begin at the spawn (the other experts are not in use before). Loss: the rule of the
    phase without noise; thin: as the model will be used, with top-1, where the two differ.

    Args:
        results: key of `RUN_STYLES` -> one Result per seed.
        spawn: step, marked by a dotted line.
    """
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.2))
    for gate, runs in results.items():
        style = RUN_STYLES[gate]
        first = spawn if gate == "evomoe" and spawn else 0
        for ax, name in zip(axes, ("parameter", "function"), strict=False):
            curves = [over_layers(run, name) for run in runs]
            kept = [
                tuple(zip(*((s, v) for s, v in zip(*curve, strict=True) if s >= first), strict=True))
                for curve in curves
            ]
            _band(ax, kept, style)
        rows = [run.curves["epochs"] for run in runs]
        matched, used = (
            [([row["step"] for row in table], [row[name] for row in table]) for table in rows]
            for name in ("valid_matched", "valid_loss")
        )
        _band(axes[2], matched, style)
        steps = [step for step in used[0][0] if all(step in curve[0] for curve in used)]
        mean = np.mean([[dict(zip(*curve, strict=True))[step] for step in steps] for curve in used], axis=0)
        axes[2].plot(steps, mean, color=style["color"], linewidth=0.9, linestyle=style["linestyle"])
    for ax, title in zip(
        axes, ("1 − cosine of parameters", "distance in function", "validation loss (nats)"), strict=True
    ):
        ax.set(xlabel="optimiser step", title=title)
        if spawn:
            ax.axvline(spawn, color=INK, linestyle=":", linewidth=1)
    for ax in axes[:2]:
        ax.set_ylim(0, None)
    if spawn:
        axes[0].annotate("spawn", (spawn, 0.5), xycoords=("data", "axes fraction"), xytext=(3, 0), fontsize=8,
                         textcoords="offset points")  # fmt: skip
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    plt.close(figure)
    return figure


def draw_differences(
    ax: Axes, differences: Mapping[str, Sequence[float]], *, xlabel: str = "", title: str = ""
) -> None:
    """A row per setting, a dot per seed, a bar at the mean; 0 is no difference."""
    for row, numbers in enumerate(differences.values()):
        ax.plot(numbers, [row] * len(numbers), "o", color=RUN_STYLES["evomoe"]["color"], markersize=6, alpha=0.7)
        ax.vlines(np.mean(numbers), row - 0.3, row + 0.3, color=INK, linewidth=2)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set(yticks=range(len(differences)), yticklabels=list(differences), xlabel=xlabel, title=title)
    ax.set_ylim(len(differences) - 0.5, -0.5)
    ax.grid(False, axis="y")


def experts_chart(chart: Chart, x: Any, outputs: Any, *, mixture: Any, target: Any, weights: Any = None) -> None:
    """As `draw_functions`, on a sheet: outputs (E, T), mixture (T,), target (T,) over x (T,).

    ``weights`` (T, E): experts are thick where theirs is the largest weight.
    """
    x, outputs = np.ravel(x), np.asarray(outputs, dtype=float)
    main = None if weights is None else np.asarray(weights).argmax(1)
    for expert, color in enumerate(expert_colors(len(outputs))):
        chart.line(x, outputs[expert], color=color, linewidth=1.1)
        if main is not None and (main == expert).any():
            chart.line(x, np.where(main == expert, outputs[expert], np.nan), color=color, linewidth=4)
    chart.line(x, np.ravel(mixture), color=INK, linewidth=1.6)
    chart.line(x, np.ravel(target), color=INK, linewidth=1.4, linestyle=":")


def distance_table(ax: Axes, box: Box, distances: Any, *, title: str = "") -> None:
    """Distances (E, E) as shades from 0 to `FAR` with numbers (up to 10 experts) in a box of a sheet."""
    distances = np.asarray(distances, dtype=float)
    n = len(distances)
    x, y, width, height = box
    ax.imshow(distances, vmin=0, vmax=FAR, cmap="Blues", extent=(x, x + width, y, y + height), aspect="auto")
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim(), autoscale_on=False)
    ax.plot((x, x + width, x + width, x, x), (y, y, y + height, y + height, y), color=INK, linewidth=0.8)
    for (row, column), value in np.ndenumerate(distances) if n <= 10 else ():
        if row != column:
            place = (x + (column + 0.5) * width / n, y + height - (row + 0.5) * height / n)
            ax.text(*place, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if value > 0.9 else INK)
    for expert in range(n):
        ax.text(x + (expert + 0.5) * width / n, y - 0.05, str(expert), ha="center", va="top", fontsize=8)
        ax.text(x - 0.05, y + height - (expert + 0.5) * height / n, str(expert), ha="right", va="center", fontsize=8)
    ax.text(x + width / 2, y - 0.2, "expert", ha="center", va="top", fontsize=9)
    ax.text(x, y + height + 0.08, title, va="bottom", fontsize=10)
