"""View for notebook 13, λ replay: a price is set, and everything that hangs on it is shown.

Legend: N samples, L exits, G = L - 1 gates, R runs (one per trained price), E_l cross entropy, c_l relative cost,
l* = argmin_l E_l + lambda c_l the best exit, t_l = [l >= l*] the targets of the gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.exits import best_exits, gate_targets
from moe_lab.plots.exits import MARK, draw_distribution
from moe_lab.plots.sheet import INK, Chart, sheet

_WIDE = 1.45  # inches for each sample


class Replay(NamedTuple):
    """Samples that leave in one way: ``cost`` (relative), ``accuracy``, ``shares`` (L,) that sum to 1."""

    cost: float
    accuracy: float
    shares: list[float]


class ReplayView:
    """Trained classifiers at any price, and gates at the prices they were trained for.

    Args:
        losses: (N, L) cross entropies of the exits.
        right: (N, L) bool, is exit l right?
        costs: (L,) relative, the last is 1.
        prices: R lambdas.
        exits: (R, N) int64 taken by the gates, 0 is the first.
        pictures: (S, H, W) of the samples to look at.
        rows: S numbers of these samples in ``losses``.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self,
        losses: Tensor,
        right: Tensor,
        costs: Tensor,
        prices: Sequence[float],
        exits: Tensor,
        pictures: Tensor,
        rows: Sequence[int],
    ):
        if losses.shape != right.shape or losses.shape[1:] != costs.shape:
            raise ValueError(
                f"losses (N, L) {tuple(losses.shape)}, right {tuple(right.shape)} and costs {tuple(costs.shape)} "
                "do not fit"
            )
        if tuple(exits.shape) != (len(prices), len(losses)):
            raise ValueError(
                f"exits must be (prices, samples) = {(len(prices), len(losses))}, got {tuple(exits.shape)}"
            )
        if len(pictures) != len(rows) or not len(rows):
            raise ValueError(f"one picture for each of the rows, at least one; got {len(pictures)} and {len(rows)}")
        self.losses, self.right, self.costs = losses.double(), right, costs.double()
        self.prices, self.exits, self.pictures, self.rows = list(prices), exits, pictures, list(rows)

    def leaving(self, exits: Tensor) -> Replay:
        """What it costs and brings if samples leave at these exits (N,)."""
        right = self.right.gather(1, exits[:, None]).double().mean()
        shares = torch.bincount(exits, minlength=len(self.costs)).double() / len(exits)
        return Replay(float(self.costs[exits].mean()), float(right), shares.tolist())

    def asked(self, price: float) -> Replay:
        """Everybody leaves at l*: an oracle, it knows the labels."""
        return self.leaving(best_exits(self.losses, self.costs, price))

    def nearest(self, price: float) -> int:
        """Which of the trained prices is nearest."""
        return min(range(len(self.prices)), key=lambda run: abs(self.prices[run] - price))

    def view(self, price: float = 0.3) -> Figure:
        """Above: E_l + price c_l of some samples, the best exit in orange, targets below. Below: where all leave.

        Args:
            price: lambda, nats for the whole network's cost; not negative.
        """
        n_exits, width = len(self.costs), max(8.8, 0.5 + _WIDE * len(self.rows))
        figure, ax = sheet(width, 5.6)
        chosen = self.losses[self.rows]
        highest = float((chosen + max(self.prices) * self.costs).max()) * 1.05
        best = best_exits(chosen, self.costs, price)
        targets = gate_targets(best, n_exits - 1).int().tolist()
        ax.text(0.1, 5.37, f"E + λ c at λ = {price:.2f}, nats (· without λ c); best exit: orange", fontsize=10)
        for place, picture in enumerate(self.pictures):
            left = 0.5 + _WIDE * place
            self._sample(ax, left, chosen[place], price, int(best[place]), highest, picture, first=place == 0)
            ax.text(left, 2.55, "t = " + " ".join(map(str, targets[place])), fontsize=9)
        oracle, run = self.asked(price), self.nearest(price)
        gates = self.leaving(self.exits[run])
        for place, (name, found) in enumerate(
            ((f"best exits, λ = {price:.2f}", oracle), (f"gates, trained for λ = {self.prices[run]:g}", gates))
        ):
            title = f"{name}\ncost {found.cost:.2f}, accuracy {100 * found.accuracy:.1f} %"
            box = (0.6 + 4.3 * place, 0.55, 3.4, 1.25)
            draw_distribution(ax, box, found.shares, -1, title=title, xlabel="exit: share of all test samples")
        return figure

    def _sample(
        self,
        ax: Axes,
        left: float,
        losses: Tensor,
        price: float,
        best: int,
        highest: float,
        picture: Tensor,
        first: bool,
    ) -> None:
        """One column of the upper half."""
        n_exits = len(losses)
        levels = list(range(1, n_exits + 1))
        chart = Chart(
            ax, (left, 3.15, _WIDE - 0.3, 1.4), xlim=(0.6, n_exits + 0.4), ylim=(0, highest), xticks=levels,
            yticks=(0, round(highest / 2, 1), round(highest, 1)) if first else (), xlabel="exit",
        )  # fmt: skip
        total = (losses + price * self.costs).tolist()
        chart.line(levels, losses.tolist(), color="#7A7A7A", linestyle="", marker=".", markersize=4)
        chart.line(levels, total, color=INK, marker="o", markersize=4, linewidth=1)
        chart.line([best + 1], [total[best]], color=MARK, marker="s", markersize=8, markeredgecolor=INK)
        ax.imshow(picture.numpy(), cmap="gray", extent=(left + 0.25, left + 0.85, 4.65, 5.25), aspect="auto", zorder=1)
        ax.set(xlim=(0, ax.figure.get_figwidth()), ylim=(0, 5.6), autoscale_on=False)
