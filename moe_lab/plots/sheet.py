"""A figure as a sheet of paper, measured in inches: fast enough to be redrawn by a slider.

Most of the time that matplotlib needs for a small figure goes into axes and ticks. Drawings that share one invisible
pair of axes, each in its own box (x, y, width, height), take a fifth of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Box = tuple[float, float, float, float]

INK = "#222222"
PALE = "#C8C8C8"


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose only axes are invisible and measure inches from the lower left corner.

    The figure is closed at once, so that a notebook shows it only where it is returned.
    """
    figure = plt.figure(figsize=(width, height), layout="none")
    plt.close(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    ax.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
    return figure, ax


class Chart:
    """Curves in a box of a sheet: a frame, a few numbers along it, lines in data coordinates.

    Args:
        ax: the sheet.
        box: x, y, width, height of the plotting area; numbers and labels stand outside it, left and below.
        xlim, ylim: data range; what lies outside is cut off.
        xticks, yticks: numbers to write.
        xlabel: below the frame.
        title: above the frame: say here what is drawn upwards.
    """

    def __init__(
        self,
        ax: Axes,
        box: Box,
        *,
        xlim: tuple[float, float],
        ylim: tuple[float, float],
        xticks: Sequence[float],
        yticks: Sequence[float],
        xlabel: str = "",
        title: str = "",
    ):
        self.ax, self.box, self.xlim, self.ylim = ax, box, xlim, ylim
        x, y, width, height = box
        ax.plot((x, x, x + width), (y + height, y, y), color=INK, linewidth=0.8)
        for tick in xticks:
            ax.text(self.place(tick, ylim[0])[0], y - 0.05, f"{tick:g}", ha="center", va="top", fontsize=8)
        for tick in yticks:
            ax.text(x - 0.05, self.place(xlim[0], tick)[1], f"{tick:g}", ha="right", va="center", fontsize=8)
        ax.text(x + width / 2, y - 0.2, xlabel, ha="center", va="top", fontsize=9)
        ax.text(x, y + height + 0.08, title, va="bottom", fontsize=10)

    def place(self, x, y) -> tuple:
        """Data to sheet coordinates."""
        left, bottom, width, height = self.box
        return (
            left + (np.asarray(x, dtype=float) - self.xlim[0]) / (self.xlim[1] - self.xlim[0]) * width,
            bottom + (np.asarray(y, dtype=float) - self.ylim[0]) / (self.ylim[1] - self.ylim[0]) * height,
        )

    def line(self, x, y, **style) -> None:
        """A curve; keywords are those of `Axes.plot`."""
        y = np.asarray(y, dtype=float)
        y = np.where((y >= self.ylim[0]) & (y <= self.ylim[1]), y, np.nan)
        self.ax.plot(*self.place(x, y), **style)

    def band(self, first: float, last: float, **style) -> None:
        """Shade first <= x <= last."""
        first, last = (min(max(value, self.xlim[0]), self.xlim[1]) for value in (first, last))
        self.ax.fill_between(
            self.place([first, last], 0)[0], self.box[1], self.box[1] + self.box[3], linewidth=0, **style
        )


def draw_table(
    ax: Axes, box: Box, values: Any, *, numbers: bool = False, xlabel: str = "", ylabel: str = "", title: str = ""
) -> None:
    """Values (rows, columns) in [0, 1] as shades in a box of a sheet, row 0 on top.

    ``numbers``: write each value, and nothing at all for an exact zero.
    """
    values = np.asarray(values, dtype=float)
    n_rows, n_columns = values.shape
    x, y, width, height = box
    ax.imshow(values, vmin=0, vmax=1, cmap="Blues", extent=(x, x + width, y, y + height), aspect="auto", zorder=1)
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim(), autoscale_on=False)
    ax.plot((x, x + width, x + width, x, x), (y, y, y + height, y + height, y), color=INK, linewidth=0.8)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            if value != 0:
                place = (x + (column + 0.5) * width / n_columns, y + height - (row + 0.5) * height / n_rows)
                color = "white" if value > 0.6 else INK
                ax.text(*place, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    ax.text(x, y + height + 0.08, title, va="bottom", fontsize=10)
    ax.text(x + width / 2, y - 0.08, xlabel, ha="center", va="top", fontsize=9)
    ax.text(x - 0.08, y + height / 2, ylabel, ha="right", va="center", rotation=90, fontsize=9)
