"""Draw what gates do: weights of a few tokens, weights over training, how many experts are in use.

Used in notebooks 00 to 02. Legend: T tokens, E experts, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_lab.plots.sheet import INK
from moe_lab.plots.style import expert_colors, gate_color, gate_style
from moe_lab.results import Result


def draw_weights(ax: Axes, weights: Any, *, title: str = "") -> None:
    """A table of combine weights (T, E) as shades, numbers written in; exact zeros are left empty.

    So a weight of 0.004 reads "0.00" and a zero reads nothing: the difference decides whether an expert runs.
    """
    weights = np.asarray(weights, dtype=float)
    shown = np.ma.masked_equal(weights, 0)
    ax.imshow(shown, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (token, expert), weight in np.ndenumerate(weights):
        if weight != 0:
            color = "white" if weight > 0.6 else INK
            ax.text(expert, token, f"{weight:.2f}", ha="center", va="center", fontsize=8, color=color)
    n_tokens, n_experts = weights.shape
    ax.set(xticks=range(n_experts), yticks=range(n_tokens), xlabel="expert", ylabel="token", title=title)
    ax.set_xticks(np.arange(n_experts + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n_tokens + 1) - 0.5, minor=True)
    ax.grid(False)
    ax.grid(True, which="minor", color="#DDDDDD", alpha=1)
    ax.tick_params(which="both", length=0)


def draw_weights_over_time(ax: Axes, weights: Any, *, title: str = "") -> None:
    """The weights (S, E) of one token stacked over steps, in expert colours; rows that sum to 1 fill the picture."""
    weights = np.asarray(weights, dtype=float)
    ax.stackplot(np.arange(len(weights)), weights.T, colors=expert_colors(weights.shape[1]), linewidth=0)
    for expert, weight in enumerate(weights[-1]):
        if weight > 0.04:
            height = weights[-1][:expert].sum() + weight / 2
            ax.annotate(f"{expert}", (len(weights) * 1.02, height), va="center", fontsize=9, annotation_clip=False)
    ax.set(xlim=(0, len(weights)), ylim=(0, 1), xlabel="step", ylabel="weight", title=title)
    ax.grid(False)


def draw_load(ax: Axes, load: Any, *, title: str = "") -> None:
    """Load (E,) as bars in expert colours, the fair share 1/E as a line."""
    load = np.asarray(load, dtype=float)
    ax.bar(range(len(load)), load, color=expert_colors(len(load)), edgecolor=INK, linewidth=0.6)
    ax.axhline(1 / len(load), color=INK, linewidth=1, linestyle="--")
    ax.set(xticks=range(len(load)), xlabel="expert", ylabel="share of pairs", title=title)
    ax.grid(False, axis="x")


def draw_confusion(ax: Axes, confusion: Any, *, title: str = "") -> None:
    """Who gets whom: of each planted cluster (row), the share of its tokens that goes to each expert (column)."""
    confusion = np.asarray(confusion, dtype=float)
    ax.imshow(confusion / confusion.sum(1, keepdims=True).clip(1), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    n_clusters, n_experts = confusion.shape
    ax.set(xticks=range(n_experts), yticks=range(n_clusters), xlabel="expert", ylabel="planted cluster", title=title)
    ax.grid(False)


def draw_per_seed(ax: Axes, values: Mapping[str, Sequence[float]], *, xlabel: str, title: str = "") -> None:
    """One row per gate, a dot per seed, the mean as a bar: differences beside their spread.

    A label is a `build_gate` name, or begins with one ("topk, noise").
    """
    for row, (label, numbers) in enumerate(values.items()):
        color = gate_color(label.split(",")[0])
        ax.barh(row, np.mean(numbers), color=color, alpha=0.35, height=0.6)
        ax.plot(numbers, np.full(len(numbers), row), "o", color=color, markeredgecolor=INK, markersize=6)
    ax.set(yticks=range(len(values)), yticklabels=list(values), xlabel=xlabel, title=title)
    ax.set_ylim(len(values) - 0.5, -0.5)  # the first on top; axes that share it may both say so
    ax.grid(False, axis="y")


def draw_cost(ax: Axes, results: Mapping[str, Sequence[Result]], *, cost: str, metric: str) -> None:
    """A point per run: ``metric`` over ``cost`` (names of metrics).

    A label is a gate's name, or begins with one; further variants of the same gate are hollow, then cross-filled.
    """
    seen: list[str] = []
    for label, runs in results.items():
        gate = label.split(",")[0]
        style = gate_style(gate) | {"linestyle": "none", "label": label, "markersize": 7, "markeredgewidth": 1.5}
        style["fillstyle"] = ("full", "none", "left")[min(seen.count(gate), 2)]
        seen.append(gate)
        ax.plot([run.metrics[cost] for run in runs], [run.metrics[metric] for run in runs], **style)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_used_experts(
    ax: Axes, used: Mapping[float, Sequence[int]], n_experts: int, *, color: str = "#0072B2", title: str = ""
) -> None:
    """Experts in use against gamma: a dot per seed (spread sideways a little), a line through the means.

    Args:
        ax: where.
        used: gamma -> number of experts in use, one per seed.
        n_experts: E, drawn as the ceiling.
        color: of dots and line.
        title: of the axes.
    """
    gammas = sorted(used)
    ax.plot(gammas, [np.mean(used[gamma]) for gamma in gammas], color=color, linewidth=1.2)
    for gamma in gammas:
        aside = gamma * 10 ** np.linspace(-0.08, 0.08, len(used[gamma]))
        ax.plot(aside, used[gamma], "o", color=color, markeredgecolor=INK, markersize=6)
    ax.axhline(n_experts, color=INK, linewidth=0.8, linestyle="--")
    ax.set(xscale="log", ylim=(0, n_experts + 0.6), xlabel="γ", ylabel="experts in use", title=title)
