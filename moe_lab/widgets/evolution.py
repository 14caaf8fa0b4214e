"""Views for notebook 08: experts that were just spawned, and a replay of how they part.

Each view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``. `SpawnView` spawns anew for each setting (milliseconds); the replay trains nothing.
Legend: T points on a line, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.experts import MLPExperts
from moe_lab.experts.evolve import expert_distances, spawn_experts
from moe_lab.plots.evolution import FAR, distance_table, experts_chart
from moe_lab.plots.sheet import INK, PALE, Chart, sheet

_SHADES = {"shared": "#FFFFFF", "soft": "#C8DCEB", "hard": "#E4E4E4"}


def _mean_pair(distances: Any) -> float:
    distances = np.asarray(distances, dtype=float)
    n = len(distances)
    return float(distances.sum() / max(1, n * (n - 1)))


class SpawnView:
    """A trained expert on a line, to be spawned with any mask ratio and noise.

    Args:
        expert: a bank whose expert 0 is the trained one, from 1 input to 1 output.
        x: (T, 1) points, in [-1, 1].
        target: (T, 1) what the expert was trained on.
        n_experts: E.
        ylim: range of the picture; what lies outside is cut off.
    """

    def __init__(
        self,
        expert: MLPExperts,
        x: Tensor,
        target: Tensor,
        n_experts: int = 6,
        ylim: tuple[float, float] = (-2.0, 2.0),
    ):
        self.expert, self.x, self.target, self.n_experts, self.ylim = expert, x, target, n_experts, ylim
        with torch.no_grad():
            self.loss_before = float((expert.single(0, x) - target).square().mean())

    @torch.no_grad()
    def view(
        self, mask_ratio: float = 0.1, noise: float = 0.0, neurons: float = 0.0, rescale: bool = False, seed: int = 0
    ) -> Figure:
        """The spawned functions, their mean (black) and the target (dotted); beside it, how far apart they are.

        Args:
            mask_ratio: share of weights set to 0.
            noise: in units of the weights' standard deviation.
            neurons: share of hidden units that start anew.
            rescale: divide what is left by 1 - mask_ratio.
            seed: of masks and noise.
        """
        many = spawn_experts(
            self.expert,
            self.n_experts,
            mask_ratio=mask_ratio,
            noise=noise,
            neurons=neurons,
            rescale=rescale,
            generator=torch.Generator().manual_seed(seed),
        )
        outputs = torch.stack([many.single(expert, self.x)[:, 0] for expert in range(self.n_experts)])
        distances = {name: value.numpy() for name, value in expert_distances(many, self.x).items()}
        errors = (outputs - self.target[:, 0]).square().mean(1)
        after = float((outputs.mean(0) - self.target[:, 0]).square().mean())
        figure, ax = sheet(8.6, 3.5)
        low, high = self.ylim
        chart = Chart(
            ax,
            (0.5, 0.5, 4.3, 2.6),
            xlim=(-1, 1),
            ylim=self.ylim,
            xticks=(-1, -0.5, 0, 0.5, 1),
            yticks=(low, 0, high),
            xlabel="x",
            title=f"{self.n_experts} experts from one: ρ = {mask_ratio:g}, σ = {noise:g}, neurons {neurons:g}",
        )
        experts_chart(chart, self.x, outputs, mixture=outputs.mean(0), target=self.target)
        distance_table(ax, (5.3, 1.4, 1.8, 1.7), distances["function"], title="distance in function")
        lines = (
            f"squared error before {self.loss_before:.3f},",
            f"of the mean {after:.3f}, of one expert {float(errors.mean()):.3f}",
            f"mean distance in function {_mean_pair(distances['function']):.2f}, in parameters "
            f"{_mean_pair(distances['parameter']):.2f}",
        )
        ax.text(5.05, 0.85, "\n".join(lines), va="top", fontsize=8.5, linespacing=1.5)
        return figure


class DivergenceReplay:
    """A training run from one expert to many, ready to be drawn at any moment that was written down.

    Args:
        x: (T, 1) points, in [-1, 1].
        target: (T, 1).
        rows: one per moment, with ``step``, ``phase`` ("shared", "soft", "hard"), ``outputs`` (E, T), ``weights``
            (T, E), ``function`` (E, E) and ``parameter`` (E, E) distances.
        ylim: range of the picture; what lies outside is cut off.

    Raises:
        ValueError: no rows, or a phase of another name.
    """

    def __init__(
        self, x: Tensor, target: Tensor, rows: Sequence[Mapping[str, Any]], ylim: tuple[float, float] = (-2.0, 2.0)
    ):
        if not rows:
            raise ValueError("nothing was written down: no rows to replay")
        unknown = {row["phase"] for row in rows} - set(_SHADES)
        if unknown:
            raise ValueError(f"phases are {', '.join(_SHADES)}; got {', '.join(sorted(unknown))}")
        self.x, self.target, self.rows, self.ylim = x, target, list(rows), ylim
        self.steps = [row["step"] for row in self.rows]

    def moment_of(self, step: int) -> int:
        """Index of the last moment that is not after ``step`` (0 if all are)."""
        return max((index for index, known in enumerate(self.steps) if known <= step), default=0)

    def view(self, moment: int = -1) -> Figure:
        """Experts as functions (thick where they have the largest weight), the mixture black, the target dotted.

        Right: distances between all pairs. Below: their mean over the run; shaded: soft phase, then hard.

        Args:
            moment: index into ``steps``; negative counts from the end, too late means the last.
        """
        moment = range(len(self.rows))[min(moment, len(self.rows) - 1)]
        row = self.rows[moment]
        outputs, weights = np.asarray(row["outputs"], dtype=float), np.asarray(row["weights"], dtype=float)
        mixture = (weights.T * outputs).sum(0)
        loss = float(((mixture - np.ravel(self.target)) ** 2).mean())
        is_shared = row["phase"] == "shared"
        figure, ax = sheet(8.6, 5.0)
        low, high = self.ylim
        asked = (weights > 0).sum(1).mean()
        chart = Chart(
            ax,
            (0.5, 2.0, 4.6, 2.6),
            xlim=(-1, 1),
            ylim=self.ylim,
            xticks=(-1, -0.5, 0, 0.5, 1),
            yticks=(low, 0, high),
            xlabel="x",
            title=f"step {row['step']}, {row['phase']}: {asked:.1f} experts per x, squared error {loss:.4f}",
        )
        shown = slice(0, 1) if is_shared else slice(None)
        experts_chart(chart, self.x, outputs[shown], mixture=mixture, target=self.target, weights=weights[:, shown])
        if is_shared:
            ax.plot((5.8, 7.9, 7.9, 5.8, 5.8), (2.2, 2.2, 4.6, 4.6, 2.2), color=PALE, linewidth=0.8)
            ax.text(6.85, 3.4, "one expert so far", ha="center", va="center", fontsize=10)
        else:
            distance_table(ax, (5.8, 2.2, 2.1, 2.4), row["function"], title="distance in function")
        self._draw_run(ax, moment)
        return figure

    def _draw_run(self, ax: Any, moment: int) -> None:
        last = max(self.steps[-1], self.steps[0] + 1)
        chart = Chart(
            ax,
            (0.5, 0.45, 7.4, 0.95),
            xlim=(self.steps[0], last),
            ylim=(0, FAR),
            xticks=sorted({self.steps[0], last, *(self._begins("soft")), *(self._begins("hard"))}),
            yticks=(0, 0.5, 1, FAR),
            xlabel="optimiser step",
            title="mean distance in function (black) and in parameters (dashed)",
        )
        for index, row in enumerate(self.rows[:-1]):
            chart.band(row["step"], self.steps[index + 1], color=_SHADES[row["phase"]])
        spawned = [row for row in self.rows if row["phase"] != "shared"]
        for name, style in (("function", "-"), ("parameter", "--")):
            values = [_mean_pair(row[name]) for row in spawned]
            chart.line([row["step"] for row in spawned], np.minimum(values, FAR), color=INK, linestyle=style)
        now = chart.place([self.steps[moment]] * 2, [0, FAR])
        ax.plot(*now, color="#D55E00", linewidth=2)

    def _begins(self, phase: str) -> list[int]:
        return [row["step"] for row in self.rows if row["phase"] == phase][:1]
