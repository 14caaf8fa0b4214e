"""Figures of notebook 11: where hidden tokens go, scores of gates, right tokens against right sentences, errors.

Draws Results of `moe_lab.experiments.evomoe_masked` and `evomoe_translation`; gates look as in notebook 10.
Legend: E experts, n tokens of a sentence, p share of right tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moe_lab.plots.language import by_gate, language_style
from moe_lab.plots.sheet import INK, sheet
from moe_lab.plots.vision import stacked_weights
from moe_lab.results import Result


def draw_loads(loads: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One bar per gate and kind of token, cut into the experts' shares; shares above 15 % carry the expert's number.

    Args:
        loads: gate -> kind of token -> (E,) shares that sum to 1.
    """
    left, width, bar, gap = 2.9, 6.0, 0.3, 0.22
    n_rows = sum(len(rows) for rows in loads.values())
    height = n_rows * (bar + 0.06) + len(loads) * gap + 0.55
    figure, ax = sheet(left + width + 0.3, height)
    y = height - 0.05
    for gate, rows in loads.items():
        y -= gap
        ax.text(0.05, y - bar * 0.65, gate, fontsize=10, fontweight="bold")
        for name, shares in rows.items():
            y -= bar + 0.06
            ax.text(left - 0.1, y + bar / 2, name, ha="right", va="center", fontsize=9)
            stacked_weights(ax, (left, y, width, bar), shares)
    ticks = (0, 0.25, 0.5, 0.75, 1)
    for tick in ticks:
        ax.text(left + tick * width, y - 0.08, f"{tick:.0%}", ha="center", va="top", fontsize=8)
    ax.text(left + width / 2, y - 0.28, "share of tokens, cut by expert", ha="center", va="top", fontsize=9)
    return figure


def draw_metric(
    ax: Axes, results: Sequence[Result], metric: str, *, lines: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """A dot per run, a bar at the mean of each gate; dotted: ``lines`` (label -> value).

    A run that was not pre-trained is hollow and stands beside those that were.
    """
    groups: dict[tuple[str, bool], list[Result]] = {}
    for gate, runs in by_gate(results).items():
        for run in runs:
            groups.setdefault((gate, run.config.get("pretrain", True)), []).append(run)
    for place, ((gate, pretrained), runs) in enumerate(groups.items()):
        values = [run.metrics[metric] for run in runs]
        style = language_style(gate)
        face = style["color"] if pretrained else "white"
        ax.plot([place] * len(values), values, "o", color=style["color"], markersize=6, markerfacecolor=face)
        ax.hlines(np.mean(values), place - 0.3, place + 0.3, color=style["color"], linewidth=2)
    for label, value in (lines or {}).items():
        ax.axhline(value, color=INK, linestyle=":", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 2), "textcoords": "offset points"}
        ax.annotate(label, (1, value), ha="right", va="bottom", fontsize=8, **place)
    names = [gate if pretrained else f"{gate}, no pre-training" for gate, pretrained in groups]
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set(title=title, xlim=(-0.5, len(names) - 0.5))
    ax.grid(axis="x", visible=False)


def draw_validation(ax: Axes, results: Sequence[Result], curve: str, *, column: str = "valid_loss") -> None:
    """A column of a curve over the steps, mean over the seeds of a gate, their range shaded; no legend.

    Args:
        ax: where.
        results: of any gates.
        curve: "pretraining" or "epochs".
        column: of its rows.
    """
    for gate, runs in by_gate(results).items():
        rows = [run.curves[curve] for run in runs if run.curves.get(curve)]
        if not rows:
            continue
        style = language_style(gate)
        steps = [row["step"] for row in rows[0]]
        values = np.array([[row[column] for row in table] for table in rows])
        ax.plot(steps, values.mean(0), markersize=4, **style)
        if len(values) > 1:
            ax.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="optimiser step")


def draw_domains(ax: Axes, results: Sequence[Result], *, title: str = "") -> None:
    """Test accuracy for each domain, a mark per run; dotted at one half, what guessing gets."""
    domains: list[str] = []
    groups = by_gate(results)
    for place, (gate, runs) in enumerate(groups.items()):
        style = language_style(gate) | {"linestyle": "none"}
        for run in runs:
            accuracy = run.metrics["accuracy_by_domain"]
            domains = list(accuracy)
            shift = 0.14 * (place - (len(groups) - 1) / 2)
            ax.plot(np.arange(len(accuracy)) + shift, list(accuracy.values()), markersize=6, **style)
            style.pop("label", None)
    ax.axhline(0.5, color=INK, linestyle=":", linewidth=1)
    ax.set_xticks(range(len(domains)), domains)
    ax.set(ylabel="test accuracy", ylim=(0.3, 1.02), title=title)
    ax.grid(axis="x", visible=False)


def draw_sentences(ax: Axes, results: Sequence[Result], length: float, *, title: str = "") -> None:
    """Share of sentences that are right word for word over p, the share of right next tokens; dotted: p^n.

    Args:
        ax: where; gets a legend.
        results: of `evomoe_translation`.
        length: n, mean number of tokens to predict in a sentence.
        title: of the axes.
    """
    lowest = min(result.metrics["test_accuracy"] for result in results)
    p = np.linspace(max(0.0, lowest - 0.1 * (1 - lowest) - 0.002), 1, 100)
    ax.plot(p, p**length, color=INK, linestyle=":", label=f"$p^n$, n = {length:.0f}")
    for gate, runs in by_gate(results).items():
        style = language_style(gate) | {"linestyle": "none"}
        points = np.array([(run.metrics["test_accuracy"], run.metrics["exact"]) for run in runs])
        ax.plot(points[:, 0], points[:, 1], markersize=8, **style)
    ax.set(xlabel="next tokens right, the truth before them given (p)", ylabel="sentences right", ylim=(-0.03, 1.03))
    ax.set_title(title)
    ax.legend(fontsize=9)


def draw_errors(ax: Axes, shares: Mapping[str, Mapping[str, float]], *, title: str = "") -> None:
    """Share of sentences with each kind of error: a row per kind, a bar per gate; bars are not stacked.

    Args:
        ax: where; gets a legend.
        shares: gate -> kind -> share of all sentences.
        title: of the axes.
    """
    kinds = list(next(iter(shares.values())))
    height = 0.8 / len(shares)
    for place, (gate, of_kind) in enumerate(shares.items()):
        y = np.arange(len(kinds)) + (place - (len(shares) - 1) / 2) * height
        hatch = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")[place % 8]
        style = {"color": language_style(gate)["color"], "edgecolor": "white", "linewidth": 0.4, "hatch": hatch}
        ax.barh(y, [of_kind[kind] for kind in kinds], height * 0.92, label=gate, **style)
    ax.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="share of test sentences", title=title)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=9)


def metric_panels(panels: Mapping[str, tuple[Sequence[Result], str]]) -> Figure:
    """`draw_metric` side by side: title -> Results and metric."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9.8, 3.5), squeeze=False)
    for ax, (title, (results, metric)) in zip(axes[0], panels.items(), strict=True):
        draw_metric(ax, results, metric, title=title)
    plt.close(figure)
    return figure
