"""Figures of the vision experiment: images and where they go, classes and experts, accuracy and cost, freezing trees.

Draws Results of `moe_lab.experiments.comet_vision`, computes nothing. Taught in notebook 04.
Legend: N images, E experts, K trees, Y classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.plots.sheet import INK, Box, sheet
from moe_lab.plots.style import GATE_COLORS, expert_colors, gate_style
from moe_lab.plots.trees import left_to_right_leaves
from moe_lab.results import Result

_BASELINES = {"one_expert": ("*", "one expert"), "expert_per_task": ("p", "an expert per task")}


def vision_style(gate: str) -> dict[str, str]:
    """Like `gate_style`, and for the baselines without routing: black stars and pentagons."""
    if gate in _BASELINES:
        marker, label = _BASELINES[gate]
        return {"color": INK, "marker": marker, "linestyle": ":", "label": label}
    return gate_style(gate)


def reach_of_leaves(leaves: Any) -> np.ndarray:
    """(2E - 1,) probability of arriving at every node, heap order, from that of the E leaves, left to right.

    A split is reached by whatever reaches the leaves below it.
    """
    leaves = np.asarray(leaves, dtype=float)
    n_experts = len(leaves)
    reach = np.zeros(2 * n_experts - 1)
    reach[left_to_right_leaves(n_experts)] = leaves
    for node in reversed(range(n_experts - 1)):
        reach[node] = reach[2 * node + 1] + reach[2 * node + 2]
    return reach


def _picture(ax: Axes, box: Box, image: Any) -> None:
    x, y, width, height = box
    ax.imshow(np.asarray(image), cmap="gray_r", extent=(x, x + width, y, y + height), aspect="auto")


def stacked_weights(ax: Axes, box: Box, weights: Any) -> None:
    """One bar from left to right, cut into the experts' shares; shares above 15 % carry the expert's number."""
    x, y, width, height = box
    colors = expert_colors(len(weights))
    for expert, weight in enumerate(weights):
        if weight > 0:
            ax.fill_between((x, x + weight * width), y, y + height, color=colors[expert], edgecolor=INK, linewidth=0.5)
        if weight > 0.15:
            light = sum(int(colors[expert][i : i + 2], 16) for i in (1, 3, 5)) > 330
            middle = (x + weight * width / 2, y + height / 2)
            ax.text(*middle, str(expert), ha="center", va="center", fontsize=8, color=INK if light else "white")
        x += max(weight, 0) * width


def routed_images(
    images: Tensor, labels: Tensor, weights: Mapping[str, Mapping[str, Any]], task_titles: Mapping[str, str]
) -> Figure:
    """A row of images; below each, for every gate and task, the shares of the experts.

    Args:
        images: (N, 1, H, W).
        labels: (N, tasks), written above the images.
        weights: gate -> task -> (N, E) rows of combine weights.
        task_titles: task -> how to call it in the figure.
    """
    n_images, side, gap, bar = len(images), 0.86, 0.12, 0.2
    rows = [(gate, task) for gate in weights for task in weights[gate]]
    left, top = 1.75, 0.3
    height = top + side + 0.1 + sum(bar + 0.07 for _ in rows) + 0.12 * len(weights)
    figure, ax = sheet(left + n_images * (side + gap), height)
    for column in range(n_images):
        x = left + column * (side + gap)
        _picture(ax, (x, height - top - side, side, side), images[column, 0])
        ax.text(
            x + side / 2, height - top + 0.05, " ".join(map(str, labels[column].tolist())), ha="center", fontsize=10
        )
    y = height - top - side - 0.1
    for place, (gate, task) in enumerate(rows):
        if place == 0 or rows[place - 1][0] != gate:
            y -= 0.12 if place else 0.0
            ax.text(0.03, y - bar / 2, gate, va="center", fontsize=9, fontweight="bold")
        y -= bar
        ax.text(left - 0.06, y + bar / 2, task_titles[task], ha="right", va="center", fontsize=8)
        for column in range(n_images):
            x = left + column * (side + gap)
            stacked_weights(ax, (x, y, side, bar), weights[gate][task][column])
        y -= 0.07
    return figure


def class_routing(results: Sequence[Result], task_titles: Mapping[str, str]) -> Figure:
    """Mean weight of each expert for each class: one map per task (rows) and Result (columns)."""
    tasks = [task for task in task_titles if task in results[0].metrics["class_weights"]]
    size = (2.7 * len(results) + 0.5, 2.2 * len(tasks) + 0.3)
    figure, axes = plt.subplots(len(tasks), len(results), figsize=size, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for ax, result in zip(row, results, strict=True):
            weights = np.asarray(result.metrics["class_weights"][task])
            shown = ax.imshow(weights, vmin=0, vmax=1, aspect="auto")
            pixels = "centred" if result.config["center_pixels"] else "raw"
            ax.set(xlabel="expert", ylabel=f"digit {task_titles[task]}", title=f"{result.config['gate']}, {pixels}")
            ax.set_yticks(range(0, len(weights), 3))
            ax.set_xticks(range(0, weights.shape[1], max(1, weights.shape[1] // 4)))
            ax.grid(False)
    figure.colorbar(shown, ax=axes, label="mean weight", shrink=0.8)
    plt.close(figure)
    return figure


def experts_over_training(
    ax: Axes, results: Iterable[Result], *, labels: Sequence[str] | None = None, title: str = ""
) -> None:
    """Mean experts per image (both tasks) on validation images after each epoch; one line per Result.

    Args:
        ax: where.
        results: of any gates; same gate, same colour.
        labels: instead of the gates' names.
        title: of the axes.
    """
    results = list(results)
    for place, result in enumerate(results):
        rows = result.curves["routing"]
        epochs = sorted({row["epoch"] for row in rows})
        mean = [np.mean([row["experts_mean"] for row in rows if row["epoch"] == epoch]) for epoch in epochs]
        style = vision_style(result.config["gate"])
        if labels is not None:
            style |= {"label": labels[place], "linestyle": ("-", "--", ":", "-.")[place % 4]}
        ax.plot(epochs, mean, markersize=4, **style)
    k = results[0].config["k"]
    ax.axhline(k, color=INK, linewidth=0.7)
    ax.annotate(f"k = {k}", (1, k), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    ax.set(xlabel="epoch", ylabel="experts per image", ylim=(0, None), title=title)


def accuracy_against_cost(ax: Axes, results: Iterable[Result], *, title: str = "", legend: bool = True) -> None:
    """Test accuracy over the number of experts that run on an image, a point per run.

    Hollow: centred pixels. Half filled: local search ("+").

    Args:
        ax: where.
        results: of any gates and baselines.
        title: of the axes.
        legend: at the right, outside.
    """
    order = [*_BASELINES, *GATE_COLORS]
    seen = set()
    results = sorted(results, key=lambda result: order.index(result.config["gate"].removesuffix("+")))
    for result in results:
        gate = result.config["gate"]
        style = vision_style(gate)
        del style["linestyle"]
        color = style.pop("color")
        centred = result.config["center_pixels"]
        style["label"] = style["label"] if gate not in seen else None
        seen.add(gate)
        ax.plot(
            result.metrics["experts_run"],
            result.metrics["test_accuracy"],
            linestyle="none",
            markersize=9 if gate in _BASELINES else 7,
            markeredgecolor=color,
            markerfacecolor="white" if centred else color,
            fillstyle="left" if gate.endswith("+") else "full",
            markeredgewidth=1.5,
            **style,
        )
    ax.set(xscale="log", xlabel="experts that run per image", ylabel="test accuracy", title=title)
    ticks = [1, 2, 4, 8, 16]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    if legend:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def accuracy_panels(panels: Mapping[str, Sequence[Result]]) -> Figure:
    """`accuracy_against_cost` for several sets of Results (title -> Results) side by side, with one legend."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.1 * len(panels) + 1.4, 3.6), squeeze=False)
    handles = {}
    for ax, (title, results) in zip(axes[0], panels.items(), strict=True):
        accuracy_against_cost(ax, results, title=title, legend=False)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    hollow = any(result.config["center_pixels"] for results in panels.values() for result in results)
    note = "hollow: centred pixels" if hollow else None
    figure.legend(handles.values(), handles, fontsize=8, title=note, title_fontsize=8, loc="outside right center")
    plt.close(figure)
    return figure


def freezing(ax: Axes, results: Sequence[Result], *, x_norm: float, title: str = "") -> None:
    """Share of hard (image, tree) pairs after each step, one line per gamma; dotted: the rule 0.5 gamma / (lr |x|_1).

    Args:
        ax: where.
        results: runs whose epochs are single steps, different gammas.
        x_norm: mean |x|_1 of the gate input.
        title: of the axes.
    """
    for place, result in enumerate(results):
        rows = result.curves["routing"]
        steps = sorted({row["epoch"] for row in rows})
        share = [np.mean([row["saturation"] for row in rows if row["epoch"] == step]) for step in steps]
        color = expert_colors(len(results))[place]
        gamma = result.config["gamma"]
        ax.plot(steps, share, color=color, marker=".", linestyle=("-", "--", "-.")[place % 3], label=f"γ = {gamma:g}")
        ax.axvline(0.5 * gamma / (result.config["learning_rate"] * x_norm), color=color, linestyle=":", linewidth=1.2)
    ax.set(xlabel="optimiser step", ylabel="hard paths (share)", ylim=(-0.03, 1.03), title=title)
    ax.legend(fontsize=9)
