"""What every gate returns.

Legend: T tokens, E experts.

A gate maps tokens to *combine weights* and sees no expert. Everything that a model, a loss or a picture wants to know
about the decision is in one object, so a gate can be tested, drawn and exchanged alone. (The COMET authors' code hands
the expert outputs to the gate and gets the mixture back: there the weights cannot be looked at.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Who goes where, and what it says about the gate.

    Attributes:
        weights: combine weights, (T, E), non-negative, with *exact* zeros where nothing is routed. Rows sum to 1
            (only DSelect-k with a number of experts that is no power of two may sum to less).
        losses: named scalars, *unweighted*; empty in eval mode. Whoever trains chooses the coefficients.
        details: tensors of one gate that pictures want (a COMET gate: ``tree_probabilities`` (T, E, K)); may be empty.
        most: no row has more non-zero weights than this by the gate's rule, at least 1; None: the rule does not say.
            With it nobody need count pairs before experts run (`experts.dispatch.run_experts`).
    """

    weights: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Tensor] = field(default_factory=dict)
    most: int | None = None

    @property
    def n_experts(self) -> int:
        """E."""
        return self.weights.shape[-1]

    @property
    def active(self) -> Tensor:
        """(T, E) bool: the expert must run on the token (weight not exactly 0)."""
        return self.weights != 0

    @property
    def experts_per_token(self) -> Tensor:
        """(T,) number of non-zero weights of each token: exact zeros are counted, no threshold."""
        return self.active.sum(-1)

    @property
    def load(self) -> Tensor:
        """(E,) share of all routed (token, expert) pairs that go to each expert; sums to 1 (all 0 without tokens)."""
        pairs = self.active.sum(0)
        return pairs / pairs.sum().clamp(min=1)

    @property
    def importance(self) -> Tensor:
        """(E,) mean combine weight of each expert over the tokens (0 without tokens)."""
        return self.weights.sum(0) / max(self.weights.shape[0], 1)

    @property
    def entropy(self) -> Tensor:
        """(T,) entropy of each row of weights in nats; 0 for one expert, log E for all alike."""
        return -torch.xlogy(self.weights, self.weights).sum(-1)


def sum_losses(routings: Iterable[Routing]) -> dict[str, Tensor]:
    """Add the named loss terms of several gates, name by name (a multi-task model: each gate adds its own)."""
    total: dict[str, Tensor] = {}
    for routing in routings:
        for name, value in routing.losses.items():
            total[name] = total[name] + value if name in total else value
    return total
