"""Views for notebook 02: plain functions from numbers to a figure, cheap enough for a slider (under 0.2 s).

Each view returns one closed figure, so that it is shown once: as the value of a cell, or by ``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.gates.comet import CometGate
from moe_lab.gates.smooth_step import smooth_step
from moe_lab.plots.sheet import INK, Box, Chart, sheet
from moe_lab.plots.trees import draw_partition, draw_shares, draw_tree, node_reach, plane

MAX_DEPTH = 4
_RESOLUTION = 60


def smooth_step_view(gamma: float = 1.0) -> Figure:
    """S_gamma and its slope over t in [-1.5, 1.5]; the shaded band, of width gamma, is where a split is undecided.

    Dotted: a logistic function with the same slope at 0. It never reaches 0 or 1.

    Args:
        gamma: width, positive.
    """
    t = torch.linspace(-1.5, 1.5, 601, requires_grad=True)
    s = smooth_step(t, gamma)
    (slope,) = torch.autograd.grad(s.sum(), t)
    figure, ax = sheet(7.6, 2.6)
    x, band = t.detach(), {"color": "#BBBBBB", "alpha": 0.35}
    left = Chart(
        ax,
        (0.45, 0.45, 3.0, 1.8),
        xlim=(-1.5, 1.5),
        ylim=(-0.05, 1.05),
        xticks=(-1, 0, 1),
        yticks=(0, 0.5, 1),
        xlabel="t",
        title=f"probability of going left, γ = {gamma:g}",
    )
    left.band(-gamma / 2, gamma / 2, **band)
    left.line(x, s.detach(), color="#0072B2")
    left.line(x, torch.sigmoid(6 * x / gamma), color="#777777", linestyle=":")
    right = Chart(
        ax,
        (4.3, 0.45, 3.0, 1.8),
        xlim=(-1.5, 1.5),
        ylim=(-0.1, 3.3),
        xticks=(-1, 0, 1),
        yticks=(0, 1, 2, 3),
        xlabel="t",
        title=f"slope: {1.5 / gamma:.2f} at 0, exactly 0 outside",
    )
    right.band(-gamma / 2, gamma / 2, **band)
    right.line(x, slope, color="#D55E00")
    return figure


@cache
def _random_splits(k: int) -> tuple[Tensor, Tensor]:
    """Weights (15, 2, k) and biases (15, k) of split nodes: random directions, each halving what reaches it.

    Heap order makes the trees nested: a tree of depth d uses the first 2^d - 1 of them.
    """
    generator = torch.Generator().manual_seed(12)
    x = plane(61)
    weight = torch.zeros(2**MAX_DEPTH - 1, 2, k)
    bias = torch.zeros(2**MAX_DEPTH - 1, k)
    for tree in range(k):
        arrived = {0: torch.ones(len(x), dtype=torch.bool)}
        for node in range(len(weight)):
            angle = 2 * torch.pi * torch.rand((), generator=generator)
            direction = 2 * torch.stack((angle.cos(), angle.sin()))
            z = x @ direction
            middle = z[arrived[node]].median()
            weight[node, :, tree], bias[node, tree] = direction, -middle
            arrived[2 * node + 1] = arrived[node] & (z > middle)
            arrived[2 * node + 2] = arrived[node] & (z <= middle)
    return weight, bias


def random_tree_gate(depth: int, k: int, gamma: float) -> CometGate:
    """A COMET gate on 2-D inputs with 2^depth experts: fixed random splits that halve their region, leaf logits 0."""
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth must be 1 .. {MAX_DEPTH}, got {depth}")
    weight, bias = _random_splits(k)
    n_experts = 2**depth
    leaf_weight, leaf_bias = torch.zeros(n_experts, 2, k), torch.zeros(n_experts, k)
    return CometGate.from_arrays(
        weight[: n_experts - 1], bias[: n_experts - 1], leaf_weight, leaf_bias, gamma=gamma
    ).eval()


def tree_view(depth: int = 2, k: int = 2, gamma: float = 0.5, x1: float = 0.3, x2: float = -0.4) -> Figure:
    """k trees of a given depth, the plane as each tree cuts it, and what becomes of one input.

    Upper row: each tree, nodes sized by the share of the whole square that arrives; the thick path and the percentages
    belong to the input (x1, x2). Lower row: each tree's partition of the square. Last column: the combined weights of
    the input (above), the plane in combined weights (below).

    Args:
        depth: levels of splits, 1 .. 4: 2^depth experts.
        k: trees, 1 .. 3.
        gamma: width of the smooth-step: how soft the borders are.
        x1, x2: the input, in [-1, 1].
    """
    gate = random_tree_gate(depth, k, gamma)
    point = torch.tensor([[x1, x2]])
    squares = plane(_RESOLUTION)
    with torch.no_grad():
        whole, one = gate(squares), gate(point)
    reach, path = node_reach(gate, squares).mean(-1), node_reach(gate, point)[..., 0]
    figure, ax = sheet(2.4 * (k + 1) + 0.2, 4.5)
    for tree in range(k):
        x = 0.3 + 2.4 * tree
        draw_tree(ax, (x - 0.1, 2.45, 2.2, 1.95), reach[:, tree], path=path[:, tree], title=f"tree {tree}")
        draw_partition(ax, (x, 0.3, 2.0, 2.0), whole.details["tree_probabilities"][..., tree], point=(x1, x2))
    x = 0.4 + 2.4 * k
    n_used = int(one.experts_per_token[0])
    title = f"this input: {n_used} of {2**depth} experts"
    draw_shares(ax, (x - 0.1, 2.85, 2.1, 1.55), one.weights[0], title=title)
    draw_partition(ax, (x, 0.3, 2.0, 2.0), whole.weights, point=(x1, x2), title="all trees together")
    return figure


class EntropyReplay:
    """Snapshots of gates during training, one series per entropy weight, ready to be drawn at any step.

    Args:
        snapshots: entropy weight -> rows in order of time, each with ``step``, ``mse``, ``experts_per_token`` and
            ``gate`` (the gate's ``state_dict`` as lists).
        n_experts, k, gamma: of the recorded gates, which have 2-D inputs.

    Raises:
        ValueError: no snapshots, or series of different length.
    """

    def __init__(self, snapshots: Mapping[float, Sequence[Mapping[str, Any]]], *, n_experts: int, k: int, gamma: float):
        lengths = {len(rows) for rows in snapshots.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"need series of one length, at least one snapshot each; got lengths {sorted(lengths)}")
        self.snapshots = dict(snapshots)
        self.length = lengths.pop()
        self.k = k
        self._gate = CometGate(2, n_experts, k, gamma).eval()
        self._squares = plane(_RESOLUTION)

    def gate(self, entropy_weight: float, index: int) -> CometGate:
        """The gate as it was at snapshot ``index`` (the same object at each call, filled anew)."""
        state = self.snapshots[entropy_weight][index]["gate"]
        self._gate.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
        return self._gate

    def view(self, entropy_weight: float, index: int = -1) -> Figure:
        """Trees (nodes sized by mean reach), the plane in combined weights, and experts per token over training.

        Args:
            entropy_weight: one of the recorded weights.
            index: snapshot; negative counts from the end.
        """
        rows = self.snapshots[entropy_weight]
        gate = self.gate(entropy_weight, index)
        with torch.no_grad():
            weights = gate(self._squares).weights
        reach = node_reach(gate, self._squares).mean(-1)
        figure, sheet_ax = sheet(9.6, 2.8)
        for tree in range(self.k):
            width = 3.7 / self.k
            draw_tree(sheet_ax, (0.1 + width * tree, 0.1, width - 0.2, 2.6), reach[:, tree], title=f"tree {tree}")
        title = f"step {rows[index]['step']}, λ = {entropy_weight:g}"
        draw_partition(sheet_ax, (4.1, 0.3, 2.15, 2.15), weights, title=title)
        self._draw_curves(sheet_ax, (6.9, 0.45, 2.2, 2.0), entropy_weight, index)
        return figure

    def _draw_curves(self, ax: Axes, box: Box, entropy_weight: float, index: int) -> None:
        now = self.snapshots[entropy_weight][index]
        last = self.snapshots[entropy_weight][-1]["step"]
        n_experts = self._gate.n_experts
        chart = Chart(
            ax,
            box,
            xlim=(0, max(last, 1)),
            ylim=(0, 1.03 * n_experts),
            xticks=(0, last),
            yticks=(0, self.k, n_experts),
            xlabel="step",
            title=f"experts per token: {now['experts_per_token']:.2f}",
        )
        chart.line((0, last), (self.k, self.k), color=INK, linewidth=0.7)
        for place, (weight, rows) in enumerate(self.snapshots.items()):
            chart.line(
                [row["step"] for row in rows],
                [row["experts_per_token"] for row in rows],
                color="#0072B2" if weight == entropy_weight else "#AAAAAA",
                linewidth=2.2 if weight == entropy_weight else 1.2,
                linestyle=("-", "--", ":", "-.")[place % 4],
            )
            ax.text(
                box[0] + box[2] + 0.05,
                chart.place(0, rows[-1]["experts_per_token"])[1],
                f"λ {weight:g}",
                va="center",
                fontsize=8,
            )
        chart.line([now["step"]], [now["experts_per_token"]], marker="o", color=INK)
