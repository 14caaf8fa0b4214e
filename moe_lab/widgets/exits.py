"""Views for notebook 12: from gates to a decision, and one threshold for all exits.

Each view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``. Legend: N samples, L exits, G = L - 1 gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.exits.policies import shared_threshold_exits
from moe_lab.exits.probability import MODELS, exit_probabilities, exits_taken
from moe_lab.plots.exits import MARK, METHOD_STYLES, draw_distribution
from moe_lab.plots.sheet import INK, Box, Chart, sheet


def gates_view(g1: float = 0.2, g2: float = 0.3, g3: float = 0.4) -> Figure:
    """Three gates of one sample: distribution over four exits and decision (orange), for each exit model.

    Args:
        g1, g2, g3: in [0, 1]; fewer or other numbers of gates: `draw_gates`.
    """
    return draw_gates((g1, g2, g3))


def draw_gates(gates: Sequence[float]) -> Figure:
    """`gates_view` for any number of gates; below the distributions, the numbers that decide."""
    g = torch.tensor(list(gates), dtype=torch.float64)
    figure, ax = sheet(8.8, 3.0)
    for place, model in enumerate(MODELS):
        probabilities, taken = exit_probabilities(g, model).tolist(), int(exits_taken(g, model))
        box = (0.45 + 2.9 * place, 0.95, 2.3, 1.35)
        draw_distribution(ax, box, probabilities, taken, title=f"{model}: leaves at {taken + 1}")
        if model == "direct":
            before = (g.cumsum(0) - g).tolist()
            values = ", ".join(f"{2 * gate + given:.2f}" for gate, given in zip(g.tolist(), before, strict=True))
            text = f"2 g + S: {values}; first ≥ 1"
        else:
            text = f"g: {', '.join(f'{gate:.2f}' for gate in g.tolist())}; first ≥ 0.5"
        ax.text(box[0], 0.3, text, fontsize=9, va="center")
    return figure


class Setting(NamedTuple):
    """One threshold: ``cost`` (relative), ``accuracy``, ``shares`` (L,) of samples that leave at each exit, ``exits``
    (N,)."""

    cost: float
    accuracy: float
    shares: list[float]
    exits: Tensor


def tradeoff_chart(ax: Axes, box: Box, accuracies: Sequence[float]) -> Chart:
    """Axes for accuracy (%) against cost in a box of a sheet, wide enough for these accuracies in [0, 1]."""
    low, high = np.floor(20 * min(accuracies)) * 5, np.ceil(20 * max(accuracies)) * 5
    return Chart(
        ax,
        box,
        xlim=(0, 1.02),
        ylim=(low - 0.5, high + 0.5),
        xticks=(0, 0.25, 0.5, 0.75, 1),
        yticks=np.linspace(low, high, 4).round(),
        xlabel="multiply-adds, share of the whole network",
        title="accuracy in %",
    )


class ThresholdView:
    """A trained network's confidences, to be cut by one threshold for all exits.

    Args:
        confidences: (N, L), in [0, 1].
        right: (N, L) bool, is exit l right?
        costs: (L,) relative, the last is 1.
        difficulty: (N,) int64 or None; the mean exit of each is written below.
        learned: (cost, accuracy) pairs of other methods' points, drawn as JEI-DNN's.
        grid: number of thresholds on the curve.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self,
        confidences: Tensor,
        right: Tensor,
        costs: Tensor,
        difficulty: Tensor | None = None,
        learned: Sequence[tuple[float, float]] = (),
        grid: int = 41,
    ):
        if confidences.shape != right.shape or confidences.shape[1:] != costs.shape:
            raise ValueError(
                f"confidences (N, L) {tuple(confidences.shape)}, right {tuple(right.shape)} and costs "
                f"{tuple(costs.shape)} do not fit"
            )
        self.confidences, self.right, self.costs = confidences, right, costs.double()
        self.difficulty, self.learned = difficulty, list(learned)
        self.curve = [self.at(float(threshold)) for threshold in np.linspace(0, 1, grid)]

    def at(self, threshold: float) -> Setting:
        """Everybody leaves at the first exit that is at least so sure."""
        exits = shared_threshold_exits(self.confidences, threshold)
        right = self.right.gather(1, exits[:, None]).double().mean()
        shares = torch.bincount(exits, minlength=len(self.costs)).double() / len(exits)
        return Setting(float(self.costs[exits].mean()), float(right), shares.tolist(), exits)

    def view(self, threshold: float = 0.8) -> Figure:
        """Left: accuracy against cost, all thresholds (line), this one (orange). Right: who leaves where.

        Args:
            threshold: least confidence that leaves, in [0, 1].
        """
        now = self.at(threshold)
        static = self.right.double().mean(0)
        values = [setting.accuracy for setting in self.curve] + static.tolist() + [point[1] for point in self.learned]
        figure, ax = sheet(8.8, 3.6)
        chart = tradeoff_chart(ax, (0.55, 0.6, 3.9, 2.5), values)
        curve = [(setting.cost, 100 * setting.accuracy) for setting in self.curve]
        chart.line(*zip(*curve, strict=True), color=MARK, linewidth=1.6)
        chart.line(self.costs, 100 * static.numpy(), **_marks("static"))
        if self.learned:
            costs, accuracies = np.array(self.learned).T
            chart.line(costs, 100 * accuracies, **_marks("jei_dnn"))
        chart.line([now.cost], [100 * now.accuracy], color=MARK, marker="s", markersize=10, markeredgecolor=INK)
        legend = "line: one threshold; ■ this one; × all at one exit" + ("; ● learned gates" * bool(self.learned))
        ax.text(0.55, 0.08, legend, fontsize=8.5)
        title = f"threshold {threshold:.2f}: cost {now.cost:.2f}, accuracy {100 * now.accuracy:.1f} %"
        draw_distribution(ax, (5.2, 1.0, 3.2, 1.85), now.shares, -1, title=title, xlabel="exit: share of samples")
        if self.difficulty is not None:
            means = [
                float(now.exits[self.difficulty == level].double().mean()) + 1
                for level in self.difficulty.unique().tolist()
            ]
            text = "mean exit by difficulty: " + ", ".join(f"{mean:.1f}" for mean in means)
            ax.text(5.2, 0.4, text, fontsize=9)
        return figure


def _marks(method: str) -> dict:
    style = METHOD_STYLES[method]
    return {"color": style["color"], "linestyle": "", "marker": style["marker"], "markersize": 6}
