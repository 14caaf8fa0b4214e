"""Views for notebook 14: how ECE is computed, one temperature, one alpha.

Each view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``. Legend: N test samples, n calibration samples, L exits, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.metrics.calibration import expected_calibration_error, reliability
from moe_lab.metrics.conformal import coverage_and_size, exit_quantiles, prediction_sets
from moe_lab.names import check_name
from moe_lab.plots.exits import MARK
from moe_lab.plots.sheet import INK, PALE, Chart, sheet
from moe_lab.plots.uncertainty import method_style

VERSIONS = {
    "whole test set": "ece",
    "mean over batches of 64": "ece_per_batch",
    "softmax twice": "ece_double_softmax",
    "whole test set, temperature per exit": "ece_temperature",
}
"""Ways to compute ECE -> columns of the curve ``points``."""

_BLUE = "#0072B2"


def ece_view(points: pd.DataFrame, gates: str = "whole test set", thresholds: str = "whole test set") -> Figure:
    """ECE against cost, with learned gates (●) scored in one way and thresholds in another.

    Args:
        points: the curve ``points``.
        gates, thresholds: keys of `VERSIONS`.

    Raises:
        ValueError: unknown version, with the nearest one.
    """
    for version in (gates, thresholds):
        check_name("version", version, VERSIONS)
    figure, ax = sheet(7.6, 3.5)
    ticks = np.arange(0, 71, 10)
    title = f"ECE, points. Learned gates: {gates}. Thresholds: {thresholds}"
    chart = Chart(
        ax,
        (0.5, 0.6, 5.0, 2.5),
        xlim=(0, 1.02),
        ylim=(0, 70),
        xticks=(0, 0.25, 0.5, 0.75, 1),
        yticks=ticks,
        xlabel="multiply-adds, share of the whole network",
        title=title,
    )
    for place, method in enumerate(("jei_dnn", "geometric", "shared")):
        rows = points[points.method == method].sort_values("cost")
        column = VERSIONS[gates if method == "jei_dnn" else thresholds]
        style = method_style(method)
        label = style.pop("label")
        if len(rows):
            chart.line(rows.cost, 100 * rows[column], **style)
            at = (5.7, 5.95) if style["linestyle"] else (5.82,)
            ax.plot(at, [2.8 - 0.3 * place] * len(at), **style)
            ax.text(6.05, 2.8 - 0.3 * place, label.split(" (")[0], fontsize=8, va="center")
    return figure


class ReliabilityView:
    """Logits at the exit taken, to be divided by one temperature.

    Args:
        logits: (N, K) at the exit taken.
        labels: (N,).
        temperatures: of the curve, increasing.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, temperatures: Sequence[float] = tuple(np.geomspace(0.25, 4, 33))
    ):
        if logits.shape[:1] != labels.shape:
            raise ValueError(f"logits (N, K) {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit")
        self.logits, self.right = logits.double(), logits.argmax(-1) == labels
        self.curve = [(float(t), self.at(float(t))) for t in temperatures]

    def at(self, temperature: float) -> float:
        """ECE of logits / temperature, in [0, 1]."""
        return expected_calibration_error(self._confidence(temperature), self.right)

    def _confidence(self, temperature: float) -> Tensor:
        return (self.logits / temperature).softmax(-1).amax(-1)

    def view(self, temperature: float = 1.0) -> Figure:
        """Left: accuracy against confidence, 15 bins of equally many samples. Right: ECE against temperature.

        Args:
            temperature: above 1 is less sure; the order of the classes stays.
        """
        sure = self._confidence(temperature)
        bins = reliability(sure, self.right)
        figure, ax = sheet(7.6, 3.6)
        ticks = (0, 25, 50, 75, 100)
        limits = {"xlim": (0, 100), "ylim": (0, 100.1), "xticks": ticks, "yticks": ticks}
        chart = Chart(ax, (0.5, 0.6, 2.5, 2.5), xlabel="confidence, %", title="accuracy, %", **limits)
        chart.line((0, 100), (0, 100), color=INK, linewidth=0.8, linestyle="--")
        for mean, accuracy in zip(100 * bins.confidence, 100 * bins.accuracy, strict=True):
            chart.line((mean, mean), (mean, accuracy), color=_BLUE, linewidth=2, alpha=0.6)
        chart.line(100 * bins.confidence, 100 * bins.accuracy, color=_BLUE, linestyle="", marker="o", markersize=4)
        error, gap = 100 * self.at(temperature), 100 * float(sure.mean() - self.right.double().mean())
        top = np.ceil(max(100 * value for _, value in self.curve) / 10) * 10
        chart = Chart(
            ax,
            (3.9, 0.6, 3.4, 2.5),
            xlim=(np.log(self.curve[0][0]), np.log(self.curve[-1][0])),
            ylim=(0, top),
            xticks=(),
            yticks=(0, top / 2, top),
            xlabel="",
            title=f"T = {temperature:.2f}: ECE {error:.1f} points, confidence − accuracy {gap:+.1f}",
        )
        for tick in (0.25, 0.5, 1, 2, 4):
            ax.text(chart.place(np.log(tick), 0)[0], 0.55, f"{tick:g}", ha="center", va="top", fontsize=8)
        ax.text(5.6, 0.4, "temperature", ha="center", va="top", fontsize=9)
        chart.line(np.log([t for t, _ in self.curve]), [100 * value for _, value in self.curve], color=_BLUE)
        chart.line([np.log(temperature)], [error], color=MARK, marker="s", markersize=9, markeredgecolor=INK)
        return figure


