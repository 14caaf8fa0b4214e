"""View for notebook 06: what a tuning budget buys. Arithmetic on finished trials, no training.

The view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.plots.sheet import INK, PALE, Chart, sheet
from moe_lab.plots.style import gate_color
from moe_lab.tuning import Pool, expected_best, rank_probabilities


class BudgetReplay:
    """Finished trials of several gates, ready to be drawn for any budget.

    Args:
        pools: gate -> its trials; budgets go up to the size of the smallest pool.
    """

    def __init__(self, pools: Mapping[str, Pool]):
        self.pools = dict(pools)
        self.largest = min(len(pool.test) for pool in pools.values())
        budgets = np.arange(1, self.largest + 1)
        self._curves = {gate: expected_best(pool, budgets) for gate, pool in pools.items()}
        finite = np.concatenate([curve[np.isfinite(curve)] for curve in self._curves.values()])
        margin = 0.08 * (finite.max() - finite.min() or 1.0)
        self._range = (float(finite.min() - margin), float(finite.max() + margin))

    def view(self, gate: str, budget: int = 5) -> Figure:
        """``gate`` and ``gate+`` (where there are both) at a budget: expected loss, and which trial will be chosen.

        Left: curves of all gates pale, of this one dark, dashed with "+"; the dotted line joins the budgets at which
        the two reach one loss. Right: each trial, validation against test loss, sized by the chance that it is the one
        chosen among ``budget`` draws; same axes for both. Trials far worse than the others are outside.
        """
        budget = min(max(budget, 1), self.largest)
        base = gate.removesuffix("+")
        shown = [name for name in (base, f"{base}+") if name in self.pools]
        figure, ax = sheet(9.6, 3.3)
        low, high = self._range
        reached = ", ".join(f"{name} {self._curves[name][budget - 1]:.4f}" for name in shown)
        after = f"after {budget} trial{'s' * (budget > 1)}"
        title = f"expected test loss {after}: {reached}"
        if len(shown) == 2:
            title += "\n" + self._ratio_in_words(*shown, budget)
        chart = Chart(
            ax,
            (0.6, 0.5, 4.2, 2.15),
            xlim=(0.0, float(np.log10(self.largest)) + 1e-9),
            ylim=self._range,
            xticks=(),
            yticks=(round(low, 3), round(high, 3)),
            xlabel="trials of random search (logarithmic)",
            title=title,
        )
        budgets = np.arange(1, self.largest + 1)
        for name in sorted(self._curves, key=lambda name: name in shown):  # the dark ones last, on top
            focus = name in shown
            style = {"linestyle": "--" if name.endswith("+") else "-"}
            chart.line(np.log10(budgets), self._curves[name], color=gate_color(name) if focus else PALE, **style)
            if focus:
                chart.line([np.log10(budget)], [self._curves[name][budget - 1]], color=gate_color(name), marker="o")
        if len(shown) == 2:
            loss, needed = self._curves[shown[0]][budget - 1], self._needed(shown[1], shown[0], budget)
            chart.line(np.log10([budget, needed or self.largest]), [loss, loss], color=INK, linestyle=":", linewidth=1)
        for tick in (1, 3, 10, 30, 100, 300):
            if tick <= self.largest:
                x, y = chart.place(np.log10(tick), low)
                ax.text(x, y - 0.05, str(tick), ha="center", va="top", fontsize=8)
        limits = self._limits(shown)
        for place, name in enumerate(shown):
            self._trials(ax, 5.6 + 2.15 * place, name, budget, limits)
        return figure

    def _needed(self, plus: str, gate: str, budget: int) -> int | None:
        reached = np.flatnonzero(self._curves[plus] <= self._curves[gate][budget - 1])
        return int(reached[0]) + 1 if len(reached) else None

    def _ratio_in_words(self, gate: str, plus: str, budget: int) -> str:
        needed = self._needed(plus, gate, budget)
        if needed is None:
            return f"{plus} does not reach {gate}'s loss with {self.largest} trials"
        ratio = budget / needed
        verdict = (
            f"{ratio:.2g} times fewer" if ratio > 1 else "as many" if ratio == 1 else f"{1 / ratio:.2g} times more"
        )
        return f"{plus} reaches {gate}'s loss with {needed}: {verdict}"

    def _limits(self, names: Sequence[str]) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of the validation and of the test axis: from the best trial of all to the tenth-worst per cent of each."""
        spans = []
        for column in (0, 1):
            parts = [self.pools[name][column][np.isfinite(self.pools[name].valid)] for name in names]
            low, high = min(part.min() for part in parts), max(np.quantile(part, 0.9) for part in parts)
            margin = 0.1 * (high - low) + 1e-6
            spans.append((float(low - margin), float(high + margin)))
        return spans[0], spans[1]

    def _trials(self, ax: Axes, left: float, name: str, budget: int, limits: Sequence[tuple[float, float]]) -> None:
        pool = self.pools[name]
        order = np.argsort(pool.valid, kind="stable")
        chance = rank_probabilities(len(order), budget)
        valid, test = pool.valid[order], pool.test[order]
        (left_end, right_end), (bottom, top) = limits
        chart = Chart(
            ax,
            (left, 0.5, 1.55, 2.15),
            xlim=limits[0],
            ylim=limits[1],
            xticks=_inside(left_end, right_end),
            yticks=_inside(bottom, top),
            xlabel=f"{name}: validation loss",
            title="test loss",
        )
        inside = (valid <= right_end) & (test <= top)
        x, y = chart.place(valid[inside], test[inside])
        ax.scatter(x, y, s=8 + 260 * chance[inside], color=gate_color(name), alpha=0.55, linewidth=0.5, edgecolor=INK)


def _inside(low: float, high: float) -> tuple[float, ...]:
    """Two round numbers near the ends of a range."""
    digits = max(0, 1 - int(np.floor(np.log10(high - low))))
    first, last = np.ceil(low * 10**digits) / 10**digits, np.floor(high * 10**digits) / 10**digits
    return tuple(dict.fromkeys((float(first), float(last))))
