"""View for notebook 06: what a tuning budget buys. Arithmetic on finished trials, no training.

The view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from moe_lab.plots.sheet import INK, PALE, Chart, sheet
from moe_lab.plots.style import gate_color
from moe_lab.tuning import Pool, expected_best, rank_probabilities


class BudgetReplay:
    """Finished trials of several gates, ready to be drawn for any budget.

    Args:
        pools: gate -> its trials, all pools of one size.
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

        Left: curves of all gates pale, of this one dark, dashed with "+". Right: each trial of the gate, validation
        against test loss, sized by the chance that it is the one chosen among ``budget`` draws.
        """
        budget = min(max(budget, 1), self.largest)
        base = gate.removesuffix("+")
        shown = [name for name in (base, f"{base}+") if name in self.pools]
        figure, ax = sheet(9.6, 3.1)
        low, high = self._range
        chart = Chart(
            ax,
            (0.6, 0.5, 4.2, 2.15),
            xlim=(0.0, float(np.log10(self.largest)) + 1e-9),
            ylim=self._range,
            xticks=(),
            yticks=(round(low, 3), round(high, 3)),
            xlabel="trials of random search (logarithmic)",
            title=f"expected test loss after {budget} trials: "
            + ", ".join(f"{name} {self._curves[name][budget - 1]:.4f}" for name in shown),
        )
        budgets = np.arange(1, self.largest + 1)
        for name, curve in self._curves.items():
            style = {"linestyle": "--" if name.endswith("+") else "-"}
            focus = name in shown
            chart.line(np.log10(budgets), curve, color=gate_color(name) if focus else PALE, **style)
            if focus:
                chart.line([np.log10(budget)], [curve[budget - 1]], color=gate_color(name), marker="o")
        for tick in (1, 3, 10, 30, 100, 300):
            if tick <= self.largest:
                x, y = chart.place(np.log10(tick), low)
                ax.text(x, y - 0.05, str(tick), ha="center", va="top", fontsize=8)
        for place, name in enumerate(shown):
            self._trials(ax, 5.6 + 2.15 * place, name, budget)
        return figure

    def _trials(self, ax, left: float, name: str, budget: int) -> None:
        pool = self.pools[name]
        order = np.argsort(pool.valid, kind="stable")
        chance = rank_probabilities(len(order), budget)
        valid, test = pool.valid[order], pool.test[order]
        seen = np.isfinite(valid)
        limits = [(float(x[seen].min()), float(np.quantile(x[seen], 0.9))) for x in (valid, test)]
        limits = [(a - 0.1 * (b - a), b + 0.1 * (b - a) + 1e-6) for a, b in limits]
        chart = Chart(
            ax,
            (left, 0.5, 1.55, 2.15),
            xlim=limits[0],
            ylim=limits[1],
            xticks=(round(limits[0][0] + 0.005, 2), round(limits[0][1] - 0.005, 2)),
            yticks=(round(limits[1][0] + 0.005, 2), round(limits[1][1] - 0.005, 2)),
            xlabel=f"{name}: validation loss",
            title="test loss",
        )
        inside = seen & (valid <= limits[0][1]) & (test <= limits[1][1])
        x, y = chart.place(valid[inside], test[inside])
        ax.scatter(x, y, s=8 + 260 * chance[inside], color=gate_color(name), alpha=0.55, linewidth=0.5, edgecolor=INK)
