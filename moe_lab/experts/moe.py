"""Mixture of experts: a gate (or one per task) in front of a bank (COMET paper §1; Ma et al. 2018 for the
multi-gate form).

Legend: T tokens, E experts, F output width.

    y(x) = sum_e g_e(x) f_e(x)

Gate, experts and combination stay three things: the gate returns a `Routing`, the bank runs, `dispatch` adds
up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moe_lab.experts.base import ExpertBank
from moe_lab.experts.dispatch import BACKENDS, run_experts
from moe_lab.names import check_name
from moe_lab.routing import Routing


class MultiGateMoE(nn.Module):
    """Experts shared by several tasks, one gate each. An expert needed by several tasks runs once per token.

    Args:
        gates: one per task; any modules that return a `Routing` over ``experts.n_experts`` experts.
        experts: an expert bank.
        backend, most_per_token: how the experts run, see `moe_lab.experts.dispatch.run_experts`. Attributes: they may
            be changed at any time. With ``most_per_token`` None and one gate, the gate's own `Routing.most` counts.
    """

    def __init__(
        self,
        gates: Sequence[nn.Module],
        experts: ExpertBank,
        backend: str = "auto",
        most_per_token: int | None = None,
    ):
        super().__init__()
        check_name("backend", backend, BACKENDS)
        if not gates:
            raise ValueError("need at least one gate")
        for gate in gates:
            n_experts = getattr(gate, "n_experts", experts.n_experts)
            if n_experts != experts.n_experts:
                raise ValueError(
                    f"gate {type(gate).__name__} has {n_experts} experts, the bank has {experts.n_experts}"
                )
        self.gates = nn.ModuleList(gates)
        self.experts = experts
        self.backend, self.most_per_token = backend, most_per_token

    def forward(
        self, x: Tensor, gate_inputs: Tensor | Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """Combine per task.

        Args:
            x: (T, ...) what the experts see.
            gate_inputs: what the gates see: None = x flattened to (T, D), one tensor for all, or one per gate
                (hash gates want integer keys (T,)).

        Returns:
            outputs, one (T, F) per gate, and their Routings.
        """
        if gate_inputs is None:
            gate_inputs = x.flatten(1)
        if isinstance(gate_inputs, Tensor):
            gate_inputs = [gate_inputs] * len(self.gates)
        if len(gate_inputs) != len(self.gates):
            raise ValueError(f"{len(self.gates)} gates need as many gate_inputs, got {len(gate_inputs)}")
        routings = [gate(seen) for gate, seen in zip(self.gates, gate_inputs, strict=True)]
        weights = [routing.weights for routing in routings]
        most = self.most_per_token
        if most is None and len(routings) == 1:
            most = routings[0].most
        return run_experts(self.experts, x, weights, self.backend, most), routings


class MoE(nn.Module):
    """One gate, one bank.

    Args:
        gate: a module that returns a `Routing`.
        experts: an expert bank.
        backend, most_per_token: see `MultiGateMoE`.
    """

    def __init__(self, gate: nn.Module, experts: ExpertBank, backend: str = "auto", most_per_token: int | None = None):
        super().__init__()
        self.mixture = MultiGateMoE([gate], experts, backend, most_per_token)

    @property
    def gate(self) -> nn.Module:
        """The gate."""
        return self.mixture.gates[0]

    @property
    def experts(self) -> ExpertBank:
        """The bank."""
        return self.mixture.experts

    def forward(self, x: Tensor, gate_input: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Routing]:
        """x (T, ...), gate_input (T, D), keys (T,) or a pair of both, default x flattened -> y (T, F), Routing."""
        (y,), (routing,) = self.mixture(x, None if gate_input is None else [gate_input])
        return y, routing
