"""Figures of the dense-to-sparse gate: schedules, who passes the threshold, losses by rule, tokens over training.

Draws numbers and Results of `moe_lab.experiments.evomoe_language`, computes nothing. Taught in notebook 09.
Legend: S moments of training, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.gates.schedules import TemperatureSchedule
from moe_lab.plots.sheet import INK, Box, sheet
from moe_lab.results import Result
from moe_lab.results.plain import to_plain

LINES = ("-", "--", ":", "-.")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_FREE = ("seed", "device")  # fields of a config that do not make another experiment
_ABLATED = ("noise", "weights_from", "threshold", "tau_end", "soft_share", "hard_share")


def _style(place: int) -> dict[str, Any]:
    return {"color": COLORS[place % len(COLORS)], "linestyle": LINES[place % len(LINES)]}


def draw_temperatures(ax: Axes, schedules: Mapping[str, TemperatureSchedule], n_steps: int, *, title: str = "") -> None:
    """tau over the steps 0 .. n_steps, a line per schedule."""
    steps = np.arange(n_steps + 1)
    for place, (name, schedule) in enumerate(schedules.items()):
        ax.plot(steps, [schedule(int(step)) for step in steps], label=name, **_style(place))
    ax.set(xlabel="step", ylabel="temperature τ", ylim=(0, None), title=title)
    ax.legend(fontsize=9)


def draw_mean_experts(
    ax: Axes, taus: Sequence[float], curves: Mapping[str, Sequence[float]], n_experts: int, *, title: str = ""
) -> None:
    """Mean experts per token over the temperature, which falls from left to right; a line per entry of ``curves``."""
    for place, (name, values) in enumerate(curves.items()):
        ax.plot(taus, values, label=name, marker=".", markersize=5, **_style(place))
    ax.axhline(1, color=INK, linewidth=0.7)
    ax.set(xscale="log", xlabel="temperature τ (falling)", ylabel="experts per token", title=title)
    ax.set(xlim=(max(taus) * 1.08, min(taus) / 1.08), ylim=(0, n_experts * 1.04))
    ax.set_yticks(sorted({1, n_experts // 4, n_experts // 2, n_experts} - {0}))
    ticks = [tau for tau in (5, 2, 1, 0.5, 0.3, 0.1, 0.05) if min(taus) <= tau <= max(taus)]
    ax.set_xticks(ticks, [f"{tau:g}" for tau in ticks])
    ax.set_xticks([], minor=True)
    ax.legend(fontsize=9)


def mark_phases(ax: Axes, config: Mapping[str, Any]) -> None:
    """Grey where the temperature falls; a line at the hard switch. ``config``: of a Result."""
    steps = config["steps"]
    shared = round(config["shared_share"] * steps) if config["gate"] == "evomoe" else 0
    ax.axvspan(shared, shared + config["soft_share"] * steps, color="#BBBBBB", alpha=0.3, linewidth=0)
    if config["hard_share"] < 1:
        ax.axvline(shared + config["hard_share"] * steps, color=INK, linewidth=0.8)


def draw_experts_over_training(ax: Axes, results: Mapping[str, Result], *, title: str = "") -> None:
    """Experts per token in training, each value the mean over the steps since the one before; name -> Result."""
    for place, (name, result) in enumerate(results.items()):
        rows = result.curves["epochs"]
        steps, experts = [row["step"] for row in rows], [row["train_experts"] for row in rows]
        ax.stairs(experts, [0, *steps], baseline=None, label=name, linewidth=1.8, **_style(place))
    config = next(iter(results.values())).config
    mark_phases(ax, config)
    ax.axhline(1, color=INK, linewidth=0.7)
    ax.set(xlabel="step", ylabel="experts per token", ylim=(0, config["n_experts"] * 1.05), title=title)
    ax.legend(fontsize=9)


def draw_losses_by_rule(ax: Axes, results: Mapping[str, Result], *, title: str = "") -> None:
    """Validation loss with one expert (solid) and by the rule of the phase (dashed) over the steps; name -> Result."""
    for place, (name, result) in enumerate(results.items()):
        rows = result.curves["epochs"]
        steps, color = [row["step"] for row in rows], COLORS[place % len(COLORS)]
        for field, line, rule in (("valid_loss", "-", "one expert"), ("valid_matched", "--", "rule of the phase")):
            ax.plot(steps, [row[field] for row in rows], color=color, linestyle=line, label=f"{name}, {rule}")
    mark_phases(ax, next(iter(results.values())).config)
    ax.set(xlabel="step", ylabel="validation loss (nats per token)", title=title)
    ax.legend(fontsize=8)


def draw_price_of_one(ax: Axes, results: Mapping[str, Result], *, title: str = "") -> None:
    """Validation loss with one expert minus that by the rule of the phase, over the steps; name -> Result."""
    for place, (name, result) in enumerate(results.items()):
        rows = result.curves["epochs"]
        gap = [row["valid_loss"] - row["valid_matched"] for row in rows]
        ax.plot([row["step"] for row in rows], gap, marker=".", label=name, **_style(place))
    mark_phases(ax, next(iter(results.values())).config)
    ax.axhline(0, color=INK, linewidth=0.7)
    ax.set(xlabel="step", ylabel="difference (nats per token)", title=title)
    ax.legend(fontsize=8)


def draw_token(
    ax: Axes, box: Box, weights: Any, *, title: str = "", largest: float = 1.0, switch: float | None = None
) -> None:
    """Weights (S, E) of one token in a box of a sheet: time to the right, experts downwards, white where none runs.

    Args:
        ax: the sheet.
        box: x, y, width, height.
        weights: exact zeros are experts that do not run; the smallest other weight is visibly blue.
        title: above the box.
        largest: weight of the darkest blue.
        switch: where the hard phase begins, as a share of the width; None: nowhere.
    """
    values = np.ma.masked_equal(np.asarray(weights, dtype=float), 0).T
    x, y, width, height = box
    shades = {"cmap": "Blues", "vmin": -0.3 * largest, "vmax": largest}
    ax.imshow(values, extent=(x, x + width, y, y + height), aspect="auto", interpolation="nearest", zorder=1, **shades)
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim(), autoscale_on=False)
    ax.plot((x, x + width, x + width, x, x), (y, y, y + height, y + height, y), color=INK, linewidth=0.8)
    if switch is not None and 0 <= switch <= 1:
        ax.plot((x + switch * width,) * 2, (y, y + height), color=INK, linewidth=1, linestyle=":")
    for expert in (0, values.shape[0] - 1):
        place = y + height * (1 - (expert + 0.5) / values.shape[0])
        ax.text(x - 0.05, place, str(expert), ha="right", va="center", fontsize=8)
    ax.text(x, y + height + 0.05, title, va="bottom", fontsize=9)


def draw_scale(ax: Axes, box: Box, largest: float) -> None:
    """What the shades of `draw_token` mean, as an upright strip."""
    x, y, width, height = box
    strip = np.linspace(largest, 0, 64)[:, None]
    shades = {"cmap": "Blues", "vmin": -0.3 * largest, "vmax": largest}
    ax.imshow(strip, extent=(x, x + width, y, y + height), aspect="auto", zorder=1, **shades)
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim(), autoscale_on=False)
    for value in (0.0, largest):
        ax.text(x + width + 0.05, y + height * value / largest, f"{value:.2g}", va="center", fontsize=8)
    ax.text(x, y + height + 0.07, "weight", va="bottom", fontsize=8)
    ax.text(x, y - 0.12, "white:\nnot run", va="top", fontsize=8)


def token_weights(weights: Any, steps: Sequence[int], labels: Sequence[str], *, switch: int | None = None) -> Figure:
    """A map per token (`draw_token`), four in a row.

    Args:
        weights: (S, T, E).
        steps: S of them, evenly spaced; written below.
        labels: T titles.
        switch: step of the hard switch, a dotted line.
    """
    weights = np.asarray(weights, dtype=float)
    n_columns = min(4, len(labels))
    n_rows = -(-len(labels) // n_columns)
    figure, ax = sheet(2.35 * n_columns + 0.9, 1.75 * n_rows + 0.25)
    largest = float(weights.max())
    share = None if switch is None else (switch - steps[0]) / max(1, steps[-1] - steps[0])
    for token, label in enumerate(labels):
        row, column = divmod(token, n_columns)
        x, y = 0.35 + 2.35 * column, 1.75 * (n_rows - 1 - row) + 0.4
        draw_token(ax, (x, y, 2.0, 1.2), weights[:, token], title=label, largest=largest, switch=share)
        for step, place, side in ((steps[0], x, "left"), (steps[-1], x + 2.0, "right")):
            ax.text(place, y - 0.05, f"step {step}" if side == "left" else str(step), ha=side, va="top", fontsize=8)
    draw_scale(ax, (2.35 * n_columns + 0.3, 1.75 * (n_rows - 1) + 0.55, 0.13, 0.9), largest)
    return figure


def by_change(results: Iterable[Result], base: Any) -> dict[str, list[Result]]:
    """Results that differ from ``base`` in fields of the gate only, by what they changed; "(base)" comes first.

    Args:
        results: of any configs; those that differ in anything else are left out.
        base: a config (dataclass or mapping); its seed does not matter.

    Returns:
        "noise = always, weights_from = gumbel" -> Results, by seed; empty if nothing fits.
    """
    plain = to_plain(base, "base")
    groups: dict[tuple, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed or 0):
        if set(result.config) != set(plain):
            continue
        changed = {name: value for name, value in result.config.items() if value != plain[name] and name not in _FREE}
        if set(changed) <= set(_ABLATED):
            groups.setdefault(tuple((name, changed[name]) for name in _ABLATED if name in changed), []).append(result)

    def place(change: tuple) -> list[tuple]:
        return [(_ABLATED.index(name), isinstance(value, str), value) for name, value in change]

    def label(change: tuple) -> str:
        parts = (f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:g}" for name, value in change)
        return ", ".join(parts) or "(base)"

    return {label(change): groups[change] for change in sorted(groups, key=place)}


def paired(groups: Mapping[str, Sequence[Result]], metric: str, base: str = "(base)") -> dict[str, list[float]]:
    """Label -> ``metric`` minus that of the group ``base``, one value per seed that both have."""
    reference = {result.seed: result.metrics[metric] for result in groups[base]}
    return {
        label: [result.metrics[metric] - reference[result.seed] for result in runs if result.seed in reference]
        for label, runs in groups.items()
    }


def ablations(groups: Mapping[str, Sequence[Result]], *, base: str = "(base)") -> Figure:
    """Left: test loss minus that of the base, seed by seed, a dot per seed and a bar for the mean. Right: experts."""
    differences = paired(groups, "test_loss", base)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 0.42 * len(groups) + 1.1), sharey=True, width_ratios=(3, 2)
    )
    rows = range(len(groups))
    for row, (label, runs) in enumerate(groups.items()):
        values = differences[label]
        if values:
            left.barh(row, np.mean(values), height=0.6, color="#0072B2", alpha=0.35)
            left.plot(values, [row] * len(values), "o", color="#0072B2", markeredgecolor=INK, markersize=5)
        experts = [result.metrics["experts_per_token"] for result in runs]
        right.barh(row, np.mean(experts), height=0.6, color="#E69F00", alpha=0.45)
        right.plot(experts, [row] * len(experts), "D", color="#E69F00", markeredgecolor=INK, markersize=4)
    left.axvline(0, color=INK, linewidth=0.8)
    left.set(yticks=list(rows), yticklabels=list(groups), xlabel="test loss − base (nats per token)")
    left.set(ylim=(len(groups) - 0.5, -0.5), title="right of 0: worse than the base")
    right.set(xlabel="experts per token (mean)", xlim=(0, None), title="what it costs")
    for ax in (left, right):
        ax.grid(False, axis="y")
    plt.close(figure)
    return figure
