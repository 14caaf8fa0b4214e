"""The picture on top of the README: one COMET gate before and after training, and what its trees do to the plane.

python -m moe_lab.plots.overview notebooks/pictures/overview.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from moe_lab.gates import CometGate
from moe_lab.plots.sheet import sheet
from moe_lab.plots.style import use_style
from moe_lab.plots.trees import draw_partition, draw_tree, node_reach, plane


def train_gate(steps: int = 400, seed: int = 0) -> tuple[CometGate, CometGate]:
    """A gate (2 trees, 8 experts) at its start and after it learned to send each sector of the plane to an expert."""
    generator = torch.Generator().manual_seed(seed)
    start = CometGate(2, 8, 2, generator=generator)
    gate = CometGate(2, 8, 2)
    gate.load_state_dict(start.state_dict())
    x = torch.rand(2000, 2, generator=generator) * 2 - 1
    sector = ((torch.atan2(x[:, 1], x[:, 0]) / torch.pi + 1) * 4).long().clamp(max=7)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        routing = gate(x)
        fit = -(routing.weights.gather(1, sector.unsqueeze(1)) + 1e-3).log().mean()
        (fit + 0.05 * routing.losses["entropy"]).backward()
        optimizer.step()
    return start.eval().requires_grad_(False), gate.eval().requires_grad_(False)


def overview() -> Figure:
    """Two rows, before and after training: the first tree, the plane in expert colours, experts per token."""
    figure, ax = sheet(9.0, 5.4)
    points = plane(120)
    for row, (gate, when) in enumerate(zip(train_gate(), ("before training", "after training"), strict=True)):
        y = 3.05 - 2.75 * row
        routing = gate(points)
        mean = routing.experts_per_token.float().mean()
        reach = node_reach(gate, points).mean(-1)
        draw_tree(ax, (0.3, y, 2.7, 2.1), reach[:, 0], title=f"{when}: tree 1")
        draw_tree(ax, (3.2, y, 2.7, 2.1), reach[:, 1], title="tree 2")
        draw_partition(
            ax, (6.4, y + 0.1, 2.0, 1.8), routing.weights, title=f"who answers where: {mean:.1f} experts each"
        )
    return figure


if __name__ == "__main__":
    use_style()
    torch.set_num_threads(1)
    overview().savefig(Path(sys.argv[1]), dpi=110)
