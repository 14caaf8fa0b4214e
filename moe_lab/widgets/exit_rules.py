"""Several rules side by side, a slider for each: accuracy, cost, who leaves where, and the pictures that go first and
last (notebook 12).

The view returns one closed figure in less than 0.2 s. Legend: N samples, L exits, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.exits.policies import CONFIDENCES, apply_thresholds, confidence, geometric_thresholds
from moe_lab.names import check_name
from moe_lab.plots.sheet import INK, sheet
from moe_lab.plots.style import expert_colors
from moe_lab.widgets.exits import Setting, tradeoff_chart

RULES = {
    "probability": ("largest probability ≥", "#D55E00", "s"),
    "entropy": ("entropy (nats) ≤", "#0072B2", "o"),
    "margin": ("margin ≥", "#009E73", "D"),
    "ratio": ("geometric shares, ratio", "#E69F00", "^"),
}
"""Rule -> what its number means, colour, marker."""

_GRIDS = {
    "probability": np.linspace(0.1, 1, 31),
    "entropy": np.linspace(0, 2.3, 31),
    "margin": np.linspace(0, 1, 31),
    "ratio": np.geomspace(0.15, 5, 25),
}
_SHOWN = 6  # pictures that leave first, and as many that leave last


class RulesView:
    """A trained network's answers, to be cut by four rules.

    Args:
        logits: (N, L, K) on the samples that are shown.
        labels: (N,).
        costs: (L,) relative, the last is 1.
        known: (M, L, K) logits on the samples that geometric thresholds are set on.
        images: (N, H, W), drawn in grey.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(self, logits: Tensor, labels: Tensor, costs: Tensor, known: Tensor, images: Tensor):
        n, n_exits, _ = logits.shape
        if labels.shape != (n,) or costs.shape != (n_exits,) or known.shape[1:] != logits.shape[1:]:
            raise ValueError(
                f"logits (N, L, K) {tuple(logits.shape)}, labels {tuple(labels.shape)}, costs {tuple(costs.shape)} and "
                f"known logits {tuple(known.shape)} do not fit"
            )
        if images.dim() != 3 or len(images) != n:
            raise ValueError(f"images must be ({n}, H, W), got {tuple(images.shape)}")
        self.right = logits.argmax(-1) == labels.unsqueeze(1)
        self.costs, self.images = costs.double(), images
        self.sure = {name: confidence(logits, name) for name in CONFIDENCES}
        self.known = confidence(known).cpu().float()
        self.curves = {rule: [self.at(rule, float(value)) for value in grid] for rule, grid in _GRIDS.items()}
        self.accuracies = [setting.accuracy for curve in self.curves.values() for setting in curve]

    def at(self, rule: str, value: float) -> Setting:
        """Cost, accuracy, shares and exits of one rule, a key of `RULES`, at its number."""
        check_name("rule", rule, RULES)
        if rule == "ratio":
            exits = apply_thresholds(self.sure["probability"], geometric_thresholds(self.known, value))
        else:
            threshold = -value if rule == "entropy" else value
            exits = apply_thresholds(self.sure[rule], torch.full((len(self.costs),), threshold))
        right = self.right.gather(1, exits[:, None]).double().mean()
        shares = torch.bincount(exits, minlength=len(self.costs)).double() / len(exits)
        return Setting(float(self.costs[exits].mean()), float(right), shares.tolist(), exits)

    def first_and_last(self, exits: Tensor) -> tuple[Tensor, Tensor]:
        """Samples that leave first (the surest at the first exit in use) and last (the least sure there)."""
        sure = self.sure["probability"][:, 0]
        order = (exits.double() - sure.double()).argsort()  # confidences are below 1: exits first
        n = min(_SHOWN, len(order) // 2)
        return order[:n], order[len(order) - n :].flip(0)

    def view(
        self,
        probability: float = 0.8,
        entropy: float = 0.6,
        margin: float = 0.6,
        ratio: float = 1.0,
        pictures: str = "probability",
    ) -> Figure:
        """Left: accuracy against cost, every rule and where it stands. Right: who leaves where. Below: pictures.

        Args:
            probability, margin: least value that leaves, in [0, 1].
            entropy: greatest value that leaves, nats.
            ratio: of neighbouring shares, positive.
            pictures: the rule whose pictures are shown.
        """
        check_name("rule", pictures, RULES)
        values = {"probability": probability, "entropy": entropy, "margin": margin, "ratio": ratio}
        now = {rule: self.at(rule, value) for rule, value in values.items()}
        figure, ax = sheet(9.4, 4.9)
        chart = tradeoff_chart(ax, (0.55, 2.2, 3.7, 2.35), self.accuracies)
        for index, (rule, (means, color, marker)) in enumerate(RULES.items()):
            curve = [(setting.cost, 100 * setting.accuracy) for setting in self.curves[rule]]
            chart.line(*zip(*curve, strict=True), color=color, linewidth=1.2)
            here = now[rule]
            style = {"color": color, "marker": marker, "markersize": 9, "markeredgecolor": INK}
            chart.line([here.cost], [100 * here.accuracy], **style)
            text = f"{means} {values[rule]:.2f}: cost {here.cost:.2f}, accuracy {100 * here.accuracy:.1f} %"
            self._bar(figure, 4.18 - 0.62 * index, here.shares, text, color, marker)
        ax.text(5.0, 2.1, "numbers: exit; lengths: share of samples", fontsize=8, color=INK, va="top")
        self._strip(figure, now[pictures].exits, pictures)
        return figure

    def _bar(self, figure: Figure, y: float, shares: list[float], text: str, color: str, marker: str) -> None:
        ax, left, width = figure.axes[0], 5.0, 4.1
        ax.plot([left - 0.2], [y + 0.34], color=color, marker=marker, markersize=7, markeredgecolor=INK)
        ax.text(left, y + 0.26, text, fontsize=8.5, va="bottom")
        for level, (share, shade) in enumerate(zip(shares, expert_colors(len(shares)), strict=True), 1):
            ax.fill_between([left, left + width * share], y, y + 0.22, color=shade, edgecolor="white", linewidth=0.5)
            if share > 0.05:
                ink = "white" if shade in ("#0072B2", "#222222", "#D55E00", "#009E73") else INK
                ax.text(left + width * share / 2, y + 0.1, str(level), ha="center", va="center", fontsize=8, color=ink)
            left += width * share

    def _strip(self, figure: Figure, exits: Tensor, rule: str) -> None:
        ax, side = figure.axes[0], 0.62
        for place, (chosen, what) in enumerate(zip(self.first_and_last(exits), ("first", "last"), strict=True)):
            left = 0.55 + 4.45 * place
            ax.text(left, 1.3, f"leave {what} ({rule}): exit, ✓ right ✗ wrong", fontsize=9, va="bottom")
            for index in chosen.tolist():
                extent = (left, left + side, 0.55, 0.55 + side)
                ax.imshow(self.images[index].numpy(), cmap="gray", extent=extent, aspect="auto", zorder=1)
                level = int(exits[index])
                mark = "✓" if self.right[index, level] else "✗"
                ax.text(left + side / 2, 0.5, f"{level + 1} {mark}", ha="center", va="top", fontsize=9)
                left += side + 0.08
        ax.set(xlim=(0, figure.get_figwidth()), ylim=(0, figure.get_figheight()), autoscale_on=False)
