"""Views for notebook 01: what a gate does to logits, and how the routing of planted clusters develops.

Each view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure

from moe_lab.plots.sheet import PALE, Chart, draw_table, sheet
from moe_lab.results import Result

_TOKENS, _EXPERTS = 5, 6


def weights_view(scale: float = 1.0, k: int = 2) -> Figure:
    """Five tokens with fixed random logits over six experts, times ``scale``: softmax beside top-k.

    A number is written wherever an expert runs, also where it reads 0.00; an empty cell is an exact zero.

    Args:
        scale: of the logits, 0 or more; 1 / scale is the temperature.
        k: experts that top-k keeps, 1 .. 6. (For k = 1 its weight is 1, whatever the logits: it cannot learn.)
    """
    logits = scale * torch.randn(_TOKENS, _EXPERTS, generator=torch.Generator().manual_seed(4))
    kept, experts = logits.topk(k, dim=-1)
    tables = {
        f"softmax: {_TOKENS * _EXPERTS} of {_TOKENS * _EXPERTS} expert runs": logits.softmax(-1),
        f"top-{k}: {_TOKENS * k} of {_TOKENS * _EXPERTS}": torch.zeros_like(logits).scatter(
            -1, experts, kept.softmax(-1)
        ),
    }
    figure, ax = sheet(8.6, 2.6)
    for place, (title, weights) in enumerate(tables.items()):
        box = (0.4 + 4.2 * place, 0.35, 3.7, 1.85)
        draw_table(ax, box, weights, numbers=True, xlabel="expert", ylabel="token", title=title)
    return figure


class ConfusionReplay:
    """Routing of planted clusters by one Result per gate, ready to be drawn at any evaluation.

    Args:
        results: label -> Result of `moe_lab.experiments.planted_gates`, all with equally many evaluations.

    Raises:
        ValueError: no Results, or records of different length.
    """

    def __init__(self, results: Mapping[str, Result]):
        lengths = {len(result.curves["confusion"]) for result in results.values()}
        if len(lengths) != 1:
            raise ValueError(f"need Results with equally many evaluations; got lengths {sorted(lengths)}")
        self._results = dict(results)
        self.last = lengths.pop() - 1

    def view(self, label: str, index: int = -1) -> Figure:
        """Share of each cluster's tokens per expert at one evaluation; purity and experts in use over training.

        Args:
            label: of a Result.
            index: evaluation, 0 is before training; negative counts from the end.
        """
        curves = self._results[label].curves
        table = np.asarray(curves["confusion"][index]["table"], dtype=float)
        rows = curves["epochs"]
        now, steps, n_experts = rows[index], [row["step"] for row in rows], table.shape[1]
        figure, ax = sheet(8.6, 3.0)
        draw_table(
            ax,
            (0.45, 0.4, 2.5, 2.2),
            table / table.sum(1, keepdims=True).clip(1),
            xlabel="expert",
            ylabel="planted cluster",
            title=f"{label}, step {now['step']}: purity {now['purity']:.2f}",
        )
        limits = {"xlim": (0, steps[-1]), "xticks": (0, steps[-1]), "xlabel": "step"}
        purity = Chart(ax, (3.7, 0.5, 1.9, 1.9), ylim=(0, 1.05), yticks=(0, 0.5, 1), title="purity", **limits)
        in_use = Chart(
            ax, (6.4, 0.5, 1.9, 1.9), ylim=(0, n_experts + 0.5), yticks=(0, n_experts), title="experts in use", **limits
        )
        purity.line([0, steps[-1]], [1 / len(table)] * 2, color=PALE, linestyle="--", linewidth=1)
        for chart, name in ((purity, "purity"), (in_use, "used")):
            chart.line(steps, [row[name] for row in rows], color="#0072B2")
            chart.line([now["step"]], [now[name]], color="#D55E00", marker="o")
        return figure
