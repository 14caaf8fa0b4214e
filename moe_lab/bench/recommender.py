"""What `moe_lab.bench.cpu` times: the MovieLens architecture (COMET paper §5.2) with each gate, on random rows.

Random users and items: the arithmetic does not depend on who watched what, and nobody needs a download to measure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from moe_lab.gates import CometGate, DSelectKGate, Gate, HashGate, SoftmaxGate, TopKGate
from moe_lab.models import TwoTaskRecommender, recommender_adam
from moe_lab.routing import sum_losses

N_USERS, N_ITEMS, EMBEDDING, HIDDEN, N_EXPERTS, BATCH = 6040, 3952, 128, 256, 16, 512
IN_FEATURES = 2 * EMBEDDING
ENTROPY = 0.1


def harden(gate: Gate) -> Gate:
    """Scale the selecting hyperplanes until every split is 0 or 1: a converged gate's routing, without training."""
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            if name.startswith(("split", "code")):
                parameter.mul_(1e7)
    return gate


def gate_makers(k: int) -> dict[str, Callable[[], Gate]]:
    """Name in the table -> a function that builds the gate."""
    return {
        "hash": lambda: HashGate(N_USERS, N_EXPERTS),
        "topk": lambda: TopKGate(IN_FEATURES, N_EXPERTS, k),
        "comet, converged": lambda: harden(CometGate(IN_FEATURES, N_EXPERTS, k)),
        "comet, at the start": lambda: CometGate(IN_FEATURES, N_EXPERTS, k),
        "dselect_k, converged": lambda: harden(DSelectKGate(IN_FEATURES, N_EXPERTS, k)),
        "dselect_k, at the start": lambda: DSelectKGate(IN_FEATURES, N_EXPERTS, k),
        "softmax": lambda: SoftmaxGate(IN_FEATURES, N_EXPERTS),
    }


def gate_multiply_adds(name: str, k: int) -> int:
    """Multiply-adds of one gate for one example, all nodes computed (specification §2.6)."""
    n, d = N_EXPERTS, IN_FEATURES
    per_gate = {"hash": 0, "topk": n * d, "softmax": n * d}
    per_gate |= {"comet": (2 * n - 1) * k * d, "dselect_k": ((n - 1).bit_length() + 1) * k * d}
    return per_gate[name.partition(",")[0]]


class RandomRows:
    """Batches of random rows of the two tasks, drawn in advance so that drawing is not timed."""

    def __init__(self, n: int, batch: int = BATCH, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            {
                "user": torch.randint(N_USERS, (batch,), generator=generator),
                "item": torch.randint(N_ITEMS, (batch,), generator=generator),
                "watched": torch.rand(batch, generator=generator).round(),
                "rating": 1 + 4 * torch.rand(batch, generator=generator),
            }
            for _ in range(n)
        ]
        self._next = 0

    def __call__(self) -> dict[str, Tensor]:
        """The next batch, round and round."""
        self._next = (self._next + 1) % len(self.batches)
        return self.batches[self._next]


class TrainingStep:
    """One optimiser step: forward, loss (0.9 BCE + 0.1 masked MSE + entropy), backward, Adam.

    Attributes:
        model: the recommender.
        pairs: (token, expert) rows the bank has computed so far.
        examples: rows seen so far.
    """

    def __init__(self, make_gate: Callable[[], Gate], *, embedding_updates: str, batch: int = BATCH, seed: int = 0):
        torch.manual_seed(seed)
        gates = [make_gate() for _ in range(2)]
        self.model = TwoTaskRecommender(
            N_USERS, N_ITEMS, embedding=EMBEDDING, hidden=HIDDEN, n_experts=N_EXPERTS, gates=gates
        )
        self.rows = RandomRows(16, batch, seed)
        self.optimizer = recommender_adam(self.model, 1e-4, embedding_updates=embedding_updates)
        self.pairs = self.examples = 0
        self.model.moe.experts.register_forward_pre_hook(self._count)

    def _count(self, bank: nn.Module, args: tuple) -> None:
        x, *counts = args
        self.pairs += x.shape[0] * (1 if counts else bank.n_experts)

    @property
    def experts_per_example(self) -> float:
        """Experts executed per example, for both tasks together."""
        return self.pairs / self.examples

    def __call__(self) -> None:
        """Do the step."""
        batch = self.rows()
        self.examples += len(batch["user"])
        output = self.model(batch["user"], batch["item"])
        watched = batch["watched"]
        squared = (output.rating - batch["rating"]).square() * watched
        loss = 0.9 * binary_cross_entropy_with_logits(output.watch_logit, watched)
        loss = loss + 0.1 * squared.sum() / watched.sum().clamp(min=1)
        loss = loss + ENTROPY * sum_losses(output.routings).get("entropy", 0.0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class GateStep:
    """Forward and backward of one gate alone, to its parameters and its input."""

    def __init__(self, make_gate: Callable[[], Gate], *, batch: int = BATCH, seed: int = 0):
        torch.manual_seed(seed)
        self.gate = make_gate()
        keys = self.gate.gate_input == "keys"
        features = torch.empty(batch, IN_FEATURES).uniform_(-0.05, 0.05).requires_grad_()
        self.x = torch.randint(N_USERS, (batch,)) if keys else features
        self.direction = torch.randn(batch, N_EXPERTS)

    def __call__(self) -> None:
        """Do it."""
        routing = self.gate(self.x)
        if routing.weights.requires_grad:
            loss = (routing.weights * self.direction).sum() + routing.losses.get("entropy", 0.0)
            loss.backward()
        for parameter in (self.x, *self.gate.parameters()):
            parameter.grad = None
