"""View for notebook 03: how the rows are shared out, epoch by epoch. Replays saved Results, trains nothing.

The view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.plots.sheet import INK, PALE, Chart, sheet
from moe_lab.plots.style import expert_colors, gate_color
from moe_lab.results import Result


class LoadReplay:
    """Routing of one Result per gate, ready to be drawn at any epoch.

    Args:
        results: label -> Result of `moe_lab.experiments.comet_recommender`; a label may be the gate's name.
        k: drawn as a line: what the paper bounds the number of experts by.
    """

    def __init__(self, results: Mapping[str, Result], k: int):
        self.k = k
        self._gate = {label: result.config["gate"] for label, result in results.items()}
        self._rows: dict[str, dict[str, list[dict[str, Any]]]] = {
            label: {
                task: [row for row in result.curves["routing"] if row["task"] == task] for task in ("watch", "rating")
            }
            for label, result in results.items()
        }
        epochs = [{row["epoch"] for row in tasks["watch"]} for tasks in self._rows.values()]
        self.epochs = sorted(set.intersection(*epochs))

    def view(self, label: str, epoch: int) -> Figure:
        """Per task: share of the weight each expert gets after ``epoch`` (0: before training), and experts per row.

        The pale bars behind are the shares after the last epoch; the line across is the fair share 1/E.
        """
        tasks = {
            task: {row["epoch"]: row for row in rows if row["epoch"] in self.epochs}
            for task, rows in self._rows[label].items()
        }
        first, last = self.epochs[0], self.epochs[-1]
        epoch = min(self.epochs, key=lambda known: abs(known - epoch))
        color = gate_color(self._gate[label])
        figure, ax = sheet(9.6, 2.7)
        for place, (task, rows) in enumerate(tasks.items()):
            self._bars(ax, 0.5 + 3.25 * place, rows[epoch], rows[last], f"{label}: {task}")
        n_experts = len(tasks["watch"][last]["load"])
        chart = Chart(
            ax,
            (7.1, 0.5, 2.3, 1.7),
            xlim=(first - 0.5, last + 0.5),
            ylim=(0, n_experts + 0.5),
            xticks=(first, last),
            yticks=(0, self.k, n_experts),
            xlabel="epoch (solid: watch, dotted: rating)",
            title="experts per row",
        )
        chart.line([first - 0.5, last + 0.5], [self.k, self.k], color=PALE, linewidth=1)
        for rows, style in zip(tasks.values(), ("-", ":"), strict=True):
            chart.line(list(rows), [row["experts_mean"] for row in rows.values()], color=color, linestyle=style)
            chart.line([epoch], [rows[epoch]["experts_mean"]], color=color, marker="o", linestyle="")
        return figure

    def _bars(self, ax: Axes, left: float, row: dict[str, Any], last: dict[str, Any], title: str) -> None:
        bottom, height, width = 0.5, 1.7, 2.7
        step = width / len(row["importance"])
        colors = expert_colors(len(row["importance"]))
        for expert, (now, then) in enumerate(zip(row["importance"], last["importance"], strict=True)):
            x = left + expert * step
            ax.fill_between((x, x + 0.9 * step), bottom, bottom + then * height, color=PALE, linewidth=0)
            ax.fill_between((x + 0.2 * step, x + 0.7 * step), bottom, bottom + now * height, color=colors[expert])
            ax.text(x + 0.45 * step, bottom - 0.05, str(expert), ha="center", va="top", fontsize=8)
        fair = bottom + height / len(colors)
        ax.plot((left, left + width), (fair, fair), color=INK, linewidth=0.7, linestyle=":")
        ax.plot((left, left, left + width), (bottom + height, bottom, bottom), color=INK, linewidth=0.8)
        for tick in (0, 0.5, 1):
            ax.text(left - 0.05, bottom + tick * height, f"{tick:g}", ha="right", va="center", fontsize=8)
        ax.text(left, bottom + height + 0.08, title, va="bottom", fontsize=10)
        ax.text(left - 0.28, bottom + height / 2, "mean weight", ha="right", va="center", rotation=90, fontsize=9)
        detail = f"epoch {row['epoch']}: {row['used']} of {len(colors)} in use"
        if "saturation" in row:
            detail += f", {row['saturation']:.0%} of paths hard"
        ax.text(left, bottom - 0.24, detail, va="top", fontsize=9)
