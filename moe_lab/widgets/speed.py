"""View of notebook 15: tokens on their way to experts, as the load becomes uneven.

One closed figure in less than 0.2 s, shown once: as the value of a cell, or by ``ipywidgets.interact``. Legend: T
tokens, E experts, K experts per token, N routed pairs, C capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.experts.kernels import Order, pattern_order
from moe_lab.gates import TopKGate
from moe_lab.gates.capacity import admit, capacity
from moe_lab.plots.sheet import sheet
from moe_lab.plots.speed import draw_flow, draw_rows


class Flow(NamedTuple):
    """A batch on its way.

    Attributes:
        chosen, kept: (T, E) bool: what the gate asked for, and what found a place.
        order: of `pattern_order`, from the weights that were kept.
        limit: C; None: no capacity.
    """

    chosen: Tensor
    kept: Tensor
    order: Order
    limit: int | None

    @property
    def slowest(self) -> float:
        """Rows of the largest expert over the mean: how much longer a step takes if each expert is a device."""
        counts = self.kept.sum(0).double()
        return float(counts.max() / counts.mean())

    @property
    def dropped(self) -> float:
        """Share of the pairs that the gate asked for."""
        return 1 - float(self.kept.sum() / self.chosen.sum())

    @property
    def padded(self) -> float:
        """Share of the E C rows that hold no pair; without capacity C is the largest load."""
        limit = int(self.kept.sum(0).max()) if self.limit is None else self.limit
        return 1 - float(self.kept.sum()) / (self.kept.shape[1] * limit)


class DispatchView:
    """A top-k gate whose first experts can be favoured, and the package's dispatch behind it.

    Args:
        n_tokens, n_experts: T and E.
        width: D of the tokens.
        most: largest K.
        seed: of tokens and gate.

    Raises:
        ValueError: more than 32 experts (no more colours), or ``most`` above E.
    """

    def __init__(self, n_tokens: int = 40, n_experts: int = 6, width: int = 16, most: int = 3, seed: int = 0):
        if not 1 <= most <= n_experts <= 32:
            raise ValueError(f"need 1 <= most <= n_experts <= 32, got {most}, {n_experts}")
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n_tokens, width, generator=generator)
        self.gates = {
            k: TopKGate(width, n_experts, k, renormalise=k > 1, generator=torch.Generator().manual_seed(seed)).eval()
            for k in range(1, most + 1)
        }
        self.advantage = torch.linspace(1, -1, n_experts)

    @torch.no_grad()
    def at(self, unevenness: float = 0.0, k: int = 2, factor: float | None = None) -> Flow:
        """Where the tokens go.

        Args:
            unevenness: bias of the first expert's logit; the last has the opposite, the others lie between.
            k: experts per token.
            factor: of the capacity; None: no limit.
        """
        gate = self.gates[k]
        gate.logits.bias.copy_(unevenness * self.advantage)
        routing = gate(self.x)
        limit = None if factor is None else capacity(factor, *routing.weights.shape, k)
        kept = routing.active if limit is None else admit(routing.active, limit)
        return Flow(routing.active, kept, pattern_order(routing.weights * kept), limit)

    def view(self, unevenness: float = 0.0, k: int = 2, factor: float = 0.0) -> Figure:
        """Left: tokens to rows in expert order. Right: rows of each expert, what is dropped, what stays empty.

        Args:
            unevenness: of `at`, at least 0.
            k: 1 to ``most``.
            factor: of the capacity; 0 means no limit.
        """
        flow = self.at(unevenness, k, factor or None)
        figure, ax = sheet(9.2, 4.2)
        ax.text(0.3, 3.95, "tokens", fontsize=10, va="center")
        ax.text(2.55, 3.95, f"{len(flow.order.place)} rows, by expert", fontsize=10, va="center")
        draw_flow(ax, (0.45, 0.65, 3.2, 3.1), flow.order.row.numpy(), flow.chosen.numpy())
        ax.text(4.55, 3.95, "rows of each expert", fontsize=10, va="center")
        kept, asked = flow.kept.sum(0).tolist(), flow.chosen.sum(0).tolist()
        draw_rows(ax, (4.7, 0.8, 3.3, 2.95), kept, asked, flow.limit)
        nothing = int((~flow.kept.any(1)).sum())
        if flow.limit is not None:
            ax.text(0.3, 0.5, "orange: a choice was dropped;  ×: nothing is left", fontsize=8, va="center")
        text = f"an expert per device: the slowest has {flow.slowest:.2f} × the mean    "
        text += f"dropped: {flow.dropped:.0%} of pairs; {nothing} tokens get nothing    "
        text += f"padded to {'the largest load' if flow.limit is None else 'capacity'}: {flow.padded:.0%} idle rows"
        ax.text(0.3, 0.25, text, fontsize=8.5, va="center")
        return figure
