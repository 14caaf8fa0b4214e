"""Gates and inference modules trained in turn: what cached features and whole networks have in common.

Legend: B batch, L exits, G = L - 1 gates, K classes, R runs that train side by side (one per price lambda).

    gates        sum over runs of `gate_loss`, targets from the exits' cross entropies and the run's price
    modules      sum over runs of `inference_loss`, probabilities from the gates as they are
    warm-up      sum_l v_l CE_l / sum_l v_l,  v_l = L + 1 - l:  L, L - 1, ..., 2, and 1 for the last exit if it trains

Where we differ: the authors warm up on sum_l v_l CE_l and go on with a mean over exits. At one learning rate the steps
of the first module then shrink L G times when the warm-up ends, and a rate that suits the phases is too large before
them. ``warmup_loss="sum"`` is theirs.

What the inactive part would learn gets no gradient. Sums over runs, so that runs do not share a learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.exits.losses import (
    best_exits,
    check_balance,
    check_mode,
    cross_entropies,
    gate_loss,
    gate_targets,
    inference_loss,
    positive_weights,
)
from moe_lab.exits.phases import Phases
from moe_lab.exits.probability import check_model, exit_probabilities, exits_taken
from moe_lab.names import check_name

WARMUP_LOSSES = ("mean", "sum")
"""The weighted mean of the exits' cross entropies, or their weighted sum as in the authors' code."""


class ExitTraining(nn.Module):
    """Phases, prices and loss terms; subclasses say where logits come from.

    `fit` moves ``step`` by ``advance()``. Weights of positive targets are 1 until `set_weights` has seen the losses of
    a validation set; call it now and then.

    Args:
        prices: lambdas, R of them.
        costs: (L,) costs of the exits; they are divided by the last.
        phases: see `Phases`.
        mode: of `inference_loss`.
        balance: of `positive_weights`.
        model: of `exit_probabilities`.
        n_trained: inference modules that train: G if the last head is frozen, else L.
        warmup_loss: one of `WARMUP_LOSSES`.

    Raises:
        ValueError: no price, a negative one, costs or names that cannot be meant.
    """

    def __init__(
        self,
        prices: Sequence[float],
        costs: Tensor,
        *,
        phases: Phases,
        mode: str,
        balance: str,
        model: str,
        n_trained: int,
        warmup_loss: str = "mean",
    ):
        super().__init__()
        if not prices:
            raise ValueError("prices holds no lambda: nothing to train")
        if min(prices) < 0:
            raise ValueError(f"lambda must not be negative, got {min(prices)}: exits would be paid for being late")
        check_mode(mode)
        check_balance(balance)
        check_model(model)
        check_name("warm-up loss", warmup_loss, WARMUP_LOSSES)
        self.n_gates = len(costs) - 1
        self.phases, self.mode, self.balance, self.model, self.n_trained = phases, mode, balance, model, n_trained
        self.warmup_loss = warmup_loss
        self.register_buffer("prices", torch.tensor(prices, dtype=torch.float32))
        self.register_buffer("costs", (costs.double() / costs.double()[-1]).float())
        self.register_buffer("positive", torch.ones(len(prices), self.n_gates))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def batch_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(R, B, L, K) of a training batch, with gradient."""
        raise NotImplementedError

    def batch_gates(self, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
        """(R, B, G) gate logits of a training batch and its logits; no gradient reaches the logits."""
        raise NotImplementedError

    @property
    def phase(self) -> str:
        """Of the next step."""
        return self.phases.at(int(self.step))

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done."""
        self.step += 1

    def cross_entropies(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(R, B, L) of logits (R, B, L, K) and labels (B,)."""
        return cross_entropies(logits, labels)

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms for `fit`, sums over runs: ``gates`` and ``modules``; the one whose turn it is not is 0.

        Args:
            batch: ``label`` (B,), and what `batch_logits` reads.
        """
        zero, phase = self.positive.new_zeros(()), self.phase
        if phase == "gates":
            with torch.no_grad():
                logits = self.batch_logits(batch)
                losses = self.cross_entropies(logits, batch["label"])
                best = best_exits(losses, self.costs, self.prices.unsqueeze(1))
            loss = gate_loss(self.batch_gates(batch, logits), gate_targets(best, self.n_gates), self.positive)
            return {"gates": loss.sum(), "modules": zero}
        logits = self.batch_logits(batch)
        losses = self.cross_entropies(logits, batch["label"])[..., : self.n_trained]
        if phase == "warmup":
            weights = self.warmup_weights().to(losses)
            weights = weights / weights.sum() if self.warmup_loss == "mean" else weights
            return {"gates": zero, "modules": (losses * weights).sum(-1).mean(-1).sum()}
        with torch.no_grad():
            gates = self.batch_gates(batch, logits).sigmoid()
            probabilities = exit_probabilities(gates, self.model)[..., : self.n_trained]
            taken = exits_taken(gates, self.model)
        return {"gates": zero, "modules": inference_loss(losses, probabilities, taken, self.mode).sum()}

    def warmup_weights(self) -> Tensor:
        """(n_trained,) v_l."""
        n_exits = self.n_gates + 1
        return torch.arange(n_exits, n_exits - self.n_trained, -1)

    @torch.no_grad()
    def set_weights(self, losses: Tensor) -> None:
        """Set the weights of positive targets from the exits' losses (R, N, L) on a validation set."""
        best = best_exits(losses, self.costs, self.prices.unsqueeze(1))
        self.positive.copy_(positive_weights(best, self.n_gates, self.balance))
