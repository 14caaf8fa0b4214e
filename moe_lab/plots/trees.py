"""Draw a COMET gate: its trees (nodes sized by how much arrives), and the plane cut into experts.

Taught in notebook 02. Legend: T tokens, E experts, K trees, V = 2E - 1 nodes of a tree in heap order.

All functions draw into a box (x, y, width, height) of a sheet (`moe_lab.plots.sheet`), so that several trees and maps
share one pair of axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from torch import Tensor

from moe_lab.gates.comet import CometGate
from moe_lab.gates.trees import walk_levels
from moe_lab.plots.sheet import INK, PALE, Box
from moe_lab.plots.style import expert_colors


def left_to_right_leaves(n_experts: int) -> list[int]:
    """Heap numbers of the E leaves from left to right: leaf i of this list feeds expert i. E = 5: 7, 8, 4, 5, 6."""
    n_splits, leaves, open_nodes = n_experts - 1, [], [0]
    while open_nodes:
        node = open_nodes.pop()
        if node < n_splits:
            open_nodes += [2 * node + 2, 2 * node + 1]  # the left child is taken first
        else:
            leaves.append(node)
    return leaves


def node_positions(n_experts: int) -> np.ndarray:
    """(V, 2) places in the unit square, heap order: root on top, leaves evenly spaced, splits above their children."""
    n_nodes = 2 * n_experts - 1
    place = np.zeros((n_nodes, 2))
    depth = np.floor(np.log2(np.arange(1, n_nodes + 1)))
    place[:, 1] = 1 - depth / max(depth.max(), 1)
    place[left_to_right_leaves(n_experts), 0] = (np.arange(n_experts) + 0.5) / n_experts
    for node in reversed(range(n_experts - 1)):
        place[node, 0] = place[[2 * node + 1, 2 * node + 2], 0].mean()
    return place


@torch.no_grad()
def node_reach(gate: CometGate, x: Tensor | None = None) -> Tensor:
    """(V, K, T) probability with which each token arrives at each node, heap order; a static gate gives T = 1."""
    split_logits = gate.split.tokens_last(x)
    reach, leaves = walk_levels(split_logits, gate.gamma)
    nodes = split_logits.new_zeros(2 * gate.n_experts - 1, *split_logits.shape[1:])
    if reach:
        nodes[: gate.n_experts - 1] = torch.cat(reach)
    nodes[left_to_right_leaves(gate.n_experts)] = leaves
    return nodes


def draw_tree(
    ax: Axes, box: Box, reach: np.ndarray | Tensor, *, path: np.ndarray | Tensor | None = None, title: str = ""
) -> None:
    """One tree. The area of a node is its mean reach; leaves are squares in their expert's colour.

    Args:
        ax: a sheet.
        box: x, y, width, height on it.
        reach: (V,) mean probability of arriving, heap order (the root has 1).
        path: (V,) the same for one input: edges are drawn as thick as what flows through them, and under each leaf
            that it reaches stands its share in percent.
        title: above the tree.
    """
    reach = np.asarray(reach, dtype=float)
    n_experts = (len(reach) + 1) // 2
    x, y, width, height = box
    place = node_positions(n_experts) * (width, height * 0.62) + (x, y + 0.22 * height)
    leaves, splits = left_to_right_leaves(n_experts), slice(0, n_experts - 1)
    child = np.arange(1, 2 * n_experts - 1)
    edges = np.stack((place[(child - 1) // 2], place[child]), 1)
    ax.add_collection(LineCollection(edges, linewidths=1.0, colors=PALE, zorder=1))
    area = 8 + 230 * reach
    outline = {"edgecolors": INK, "linewidths": 0.7, "zorder": 3}
    ax.scatter(*place[splits].T, s=area[splits], c=PALE, **outline)
    ax.scatter(*place[leaves].T, s=area[leaves], c=expert_colors(n_experts), marker="s", **outline)
    if path is not None:
        path = np.asarray(path, dtype=float)
        ax.add_collection(LineCollection(edges, linewidths=4 * path[1:], colors=INK, zorder=2))
        for leaf in leaves:
            if path[leaf] >= 0.005:
                share = 100 * path[leaf]
                text = f"{share:.0f}%" if n_experts > 8 else f"{round(share, 1):g}%"
                ax.text(place[leaf, 0], y + 0.06 * height, text, ha="center", va="bottom", fontsize=8)
    if title:
        ax.text(x, y + height, title, va="top", fontsize=10)


def plane(resolution: int = 80, limit: float = 1.0) -> Tensor:
    """(resolution^2, 2) points of the square [-limit, limit]^2, row by row from below: what `draw_partition` wants."""
    line = torch.linspace(-limit, limit, resolution)
    return torch.cartesian_prod(line, line).flip(1)


def draw_partition(
    ax: Axes,
    box: Box,
    weights: Tensor,
    *,
    point: tuple[float, float] | None = None,
    limit: float = 1.0,
    title: str = "",
) -> None:
    """The square [-limit, limit]^2 in expert colours, mixed by the combine weights; weight that went nowhere is white.

    Args:
        ax: a sheet.
        box: x, y, width, height on it.
        weights: (resolution^2, E) weights of a gate at the points of `plane`.
        point: an input to mark, in the square's own coordinates.
        limit: half the side of the square.
        title: above the square.
    """
    weights = weights.detach().cpu().numpy()
    side = round(len(weights) ** 0.5)
    rgb = weights @ np.array([to_rgb(color) for color in expert_colors(weights.shape[1])])
    rgb = rgb + (1 - weights.sum(1, keepdims=True))
    x, y, width, height = box
    image = rgb.clip(0, 1).reshape(side, side, 3)
    ax.imshow(image, origin="lower", extent=(x, x + width, y, y + height), interpolation="nearest", aspect="auto")
    if point is not None:
        marked = [(value + limit) / (2 * limit) for value in point]
        ax.plot(x + marked[0] * width, y + marked[1] * height, "o", color="white", markeredgecolor=INK, markersize=8)
    ax.text(x + width / 2, y - 0.05, "x₁", ha="center", va="top", fontsize=9)
    ax.text(x - 0.05, y + height / 2, "x₂", ha="right", va="center", fontsize=9)
    if title:
        ax.text(x, y + height + 0.06, title, va="bottom", fontsize=10)


def draw_shares(ax: Axes, box: Box, shares: Any, *, title: str = "") -> None:
    """One bar per expert in its colour, upright, with the percentage above. shares: (E,) numbers in [0, 1]."""
    shares = np.asarray(shares, dtype=float)
    x, y, width, height = box
    step = width / len(shares)
    tallest = max(shares.max(), 1e-9)
    bars = [
        Rectangle((x + (i + 0.1) * step, y), 0.8 * step, 0.75 * height * share / tallest)
        for i, share in enumerate(shares)
    ]
    colors = expert_colors(len(shares))
    ax.add_collection(PatchCollection(bars, facecolors=colors, edgecolors=INK, linewidths=0.6))
    ax.plot((x, x + width), (y, y), color=INK, linewidth=0.8)
    for i, share in enumerate(shares):
        if share >= 0.005:
            top = y + 0.75 * height * share / tallest + 0.03
            ax.text(x + (i + 0.5) * step, top, f"{100 * share:.0f}%", ha="center", fontsize=8)
    if title:
        ax.text(x, y + height, title, va="top", fontsize=10)
