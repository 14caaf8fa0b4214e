"""View for notebook 09: what another schedule would have done with the logits of a real run.

Replayed: the logits of some tokens, taken from a run whose gate stayed dense, so that all of them are known. Computed
for each setting: temperature, noise, who passes, weights. Not computed: how the logits would have grown under that
schedule; a gate whose experts are dropped learns otherwise.

Legend: S recorded evaluations, P moments drawn, T tokens, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moe_lab.gates.schedules import TemperatureSchedule
from moe_lab.plots.sheet import INK, PALE, Chart, sheet
from moe_lab.plots.sparsity import draw_scale, draw_token
from moe_lab.results import Result

HARD_AFTER = 1.2
"""The hard switch comes at 1.2 times the length of the soft phase (the authors' WMT scripts: 5,000 and 6,000 steps)."""

_SMALLEST = 5e-5  # recorded weights are rounded to four decimals


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def passing(q: np.ndarray, threshold: float) -> np.ndarray:
    """The soft phase's mask: q above the threshold, and the best expert in any case. q (..., E) -> bool (..., E)."""
    return (q > threshold) | (np.arange(q.shape[-1]) == q.argmax(-1)[..., None])


class Simulation(NamedTuple):
    """One setting played through.

    ``step``, ``temperature``, ``hard`` (bool), ``experts`` (mean experts per token with the noise of training),
    ``quiet`` (without noise, as in evaluation): (P,). ``weights``: (P, T, E), p where an expert runs without noise.
    """

    step: np.ndarray
    temperature: np.ndarray
    hard: np.ndarray
    experts: np.ndarray
    quiet: np.ndarray
    weights: np.ndarray


class ScheduleReplay:
    """The logits of a run that stayed dense, to be put under any schedule.

    Between two evaluations the logits are interpolated. Noise is drawn once: all settings see the same.

    Args:
        result: of `moe_lab.experiments.evomoe_language`, gate "dts" with ``threshold=0``, ``hard_share=1``,
            ``weights_from="softmax"``: the watched weights are then p, all of it.
        layer: which mixture.
        labels: what to call the watched tokens.
        shown: which tokens get a map, four at most; None: evenly spaced.
        points: P.

    Raises:
        ValueError: the run watched no tokens, or its weights are not those of a dense gate.
    """

    def __init__(
        self,
        result: Result,
        labels: Sequence[str],
        *,
        layer: int = 0,
        shown: Sequence[int] | None = None,
        points: int = 61,
    ):
        rows = [row for row in result.curves.get("watched", []) if row["layer"] == layer]
        if not rows:
            raise ValueError(f"the Result watched no tokens in layer {layer}; run it with watched_tokens > 0")
        p = np.asarray([row["weights"] for row in rows], dtype=float)
        if np.abs(p.sum(-1) - 1).max() > 0.01:
            raise ValueError(
                "rows of weights do not sum to 1: the gate dropped experts, so their logits are unknown; take a run "
                "with threshold=0, hard_share=1, weights_from='softmax'"
            )
        if len(labels) != p.shape[1]:
            raise ValueError(f"{p.shape[1]} tokens were watched, but there are {len(labels)} labels")
        self.labels = list(labels)
        self.n_steps = int(rows[-1]["step"])
        self.recorded_steps = np.array([row["step"] for row in rows])
        logits = np.log(p.clip(_SMALLEST))
        self.recorded_logits = logits - logits.mean(-1, keepdims=True)  # (S, T, E); a constant changes nothing
        n_tokens, self.n_experts = p.shape[1:]
        self.shown = list(np.linspace(0, n_tokens - 1, 6).astype(int)[1:5]) if shown is None else list(shown)[:4]
        self.step = np.unique(np.linspace(0, self.n_steps, points).round().astype(int))
        self.logits = self._at(self.step)
        self._noise = np.random.default_rng(0).gumbel(size=self.logits.shape)

    @property
    def sigma(self) -> np.ndarray:
        """(S,) mean standard deviation of a token's logits over the experts at each evaluation."""
        return self.recorded_logits.std(-1).mean(-1)

    def _at(self, steps: np.ndarray) -> np.ndarray:
        after = np.searchsorted(self.recorded_steps, steps).clip(1, max(1, len(self.recorded_steps) - 1))
        if len(self.recorded_steps) == 1:
            return np.repeat(self.recorded_logits, len(steps), axis=0)
        first, second = self.recorded_steps[after - 1], self.recorded_steps[after]
        share = ((steps - first) / (second - first))[:, None, None]
        return (1 - share) * self.recorded_logits[after - 1] + share * self.recorded_logits[after]

    def simulate(
        self,
        tau_start: float = 2.0,
        tau_end: float = 0.3,
        soft_share: float = 0.5,
        threshold: float = 1e-3,
        kind: str = "linear",
        hard: bool = True,
    ) -> Simulation:
        """Play one setting through.

        Args:
            tau_start, tau_end, kind: see `TemperatureSchedule`.
            soft_share: share of the run in which the temperature falls.
            threshold: c, in [0, 1).
            hard: switch to one expert at `HARD_AFTER` times the soft phase (if that is within the run).

        Raises:
            ValueError: values that no gate would take.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}")
        if not 0 <= soft_share <= 1:
            raise ValueError(f"soft_share is a share, in [0, 1]; got {soft_share}")
        length = max(1, round(soft_share * self.n_steps))
        schedule = TemperatureSchedule(tau_start, tau_end, length, kind)
        temperature = np.array([schedule(int(step)) for step in self.step])
        is_hard = self.step >= HARD_AFTER * length if hard else np.zeros(len(self.step), dtype=bool)
        tau = temperature[:, None, None]
        noisy = passing(softmax((self.logits + self._noise) / tau), threshold)
        quiet = passing(softmax(self.logits / tau), threshold)
        best = passing(self.logits, np.inf)
        quiet = np.where(is_hard[:, None, None], best, quiet)
        experts = np.where(is_hard, 1.0, noisy.sum(-1).mean(-1))
        weights = softmax(self.logits) * quiet
        return Simulation(self.step, temperature, is_hard, experts, quiet.sum(-1).mean(-1), weights)

    def view(
        self,
        tau_start: float = 2.0,
        tau_end: float = 0.3,
        soft_share: float = 0.5,
        threshold: float = 1e-3,
        kind: str = "linear",
        hard: bool = True,
    ) -> Figure:
        """Temperature and experts per token over the steps, and the weights of a few tokens. Arguments: `simulate`.

        Solid: with the noise of training. Dashed: without, as are the maps. Dotted: the hard switch.
        """
        played = self.simulate(tau_start, tau_end, soft_share, threshold, kind, hard)
        figure, ax = sheet(9.9, 4.1)
        xlim, limits = (0, self.n_steps), {"xlim": (0, self.n_steps), "xticks": (0, self.n_steps)}
        top = max(2.0, float(played.temperature.max()))
        tau = Chart(
            ax,
            (0.45, 2.85, 3.5, 0.85),
            ylim=(0, top * 1.05),
            yticks=(0, round(top, 2)),
            title=f"temperature τ: {played.temperature[0]:g} to {played.temperature[-1]:.2g}",
            **limits,
        )
        tau.line(played.step, played.temperature, color="#D55E00")
        mean, end = played.experts.mean(), played.experts[-1]
        count = Chart(
            ax,
            (0.45, 0.5, 3.5, 1.85),
            ylim=(0, self.n_experts * 1.05),
            yticks=(1, self.n_experts),
            xlabel="step",
            title=f"experts per token: {mean:.2f} over the run, {end:.2f} at the end",
            **limits,
        )
        count.line(xlim, (1, 1), color=PALE, linewidth=0.8)
        count.line(played.step, played.quiet, color="#56B4E9", linestyle="--")
        count.line(played.step, played.experts, color="#0072B2")
        switch = None
        if played.hard.any():
            switch = played.step[played.hard][0] / self.n_steps
            for chart in (tau, count):
                chart.line((switch * self.n_steps,) * 2, chart.ylim, color=INK, linewidth=1, linestyle=":")
        ax.text(0.45, 0.1, "— with noise (training)", va="center", fontsize=8, color="#0072B2")
        ax.text(3.95, 0.1, "- - without (evaluation)", ha="right", va="center", fontsize=8, color="#56B4E9")
        largest = float(softmax(self.logits[:, self.shown]).max())
        places = itertools.product((2.3, 0.5), (4.55, 7.0))
        for (y, x), token in zip(places, self.shown, strict=False):
            box = (x, y, 2.15, 1.4)
            draw_token(ax, box, played.weights[:, token], title=self.labels[token], largest=largest, switch=switch)
        ax.text(6.85, 0.3, "step", ha="center", va="top", fontsize=9)
        ax.text(4.2, 2.1, "expert", ha="center", va="center", rotation=90, fontsize=9)
        draw_scale(ax, (9.3, 2.55, 0.13, 1.0), largest)
        return figure