class AlphaView:
    """Prediction sets of a network with exits: a handful of images, and coverage and size of all.

    Args:
        images: (m, 1, S, S) of the test samples that are shown.
        shown: (m,) which they are.
        probabilities: (N, K) of the test samples at the exit they take.
        labels, exits: (N,).
        calibration: probabilities (n, L, K), labels (n,), exits (n,).
        grid: alphas of the curves, increasing.

    Raises:
        ValueError: as many images as indices are needed.
    """

    def __init__(
        self,
        images: Tensor,
        shown: Tensor,
        probabilities: Tensor,
        labels: Tensor,
        exits: Tensor,
        calibration: tuple[Tensor, Tensor, Tensor],
        grid: Sequence[float] = (0.005, *(step / 100 for step in range(1, 31))),
    ):
        if len(images) != len(shown):
            raise ValueError(f"{len(images)} images, but {len(shown)} indices of them")
        self.images, self.shown, self.grid = images, shown, list(grid)
        self.probabilities, self.labels, self.exits, self.calibration = probabilities, labels, exits, calibration
        self._curves: dict[str, list[tuple[float, float]]] = {}

    def sets(self, alpha: float, strategy: str) -> Tensor:
        """(N, K) bool."""
        quantiles = exit_quantiles(*self.calibration, alpha, strategy=strategy, warn=False)
        return prediction_sets(self.probabilities, self.exits, quantiles)

    def at(self, alpha: float, strategy: str = "gated") -> tuple[float, float]:
        """Coverage and mean size."""
        return coverage_and_size(self.sets(alpha, strategy), self.labels)

    def curve(self, strategy: str = "gated") -> list[tuple[float, float]]:
        """`at` on the grid; computed once."""
        if strategy not in self._curves:
            self._curves[strategy] = [self.at(alpha, strategy) for alpha in self.grid]
        return self._curves[strategy]

    def view(self, alpha: float = 0.05, strategy: str = "gated") -> Figure:
        """Left: images, probabilities (shades), sets (orange frames), true classes (dots). Right: all test images.

        Args:
            alpha: accepted miscoverage, in (0, 1).
            strategy: which samples a quantile comes from, see `metrics.conformal`.
        """
        sets, curve = self.sets(alpha, strategy), self.curve(strategy)
        coverage, size = coverage_and_size(sets, self.labels)
        figure, ax = sheet(8.8, 4.5)
        self._draw_images(ax, sets[self.shown])
        wide = {"xlim": (0, self.grid[-1]), "xticks": (0, 0.1, 0.2, 0.3)}
        low = np.floor(5 * min(0.69, *(value for value, _ in curve))) / 5
        box = (5.9, 2.75, 2.6, 1.3)
        ticks = np.linspace(100 * low, 100, 3).round()
        chart = Chart(
            ax, box, ylim=(100 * low, 100.5), yticks=ticks, title=f"covered: {100 * coverage:.1f} % of all", **wide
        )
        chart.line(self.grid, [100 * (1 - a) for a in self.grid], color=INK, linewidth=0.9, linestyle="--")
        _mark(chart, self.grid, [100 * value for value, _ in curve], alpha, 100 * coverage)
        n_classes = self.probabilities.shape[1]
        ylim = (0, n_classes + 0.2)
        title, box = f"classes in a set, mean: {size:.2f}", (5.9, 0.65, 2.6, 1.3)
        ticks = (0, n_classes / 2, n_classes)
        chart = Chart(ax, box, ylim=ylim, yticks=ticks, title=title, xlabel="α (dashed: 1 − α)", **wide)
        _mark(chart, self.grid, [value for _, value in curve], alpha, size)
        return figure

    def _draw_images(self, ax: Axes, sets: Tensor) -> None:
        m, n_classes = sets.shape
        x, y, width, height, side = 0.65, 0.35, 4.5, 2.7, 4.5 / m
        shades = self.probabilities[self.shown].T.numpy()
        frame = (x, x + width, y, y + height)
        ax.imshow(shades, vmin=0, vmax=1, cmap="Greys", extent=frame, aspect="auto", zorder=1)
        low, high = self.images.amin((1, 2, 3), keepdim=True), self.images.amax((1, 2, 3), keepdim=True)
        strip = np.concatenate(list(((self.images - low) / (high - low))[:, 0].numpy()), 1)
        ax.imshow(strip, cmap="Greys_r", extent=(x, x + width, 3.15, 3.15 + min(side, 0.95)), aspect="auto", zorder=1)
        ax.set(xlim=(0, 8.8), ylim=(0, 4.5))
        step, deep = width / m, height / n_classes
        for column in range(1, m):
            ax.plot([x + column * step] * 2, (y, 4.1), color="white", linewidth=3, zorder=2)
        ax.plot((x, x + width, x + width, x, x), (y, y, y + height, y + height, y), color=PALE, linewidth=0.8)
        squares_x, squares_y = [], []
        for column, row in sets.nonzero().tolist():  # (image, class)
            left, top = x + column * step + 0.06, y + height - row * deep - 0.03
            right, bottom = left + step - 0.12, top - deep + 0.06
            squares_x += [left, right, right, left, left, np.nan]
            squares_y += [top, top, bottom, bottom, top, np.nan]
        ax.plot(squares_x, squares_y, color=MARK, linewidth=1.8, zorder=3)
        true = self.labels[self.shown].numpy()
        middle = x + (np.arange(m) + 0.5) * step
        dots = {"marker": "o", "linestyle": "", "markersize": 5, "markeredgecolor": "white", "color": _BLUE}
        ax.plot(middle, y + height - (true + 0.5) * deep, zorder=4, **dots)
        for label in range(n_classes):
            ax.text(x - 0.08, y + height - (label + 0.5) * deep, str(label), ha="right", va="center", fontsize=8)
        for place, index in zip(middle, self.shown.tolist(), strict=True):
            ax.text(
                place, 3.2 + min(side, 0.95), f"exit {int(self.exits[index]) + 1}", ha="center", va="bottom", fontsize=9
            )
        ax.text(x, 0.12, "grey: probability; frame: in the set; dot: true class", fontsize=8.5)


def _mark(chart: Chart, x: Sequence[float], y: Sequence[float], now: float, value: float) -> None:
    chart.line(x, y, color=_BLUE, linewidth=1.6)
    chart.line([now], [value], color=MARK, marker="s", markersize=9, markeredgecolor=INK)
