"""Views for notebook 05: Sinkhorn at a temperature, and a recorded permutation search step by step.

Each view returns one closed figure, so that it is shown once: as the value of a cell, or by ``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from moe_lab.gates.sinkhorn import best_assignment, row_error, sinkhorn
from moe_lab.plots.search import draw_matrix
from moe_lab.plots.sheet import INK, Chart, sheet

_ITERATIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def sinkhorn_view(tau: float = 0.01, iterations: int = 20, n_experts: int = 8, seed: int = 0) -> Figure:
    """P = Sinkhorn(L / tau) for one L at its initial size; rings: the best assignment of L.

    Right: the row error after 1 to 500 iterations at that temperature; the dot is where ``iterations`` stands.

    Args:
        tau: temperature, positive; L lies in [-0.05, 0.05].
        iterations: 1 or more.
        n_experts: E.
        seed: of L.
    """
    logits = 0.05 * (2 * torch.rand(n_experts, n_experts, generator=torch.Generator().manual_seed(seed)) - 1)
    matrix = sinkhorn(logits / tau, iterations)
    error = float(row_error(matrix))
    figure, ax = sheet(7.6, 3.2)
    agrees = torch.equal(best_assignment(matrix), best_assignment(logits))
    title = f"τ = {tau:.2g}, {iterations} iterations"
    draw_matrix(ax, (0.45, 0.4, 2.4, 2.4), matrix, best_assignment(logits).tolist(), title=title)
    counts = [count for count in _ITERATIONS if count <= 200 or tau < 1e-3]
    errors = [float(row_error(sinkhorn(logits / tau, count))) for count in counts]
    chart = Chart(
        ax,
        (4.3, 0.6, 2.9, 1.9),
        xlim=(0, np.log10(500)),
        ylim=(-6, 0.5),
        xticks=(0, 1, 2),
        yticks=(-6, -4, -2, 0),
        xlabel="log₁₀ iterations",
        title="log₁₀ row error",
    )
    chart.line((0, np.log10(500)), (-2, -2), color="#BBBBBB", linestyle=":")
    chart.line(np.log10(counts), np.log10(np.maximum(errors, 1e-6)), color="#0072B2", marker=".")
    chart.line([np.log10(iterations)], [np.log10(max(error, 1e-6))], color="#D55E00", marker="o")
    verdict = "same best assignment as L" if agrees else "another best assignment than L"
    ax.text(4.3, 2.85, f"row error {error:.2g}; {verdict}", fontsize=9, color=INK)
    return figure


class SearchReplay:
    """A recorded search (``curves["search"]`` of a `comet_search` Result), one figure per record.

    Args:
        rows: the records: step, temperature, row_error, soft_hard_distance, assignment, matrix.
        target: the permutation that would be right, if it is known.
        title: what is replayed.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], target: Sequence[int] | None = None, title: str = ""):
        if not rows:
            raise ValueError("nothing to replay: the Result has no curve 'search' (was it a run without search?)")
        self.rows, self.target, self.title = list(rows), target, title

    @property
    def last(self) -> int:
        """Index of the last record."""
        return len(self.rows) - 1

    def view(self, record: int = 0) -> Figure:
        """The soft matrix of record 0 .. ``last``, the permutation it would be rounded to (rings), and two curves."""
        row = self.rows[record]
        figure, ax = sheet(7.6, 3.4)
        state = "hard" if row["hardened"] else f"τ = {row['temperature']:.2g}"
        title = f"step {row['step']}, {state}"
        draw_matrix(ax, (0.45, 0.4, 2.4, 2.4), row["matrix"], row["assignment"], title=title)
        steps = [other["step"] for other in self.rows]
        n = len(row["matrix"])
        curves = (
            ("row error", [other["row_error"] for other in self.rows], 1.0, 2.0),
            ("distance from soft to hard, ‖P − Π‖", [other["soft_hard_distance"] for other in self.rows], 1.0, 0.5),
        )
        for name, values, least, bottom in curves:
            top = max(least, *values) * 1.05
            chart = Chart(
                ax,
                (4.2, bottom, 3.0, 0.8),
                xlim=(0, steps[-1]),
                ylim=(-0.05 * top, top),
                xticks=(0, steps[-1]),
                yticks=(0, round(top / 1.05, 1)),
                xlabel="step" if bottom < 1 else "",
                title=name,
            )
            chart.line(steps, values, color="#0072B2", marker=".", markersize=3)
            chart.line([row["step"]] * 2, (-0.05 * top, top), color="#D55E00", linewidth=1)
        words = self.title
        if self.target is not None:
            right = sum(a == b for a, b in zip(row["assignment"], self.target, strict=True))
            words = f"{words}  {right} of {n} outputs at the right expert".strip()
        ax.text(0.15, 3.28, words, fontsize=10, weight="bold", va="top")
        return figure
