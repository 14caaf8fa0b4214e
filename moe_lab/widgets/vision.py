"""Views for notebook 04: where an image goes, gate by gate and epoch by epoch. Replays saved Results, trains nothing.

Each view returns one closed figure in less than 0.2 s, so that it is shown once: as the value of a cell, or by
``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.plots.sheet import sheet
from moe_lab.plots.trees import draw_shares, draw_tree
from moe_lab.plots.vision import reach_of_leaves
from moe_lab.results import Result


class RoutingReplay:
    """The watched images of one Result per gate, ready to be drawn at any recorded epoch.

    Args:
        results: name -> Result of `moe_lab.experiments.comet_vision`, all with the same watched images.
        images: (N, 1, H, W), the first validation images.
        labels: (N, tasks).
        task_titles: task -> how to call it in the figure.

    Raises:
        ValueError: a Result has no watched rows, or they are of more images than were given.
    """

    def __init__(self, results: Mapping[str, Result], images: Tensor, labels: Tensor, task_titles: Mapping[str, str]):
        self.images, self.labels, self.task_titles = images, labels, dict(task_titles)
        self._rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name, result in results.items():
            rows = [row for row in result.curves.get("watched", []) if not row["final"]]
            if not rows:
                raise ValueError(f"the Result of {name!r} has no watched images; run it with watched_images > 0")
            if len(rows[0]["weights"]) > len(images):
                raise ValueError(f"{name!r} watched {len(rows[0]['weights'])} images, only {len(images)} were given")
            self._rows[name] = {task: [row for row in rows if row["task"] == task] for task in self.task_titles}
        self._trees = {name for name, result in results.items() if result.config["gate"] == "comet"}

    def epochs(self, gate: str) -> list[int]:
        """The epochs that were written down; 0 is before training."""
        return [row["epoch"] for row in next(iter(self._rows[gate].values()))]

    @property
    def n_images(self) -> int:
        """How many images can be chosen."""
        first = next(iter(self._rows.values()))
        return len(next(iter(first.values()))[0]["weights"])

    def view(self, gate: str, image: int = 0, moment: int = -1) -> Figure:
        """One image, and per task: the experts' shares and, for a COMET gate, its trees with the path of the image.

        Nodes are sized by their mean reach over the watched images.

        Args:
            gate: a name given to the constructor.
            image: index of the image.
            moment: index into `epochs`; negative counts from the end, too late means the last.
        """
        n_tasks = len(self.task_titles)
        figure, ax = sheet(9.6, max(1.75 * n_tasks + 0.5, 2.5))
        height = figure.get_figheight()
        epochs = self.epochs(gate)
        moment = range(len(epochs))[min(moment, len(epochs) - 1)]
        ax.imshow(
            np.asarray(self.images[image, 0]),
            cmap="gray_r",
            extent=(0.1, 1.9, height - 2.2, height - 0.4),
            aspect="auto",
        )
        shown = ", ".join(map(str, self.labels[image].tolist()))
        ax.text(0.1, height - 0.32, f"image {image}: {shown}", va="bottom", fontsize=10)
        ax.text(0.1, height - 2.3, f"{gate}\nafter epoch {epochs[moment]}", va="top", fontsize=10)
        for place, (task, title) in enumerate(self.task_titles.items()):
            y = height - 0.35 - 1.75 * (place + 1)
            self._draw_task(ax, y, self._rows[gate][task][moment], image, title, gate in self._trees)
        return figure

    @staticmethod
    def _draw_task(ax: Axes, y: float, row: Mapping[str, Any], image: int, title: str, trees: bool) -> None:
        weights: Sequence[float] = row["weights"][image]
        used = sum(weight > 0 for weight in weights)
        left, bottom, width = 2.2, y + 0.1, 2.4
        draw_shares(ax, (left, bottom, width, 1.45), weights, title=f"{title}: {used} of {len(weights)} experts")
        for expert in range(len(weights)):
            middle = left + (expert + 0.5) * width / len(weights)
            ax.text(middle, bottom - 0.04, str(expert), ha="center", va="top", fontsize=8)
        if not trees:
            return
        leaves = np.asarray(row["leaves"], dtype=float)
        n_trees = leaves.shape[2]
        width = 4.8 / n_trees
        for tree in range(n_trees):
            path, mean = reach_of_leaves(leaves[image, :, tree]), reach_of_leaves(leaves[..., tree].mean(0))
            draw_tree(ax, (4.8 + width * tree, y, width - 0.15, 1.6), mean, path=path, title=f"tree {tree}")
