"""Results as pictures: scores with their spread, curves over epochs, who gets the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moe_lab.plots.style import expert_colors, gate_color, gate_style
from moe_lab.results import Result


def _by_gate(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.config["gate"], []).append(result)
    return groups


def draw_scores(
    ax: Axes, results: Sequence[Result], metric: str, *, baselines: Mapping[str, float], title: str
) -> None:
    """One dot per seed, a bar at the mean of each gate, dotted lines for ``baselines`` (label -> value)."""
    groups = _by_gate(results)
    for place, (gate, runs) in enumerate(groups.items()):
        values = [run.metrics[metric] for run in runs]
        style = {"color": gate_color(gate), "markerfacecolor": "white" if gate.endswith("+") else gate_color(gate)}
        ax.plot([place] * len(values), values, "o", markersize=5, **style)
        ax.hlines(np.mean(values), place - 0.3, place + 0.3, color=gate_color(gate), linewidth=2)
    for label, value in baselines.items():
        ax.axhline(value, color="#222222", linestyle=":", linewidth=1)
        ax.text(-0.45, value, f"{label} {value:.3f}", va="bottom", fontsize=8)
    ax.set_xticks(range(len(groups)), list(groups), rotation=40, ha="right")
    ax.set(title=title, xlim=(-0.5, len(groups) - 0.5))
    ax.grid(axis="x", visible=False)


def draw_curve(ax: Axes, results: Sequence[Result], column: str, *, task: str | None = None, title: str) -> None:
    """Mean over seeds per gate against epochs, the range over seeds shaded.

    Args:
        column: of ``curves["epochs"]``, or of ``curves["routing"]`` if ``task`` is given.
        task: "watch" or "rating".
    """
    for gate, runs in _by_gate(results).items():
        curves = []
        for run in runs:
            rows = [r for r in run.curves["routing"] if r["task"] == task] if task else run.curves["epochs"]
            curves.append({row["epoch"]: row[column] for row in rows if column in row})
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not epochs:
            continue
        values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        ax.plot(epochs, values.mean(0), **gate_style(gate), markersize=3)
        if len(values) > 1:
            ax.fill_between(epochs, values.min(0), values.max(0), color=gate_color(gate), alpha=0.15, linewidth=0)
    ax.set(xlabel="epoch", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_importance(ax: Axes, result: Result, task: str, *, title: str) -> None:
    """Mean weight of each expert against epochs, stacked: the bands of expert colours fill the unit interval.

    Experts that end with 8 % or more have their number beside their band.
    """
    rows = [row for row in result.curves["routing"] if row["task"] == task]
    shares = np.array([row["importance"] for row in rows]).T
    ax.stackplot([row["epoch"] for row in rows], shares, colors=expert_colors(len(shares)), linewidth=0)
    tops = shares[:, -1].cumsum()
    for expert, (top, share) in enumerate(zip(tops, shares[:, -1], strict=True)):
        if share >= 0.08:
            ax.text(1.02, top - share / 2, str(expert), transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set(xlabel="epoch", ylim=(0, 1), xlim=(rows[0]["epoch"], rows[-1]["epoch"]), title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=False)
