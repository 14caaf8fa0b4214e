"""What `moe_lab.bench.cpu` times besides: a small GPT with each gate, on random tokens.

Every expert is as large as the feed-forward layer that it replaces, so a gate that chooses one expert has the active
FLOPs of the dense model; what it loses in speed is the price of routing, and of an optimiser that updates all experts.
Gates that choose more are shown with their FLOPs. Random tokens: the arithmetic does not depend on the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_lab.gates import (
    BaseLayerGate,
    DenseToSparseGate,
    ExpertChoiceGate,
    Gate,
    GShardGate,
    HashGate,
    SoftmaxGate,
    StableGate,
    SwitchGate,
    TemperatureSchedule,
    TopKGate,
)
from moe_lab.metrics.flops import language_flops, training_flops
from moe_lab.models.language import LanguageModel, TransformerSize
from moe_lab.models.transformer import GateFactory
from moe_lab.routing import sum_losses

DENSE = "dense"
COEFFICIENT = 0.01  # of every term that a gate adds to the loss
_MANY_STEPS = 1000  # of schedules, which the benchmark never advances


@dataclass(frozen=True)
class LanguageBench:
    """Sizes of the GPT, and how long to time it.

    Attributes:
        size: of the model; ``size.moe_every`` at least 1.
        n_experts: E of each mixture, at least 2.
        batch: sequences per step, each ``size.length`` tokens.
        rounds, steps: each case gets ``rounds`` turns of ``steps`` timed steps.
    """

    size: TransformerSize = dataclasses.field(
        default_factory=lambda: TransformerSize(256, 128, layers=4, width=256, heads=4, hidden=1024, moe_every=2)
    )
    n_experts: int = 8
    batch: int = 16
    rounds: int = 4
    steps: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.size.moe_every <= self.size.layers:
            raise ValueError(f"moe_every={self.size.moe_every} leaves no mixture to time; it must be 1 .. layers")
        if self.n_experts < 2:
            raise ValueError(f"GShard and the dense-to-sparse gate need at least 2 experts, got {self.n_experts}")
        if self.rounds * self.steps < 2:
            raise ValueError("quartiles need at least two timed steps: raise rounds or steps")

    def __str__(self) -> str:
        size, mixtures = self.size, self.size.layers // self.size.moe_every
        return (
            f"{size.layers} layers of width {size.width}, hidden {size.feed_forward}, {mixtures} of them with "
            f"{self.n_experts} experts, {self.batch} x {size.length} tokens, {self.rounds} x {self.steps} steps"
        )

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.size.length


def language_gates(config: LanguageBench) -> dict[str, Callable[[], Gate] | None]:
    """Name in the table -> a function that builds the gate of a mixture; None for the dense model."""
    d, n, v = config.size.width, config.n_experts, config.size.vocabulary
    schedule = TemperatureSchedule(steps=_MANY_STEPS)
    return {
        DENSE: None,
        "hash": lambda: HashGate(v, n),
        "switch": lambda: SwitchGate(d, n),
        "switch, capacity 1": lambda: SwitchGate(d, n, capacity_factor=1.0),
        "topk, k = 1": lambda: TopKGate(d, n, 1, renormalise=False),
        "stable": lambda: StableGate(d, n, v, stage_one_steps=_MANY_STEPS),
        "base layer": lambda: BaseLayerGate(d, n),
        "expert choice": lambda: ExpertChoiceGate(d, n),
        "dense to sparse, hard": lambda: DenseToSparseGate(d, n, schedule, hard_after=0),
        "topk, k = 2": lambda: TopKGate(d, n, 2),
        "gshard": lambda: GShardGate(d, n),
        "dense to sparse, at the start": lambda: DenseToSparseGate(d, n, schedule),
        "softmax": lambda: SoftmaxGate(d, n),
    }


class LanguageStep:
    """One optimiser step: forward, next-token loss and the gates' own terms, backward, AdamW.

    Schedules of gates are not advanced: a gate is timed in the phase in which it was built.

    Attributes:
        model: the GPT.
        pairs: (token, expert) rows that the banks have computed so far.
        tokens: tokens seen so far.
    """

    def __init__(self, make_gate: Callable[[], Gate] | None, config: LanguageBench, seed: int = 0):
        torch.manual_seed(seed)
        factory: GateFactory | None = None if make_gate is None else lambda index: make_gate()
        self._size = config.size if factory else dataclasses.replace(config.size, moe_every=0)
        self._n_experts = config.n_experts
        self.model = LanguageModel(self._size, causal=True, make_gate=factory)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(seed)
        shape = (8, config.batch, config.size.length + 1)
        self._batches = torch.randint(config.size.vocabulary, shape, generator=generator)
        self.pairs = self.tokens = self._steps = 0
        for mixture in self.model.body.mixtures:
            mixture.moe.experts.register_forward_pre_hook(self._count)

    def _count(self, bank: nn.Module, args: tuple) -> None:
        x, *counts = args
        self.pairs += x.shape[0] * (1 if counts else bank.n_experts)

    @property
    def experts_per_token(self) -> float:
        """Experts executed per token, mean over mixtures; 1 for the dense model."""
        mixtures = len(self.model.body.mixtures)
        return self.pairs / (mixtures * self.tokens) if mixtures else 1.0

    @property
    def flops(self) -> float:
        """FLOPs of training per token, with the measured number of experts (`metrics.flops`)."""
        router = not any(isinstance(mixture.moe.gate, HashGate) for mixture in self.model.body.mixtures)
        forward = language_flops(
            self._size, n_experts=self._n_experts, experts_per_token=self.experts_per_token, router=router
        )
        return training_flops(forward)

    def __call__(self) -> None:
        """Do the step."""
        batch: Tensor = self._batches[self._steps % len(self._batches)]
        self._steps += 1
        self.tokens += batch[:, 1:].numel()
        logits, routings = self.model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss = loss + COEFFICIENT * sum(sum_losses(routings).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
