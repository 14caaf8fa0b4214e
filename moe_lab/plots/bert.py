"""Figures of notebook 07: importance and deletion, what a cut leaves, scores of gates, time, and where words go.

Draws Results of `moe_lab.experiments.comet_bert` and computes nothing.
Legend: F hidden neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe_lab.bench.timing import Timing
from moe_lab.plots.sheet import INK, draw_table, sheet
from moe_lab.plots.style import expert_colors, gate_style
from moe_lab.results import Result

_WITHOUT_ROUTING = {"teacher": (INK, "*"), "pruned": ("#7A7A7A", "s"), "all": ("#692D00", "v")}
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def bert_style(gate: str) -> dict[str, str]:
    """Keyword arguments of `Axes.plot`: like `gate_style`, and for what does not route."""
    if gate in _WITHOUT_ROUTING:
        color, marker = _WITHOUT_ROUTING[gate]
        return {"color": color, "marker": marker, "linestyle": "-", "label": gate}
    return gate_style(gate)


def draw_effects(ax: Axes, importance: Sequence[Any], effects: Sequence[Any], *, title: str = "") -> None:
    """What importance predicts against what deleting a neuron really does, a mark per neuron, logarithmic.

    Args:
        ax: where.
        importance: per layer (F,).
        effects: per layer (F,), mean absolute changes of the loss.
        title: of the axes.
    """
    importance, effects = ([np.asarray(values) for values in each] for each in (importance, effects))
    for layer, (predicted, real) in enumerate(zip(importance, effects, strict=True)):
        style = {"marker": _MARKERS[layer % 4], "linestyle": "none", "markersize": 4, "alpha": 0.8}
        ax.plot(predicted, real, label=f"layer {layer}", **style)
    ends = np.array([min(map(np.min, importance)), max(map(np.max, importance))])
    for share, line, label in ((1.0, "-", "equal"), (0.5, "--", "half")):
        ax.plot(ends, share * ends, color=INK, linewidth=1, linestyle=line, label=label)
    ax.set(xscale="log", yscale="log", title=title)
    ax.set(xlabel="importance (nats)", ylabel="change of loss when deleted (nats)")
    ax.legend(fontsize=8)


def draw_kept(ax: Axes, kept: Mapping[str, Mapping[int, float]], *, whole: float, title: str = "") -> None:
    """Accuracy over the number of neurons that each layer keeps, a line per order of the neurons.

    Args:
        ax: where.
        kept: name of the order -> neurons -> accuracy.
        whole: the teacher's, dotted.
        title: of the axes.
    """
    ax.axhline(whole, color=INK, linestyle=":", linewidth=1, label="teacher")
    for place, (name, values) in enumerate(kept.items()):
        style = {"linestyle": _LINES[place % 4], "marker": _MARKERS[place % 4], "markersize": 4}
        ax.plot(list(values), list(values.values()), label=name, **style)
    widths = sorted({width for values in kept.values() for width in values})
    ax.set(xscale="log", xlabel="neurons kept per layer", ylabel="accuracy", title=title)
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(fontsize=8)


def draw_scores(
    ax: Axes,
    groups: Mapping[str, Sequence[Result]],
    metric: str = "test_score",
    *,
    lines: Mapping[str, float] | None = None,
    title: str = "",
    ylabel: str = "accuracy",
) -> None:
    """A mark per run, a bar at the mean of each group; dotted: ``lines`` (label -> value).

    Args:
        ax: where.
        groups: label -> Results of one setting; runs of several teachers stand beside each other, in their order.
        metric: of a Result; those without it are left out.
        lines: values without a run.
        title, ylabel: of the axes.
    """
    teachers = sorted({_teacher(run) for runs in groups.values() for run in runs})
    for place, runs in enumerate(groups.values()):
        measured = [run for run in runs if metric in run.metrics]
        values = [run.metrics[metric] for run in measured]
        if not values:
            continue
        style = bert_style(runs[0].config["gate"])
        x = [place + _beside(teachers.index(_teacher(run)), len(teachers)) for run in measured]
        ax.plot(x, values, style["marker"], color=style["color"], markersize=6, alpha=0.8)
        ax.hlines(np.mean(values), place - 0.3, place + 0.3, color=style["color"], linewidth=2)
    for label, value in (lines or {}).items():
        ax.axhline(value, color=INK, linestyle=":", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 2), "textcoords": "offset points"}
        ax.annotate(label, (1, value), ha="right", va="bottom", fontsize=8, **place)
    ax.set_xticks(range(len(groups)), list(groups), rotation=35, ha="right", rotation_mode="anchor")
    ax.set(title=title, ylabel=ylabel, xlim=(-0.5, len(groups) - 0.5))
    ax.grid(axis="x", visible=False)


def _teacher(run: Result) -> int:
    return run.config.get("teacher_seed", 0)


def _beside(index: int, count: int) -> float:
    """Where the ``index``-th of ``count`` things that share a place stands, from its middle."""
    return 0.22 * (index - (count - 1) / 2)


def draw_pairs(ax: Axes, tables: Mapping[str, pd.DataFrame], *, title: str = "", ylabel: str = "points") -> None:
    """Differences of paired runs: a mark per pair, one kind for each teacher; bars at the teachers' means.

    Args:
        ax: where.
        tables: label -> a row per teacher, a column per seed (`comet_bert_tables.pairs`), in the unit of ``ylabel``.
        title, ylabel: of the axes.
    """
    teachers = sorted({teacher for table in tables.values() for teacher in table.index})
    colors = expert_colors(len(teachers))
    ax.axhline(0, color=INK, linewidth=1)
    for place, table in enumerate(tables.values()):
        for index, teacher in enumerate(teachers):
            if teacher not in table.index:
                continue
            x, values = place + _beside(index, len(teachers)), table.loc[teacher].dropna()
            label = f"teacher {teacher}" if place == 0 else "_"
            style = {"color": colors[index], "marker": _MARKERS[index % 4], "linestyle": "none", "label": label}
            ax.plot([x] * len(values), values, markersize=5.5, alpha=0.8, **style)
            ax.hlines(values.mean(), x - 0.1, x + 0.1, color=INK, linewidth=2)
    ax.set_xticks(range(len(tables)), list(tables), fontsize=9)
    ax.set(title=title, ylabel=ylabel, xlim=(-0.5, len(tables) - 0.5))
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8)


def draw_costs(ax: Axes, tables: Mapping[str, pd.DataFrame], *, title: str = "") -> None:
    """Costs of students as multiples of their teacher's, logarithmic: a mark at the median, a line from least to most.

    Args:
        ax: where.
        tables: label -> a row per run, a column per kind of cost (`comet_bert_tables.relative_costs`).
        title: of the axes.
    """
    kinds = list(dict.fromkeys(name for table in tables.values() for name in table))
    colors = expert_colors(len(kinds))
    ax.axvline(1, color=INK, linestyle=":", linewidth=1)
    for place, table in enumerate(tables.values()):
        for index, kind in enumerate(kinds):
            if kind not in table:
                continue
            y, values = place + _beside(index, len(kinds)), table[kind].dropna()
            label = kind if place == 0 else "_"
            ax.hlines(y, values.min(), values.max(), color=colors[index], linewidth=1.5)
            ax.plot(values.median(), y, _MARKERS[index % 4], color=colors[index], markersize=6, label=label)
    ticks = [0.5, 1, 2, 4, 8]
    ax.set(xscale="log", xlabel="times the teacher's", title=title)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(range(len(tables)), list(tables))
    ax.set_ylim(len(tables) - 0.5, -0.5)  # the first on top
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=8)


def draw_experts(ax: Axes, results: Sequence[Result], *, title: str = "") -> None:
    """Mean experts per token on validation sentences over the steps of distillation, mean over layers.

    Args:
        ax: where.
        results: students; those of one gate have one colour, and one entry in the legend.
        title: of the axes.
    """
    named: set[str] = set()
    for result in results:
        gate = result.config["gate"]
        rows = result.curves["routing"]
        steps = sorted({row["step"] for row in rows})
        mean = [np.mean([row["experts_mean"] for row in rows if row["step"] == step]) for step in steps]
        style = bert_style(gate)
        style["label"] = "_" if gate in named else gate
        named.add(gate)
        ax.plot(steps, mean, markersize=4, **style)
    ax.set(xlabel="optimiser step", ylabel="experts per token", ylim=(0, None), title=title)
    ax.legend(fontsize=8, **({"ncols": 2, "loc": "lower right"} if len(named) > 3 else {}))  # below one expert


def draw_latencies(panels: Mapping[str, Mapping[str, Timing]]) -> Figure:
    """Processor milliseconds of a forward pass: bars at the medians, whiskers from first to third quartile.

    Args:
        panels: title -> name of the model -> timing.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(9.6, 2.4), squeeze=False)
    for ax, (title, timings) in zip(axes[0], panels.items(), strict=True):
        for place, (name, timing) in enumerate(timings.items()):
            low, middle, high = 1e3 * np.quantile(timing.cpu, [0.25, 0.5, 0.75])
            ax.barh(place, middle, height=0.6, color=bert_style(name)["color"], alpha=0.75)
            ax.hlines(place, low, high, color=INK, linewidth=1.5)
            ax.annotate(f" {middle:.3g}", (high, place), va="center", fontsize=8)
        ax.set_yticks(range(len(timings)), list(timings))
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="ms of processor time")
        ax.grid(axis="y", visible=False)
    plt.close(figure)
    return figure


def draw_words(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Heat maps side by side: rows are words or classes of words, columns experts, the shade a share of the row.

    Args:
        tables: title -> shares; the rows of all are those of the first.
    """
    first = next(iter(tables.values()))
    left, width, row, gap = 1.5, 1.75, 0.25, 0.25
    height = len(first) * row
    figure, ax = sheet(left + len(tables) * (width + gap) + 0.1, height + 0.75)
    for place, name in enumerate(first.index):
        ax.text(left - 0.1, 0.4 + height - (place + 0.5) * row, str(name), ha="right", va="center", fontsize=9)
    for column, (title, table) in enumerate(tables.items()):
        x = left + column * (width + gap)
        draw_table(ax, (x, 0.4, width, height), table.loc[first.index], numbers=True, title=title)
        for place, expert in enumerate(table.columns):
            middle = x + (place + 0.5) * width / len(table.columns)
            ax.text(middle, 0.34, str(expert), ha="center", va="top", fontsize=9)
        ax.text(x + width / 2, 0.16, "expert", ha="center", va="top", fontsize=9)
    return figure
