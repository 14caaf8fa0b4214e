"""Gates and inference modules trained together on features of a frozen backbone (JEI-DNN, section 4).

Legend: N samples, L exits, G = L - 1, D feature width, K classes, R runs (one per lambda), B batch.

A frozen backbone gives the same features in every epoch: compute them once, (N, L, D), and a training run needs the
backbone no more. All runs of a grid of prices train side by side: they have a leading dimension R and never meet.

Phases, in steps:

    warm-up        loss = CE_L + sum_l v_l CE_l, v_1 = L, ..., v_G = 2        (last head frozen: its term is left out)
    then in turn   ``gate_steps`` of the gates' loss, ``module_steps`` of the inference modules' loss
    at the end     gates only, for the last ``final_gate_steps``: they should fit the modules as they are in the end

Phases are counted over all steps, not per epoch (the authors restart with a gate phase in every epoch: with few batches
per epoch their modules never train after warm-up). What the inactive part would learn gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.exits.features import uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.losses import (
    best_exits,
    check_balance,
    check_mode,
    gate_loss,
    gate_targets,
    inference_loss,
    positive_weights,
)
from moe_lab.exits.probability import check_model, exit_probabilities, exits_taken


@dataclass(frozen=True)
class Phases:
    """Lengths of the phases, in optimiser steps.

    Attributes:
        warmup: inference modules only, as a weighted sum of cross entropies.
        gate_steps, module_steps: then in turn; 200 batches each in the authors' code.
        final_gate_steps: gates only, at the end.
        steps: all together.
    """

    warmup: int = 600
    gate_steps: int = 100
    module_steps: int = 100
    final_gate_steps: int = 200
    steps: int = 1600

    def __post_init__(self) -> None:
        if self.gate_steps < 1 or self.module_steps < 0 or self.warmup < 0 or self.final_gate_steps < 0:
            raise ValueError(f"gate_steps must be at least 1, the others not negative; got {self}")
        if self.steps < self.warmup + self.gate_steps:
            raise ValueError(
                f"{self.steps} steps leave no gate phase after a warm-up of {self.warmup}: at least "
                f"{self.warmup + self.gate_steps}"
            )

    def at(self, step: int) -> str:
        """ "warmup", "gates" or "modules" for the step after ``step`` completed ones."""
        if step < self.warmup:
            return "warmup"
        if step >= self.steps - self.final_gate_steps:
            return "gates"
        place = (step - self.warmup) % (self.gate_steps + self.module_steps)
        return "gates" if place < self.gate_steps else "modules"


class JointExits(nn.Module):
    """R linear inference modules and gates per exit, on cached features.

    Args:
        n_exits, width: L and D (the same at all exits).
        n_classes: K.
        prices: lambdas, R of them.
        costs: (L,) normalised costs, the last is 1.
        phases: see `Phases`.
        mode: of `inference_loss`.
        balance: of `positive_weights`.
        model: of `exit_probabilities`.
        generator: for initial weights, equal in all runs.

    `fit` moves ``step`` by ``advance()``. Weights of positive targets are 1 until `weights_from`
    has seen a validation set; call it now and then. The last head is frozen: its logits come with the features.
    """

    def __init__(
        self,
        n_exits: int,
        width: int,
        n_classes: int,
        prices: Sequence[float],
        costs: Tensor,
        *,
        phases: Phases,
        mode: str = "released",
        balance: str = "cumulative",
        model: str = "direct",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not prices:
            raise ValueError("prices holds no lambda: nothing to train")
        if tuple(costs.shape) != (n_exits,):
            raise ValueError(f"costs must be one number per exit ({n_exits}), got {tuple(costs.shape)}")
        check_mode(mode)
        check_balance(balance)
        check_model(model)
        n_gates, runs = n_exits - 1, len(prices)
        bound = width**-0.5
        weight = torch.empty(n_gates, width, n_classes).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight.expand(runs, -1, -1, -1).clone())
        self.bias = nn.Parameter(torch.zeros(runs, n_gates, n_classes))
        self.gates = ExitGates(n_gates, runs=runs, generator=generator)
        self.phases, self.mode, self.balance, self.model = phases, mode, balance, model
        self.register_buffer("prices", torch.tensor(prices, dtype=torch.float32))
        self.register_buffer("costs", (costs.double() / costs.double()[-1]).float())
        self.register_buffer("positive", torch.ones(runs, n_gates))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def phase(self) -> str:
        """Of the next step."""
        return self.phases.at(int(self.step))

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done."""
        self.step += 1

    def logits(self, features: Tensor, last: Tensor) -> Tensor:
        """features (B, L, D), last (B, K): logits of the frozen last head -> (R, B, L, K)."""
        own = torch.einsum("bgd,rgdk->rbgk", features[:, :-1], self.weight) + self.bias.unsqueeze(1)
        return torch.cat((own, last.expand(len(self.prices), -1, -1).unsqueeze(2).to(own.dtype)), 2)

    def gate_logits(self, logits: Tensor) -> Tensor:
        """(R, B, L, K) -> (R, B, G)."""
        return self.gates(uncertainty_features(logits[:, :, :-1]))

    def cross_entropies(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(R, B, L) of logits (R, B, L, K) and labels (B,)."""
        index = labels[None, :, None, None].expand(*logits.shape[:3], 1)
        return -logits.log_softmax(-1).gather(-1, index).squeeze(-1)

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms for `fit`, sums over runs (so that runs do not share a learning rate): ``gates`` and ``modules``.

        Args:
            batch: ``features`` (B, L, D), ``last`` (B, K), ``label`` (B,).
        """
        zero = self.bias.new_zeros(())
        if self.phase == "gates":
            with torch.no_grad():
                logits = self.logits(batch["features"], batch["last"])
                losses = self.cross_entropies(logits, batch["label"])
                best = best_exits(losses, self.costs, self.prices.unsqueeze(1))
            loss = gate_loss(self.gate_logits(logits), gate_targets(best, self.gates.n_gates), self.positive)
            return {"gates": loss.sum(), "modules": zero}
        logits = self.logits(batch["features"], batch["last"])
        losses = self.cross_entropies(logits, batch["label"])[:, :, :-1]
        if self.phase == "warmup":
            n_exits = len(self.costs)
            weights = torch.arange(n_exits, 1, -1, device=losses.device, dtype=losses.dtype)
            return {"gates": zero, "modules": (losses * weights).sum(-1).mean(-1).sum()}
        with torch.no_grad():
            gates = self.gate_logits(logits).sigmoid()
            probabilities, taken = exit_probabilities(gates, self.model)[..., :-1], exits_taken(gates, self.model)
        return {"gates": zero, "modules": inference_loss(losses, probabilities, taken, self.mode).sum()}

    @torch.no_grad()
    def decide(self, features: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, B, L, K) and exits taken (R, B)."""
        logits = self.logits(features, last)
        return logits, exits_taken(self.gate_logits(logits).sigmoid(), self.model)

    @torch.no_grad()
    def weights_from(self, features: Tensor, last: Tensor, labels: Tensor) -> None:
        """Set the weights of positive targets from a validation set, with the modules as they are."""
        losses = self.cross_entropies(self.logits(features, last), labels)
        best = best_exits(losses, self.costs, self.prices.unsqueeze(1))
        self.positive.copy_(positive_weights(best, self.gates.n_gates, self.balance))
