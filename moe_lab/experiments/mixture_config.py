"""What every EvoMoE run is told: the gate by name, its schedule, the transformer, the optimiser.

Gates by name (`GATES`; the paper compares "dts"/"evomoe" with "dense", "switch", "base", "hash" and "stable"):

    dense             one feed-forward layer, no gate: as many active FLOPs as top-1
    softmax           all experts, always
    switch            top-1, nobody dropped          switch_capacity    the same, capacity 1.0: tokens are dropped
    gshard            top-2, nobody dropped          topk               top-k, weights renormalised for k > 1
    base              balanced assignment            hash, hash_balanced   by token id; balanced by frequency
    stable            StableMoE                      expert_choice      experts choose tokens (looks ahead in a GPT)
    dts               dense-to-sparse gate on experts that differ from the start
    evomoe            one shared expert, spawned, then the dense-to-sparse gate

Lengths of phases are shares of ``steps``: a shorter run is the same run in small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.gates import (
    BaseLayerGate,
    DenseToSparseGate,
    ExpertChoiceGate,
    GShardGate,
    HashGate,
    SoftmaxGate,
    StableGate,
    SwitchGate,
    TemperatureSchedule,
    TopKGate,
)
from moe_lab.models.language import TransformerSize
from moe_lab.names import check_name
from moe_lab.train import LearningRate

GATES = (
    *("dense", "softmax", "switch", "switch_capacity", "gshard", "topk", "base"),
    *("hash", "hash_balanced", "stable", "expert_choice", "dts", "evomoe"),
)
PAPER_GATES = ("dense", "switch", "switch_capacity", "base", "hash", "stable", "dts", "evomoe")
"""What the paper compares, Switch both ways."""
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class MixtureConfig:
    """One run of a transformer with mixtures. Every field takes part in the run's fingerprint.

    Attributes:
        gate: one of `GATES`.
        seed: of weights, gates, noise, dropout, order of batches, spawned experts. Gates of one seed see the same
            batches and start from the same weights wherever they have the same parts ("dense" has no experts).
        dataset: name in the registry.
        data_seed: of generated data and splits, the same for all seeds and gates.
        data_options: passed on to `datasets.load`.
        n_experts: E, at least 2 ("dense" ignores it).
        k: experts of "topk".
        capacity_factor: of "switch_capacity".
        layers, width, heads, dropout, moe_every: of the transformer, see `TransformerSize`; ``hidden`` is 4 x width.
        steps: optimiser steps.
        batch_size: sequences per step.
        evaluate_every: steps between evaluations.
        learning_rate: of AdamW, highest.
        warmup: share of ``steps`` with rising rate.
        weight_decay: on matrices (not on biases, norms, embeddings).
        clip_norm: longest gradient.
        balance_weight: coefficient of the balancing term, summed over layers; 0.01 in all public scripts.
        z_weight: coefficient of the router's z-loss; only logged by default, as in EvoMoE.
        tau_start, tau_end, schedule: temperature of the dense-to-sparse gate.
        soft_share: share of ``steps`` in which the temperature falls.
        hard_share: share of ``steps`` after which the gate is hard (top-1); both count from the end of the shared
            phase. At least ``soft_share``, or 1 for never.
        shared_share: "evomoe": share of ``steps`` with one shared expert.
        threshold: c, weights q above it run an expert in the soft phase.
        noise: Gumbel noise: "soft_only", "never" or "always" (as the authors' code).
        weights_from: combine weights from "softmax" or "gumbel".
        mask_ratio, expert_noise, neurons: how spawned experts differ, see `experts.evolve`.
        optimizer_state: of spawned experts: "reset", "copy" or "copy_v".
        stage_one_share: "stable": share of ``steps`` in which it learns to route.
        watched_tokens: validation tokens whose weights are written down at each evaluation, to be replayed.
        valid_rows: evaluate on the first so many validation rows; None: all.
        precision: "float32", or "bfloat16" for autocast (gates stay in float32).
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError: a value that cannot be meant; the message says what would be.
    """

    gate: str = "evomoe"
    seed: int = 0
    dataset: str = ""
    data_seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=dict)
    n_experts: int = 8
    k: int = 2
    capacity_factor: float = 1.0
    layers: int = 2
    width: int = 32
    heads: int = 2
    dropout: float = 0.0
    moe_every: int = 2
    steps: int = 300
    batch_size: int = 16
    evaluate_every: int = 25
    learning_rate: float = 3e-3
    warmup: float = 0.04
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01
    z_weight: float = 0.0
    tau_start: float = 2.0
    tau_end: float = 0.3
    schedule: str = "linear"
    soft_share: float = 0.04
    hard_share: float = 0.06
    shared_share: float = 0.1
    threshold: float = 1e-3
    noise: str = "soft_only"
    weights_from: str = "softmax"
    mask_ratio: float = 0.1
    expert_noise: float = 0.0
    neurons: float = 0.0
    optimizer_state: str = "reset"
    stage_one_share: float = 0.1
    watched_tokens: int = 8
    valid_rows: int | None = None
    precision: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_name("gate", self.gate, GATES)
        check_name("precision", self.precision, PRECISIONS)
        if self.gate != "dense" and self.n_experts < 2:
            raise ValueError(f"n_experts must be at least 2, got {self.n_experts}; one expert for all is gate 'dense'")
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("balance_weight", "z_weight", "weight_decay", "expert_noise", "watched_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 switches it off")
        for name in ("warmup", "soft_share", "hard_share", "shared_share", "stage_one_share", "mask_ratio", "neurons"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, in [0, 1]; got {getattr(self, name)}")
        if self.gate in ("dts", "evomoe") and self.hard_share < self.soft_share:
            raise ValueError(
                f"hard_share = {self.hard_share} is below soft_share = {self.soft_share}: the gate would be hard "
                "before the temperature is down"
            )
        if self.gate == "evomoe" and self.steps_of("shared_share") < 1:
            raise ValueError(
                f"shared_share = {self.shared_share} of {self.steps} steps is no step: nothing to spawn from; without "
                "a shared phase it is gate 'dts'"
            )
        if self.valid_rows is not None and self.valid_rows < 1:
            raise ValueError(f"valid_rows must be at least 1, or None for all; got {self.valid_rows}")
        if self.gate in ("dts", "evomoe"):
            self.temperature  # noqa: B018 - a schedule that cannot be is refused here, not after the data are loaded

    def steps_of(self, share: str) -> int:
        """A share in steps: ``steps_of("soft_share")``."""
        return round(getattr(self, share) * self.steps)

    @property
    def temperature(self) -> TemperatureSchedule:
        """tau as a function of the steps since the end of the shared phase."""
        return TemperatureSchedule(self.tau_start, self.tau_end, max(1, self.steps_of("soft_share")), self.schedule)

    @property
    def shared_steps(self) -> int:
        """Steps with one shared expert; 0 except for "evomoe"."""
        return self.steps_of("shared_share") if self.gate == "evomoe" else 0

    @property
    def hard_after(self) -> int | None:
        """Steps from the end of the shared phase to the hard switch."""
        return None if self.hard_share == 1 else max(1, self.steps_of("hard_share"))

    def size(self, n_tokens: int, length: int) -> TransformerSize:
        """Of the transformer."""
        return TransformerSize(
            vocabulary=n_tokens,
            length=length,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            dropout=self.dropout,
            moe_every=0 if self.gate == "dense" else self.moe_every,
        )

    def learning_rates(self, kind: str = "cosine") -> LearningRate:
        """Warm-up, then down to a tenth."""
        return LearningRate(self.steps_of("warmup"), self.steps, kind=kind)

    def coefficients(self, **tasks: float) -> dict[str, float]:
        """Coefficient of every term of the loss: the tasks', the gate's, and what is only logged (0)."""
        balanced = {"load_balance": self.balance_weight, "z": self.z_weight}
        gate_terms: dict[str, dict[str, float]] = {
            **dict.fromkeys(("switch", "switch_capacity", "gshard", "topk", "dts", "evomoe"), balanced),
            "softmax": {"load_balance": 0.0, "z": self.z_weight},
            "expert_choice": {"z": self.z_weight},
            "stable": {"balance": 0.3, "distill": 0.3},  # StableMoE's own coefficients
        }
        logged = {} if self.gate == "dense" else {"experts": 0.0}
        if self.gate == "switch_capacity":
            logged["dropped"] = 0.0
        return {**tasks, **gate_terms.get(self.gate, {}), **logged}


def make_gate(config: MixtureConfig, index: int, n_tokens: int, counts: Tensor | None = None) -> nn.Module:
    """The gate of mixture ``index``.

    Args:
        config: what it should be.
        index: 0 is the lowest; each has weights, table and noise of its own.
        n_tokens: size of the vocabulary (gates that look at the token id).
        counts: (n_tokens,) how often each id occurs in training; for "hash_balanced".
    """
    generator = torch.Generator().manual_seed(1000 * config.seed + index)
    width, n_experts = config.width, config.n_experts
    makers = {
        "softmax": lambda: SoftmaxGate(width, n_experts, generator=generator),
        "topk": lambda: TopKGate(width, n_experts, config.k, renormalise=config.k > 1, generator=generator),
        "switch": lambda: SwitchGate(width, n_experts, generator=generator),
        "switch_capacity": lambda: SwitchGate(
            width, n_experts, capacity_factor=config.capacity_factor, generator=generator
        ),
        "gshard": lambda: GShardGate(width, n_experts, generator=generator),
        "base": lambda: BaseLayerGate(width, n_experts, generator=generator),
        "hash": lambda: HashGate(n_tokens, n_experts, seed=1000 * config.seed + index),
        "hash_balanced": lambda: HashGate.by_frequency(counts, n_experts),
        "stable": lambda: StableGate(
            width,
            n_experts,
            n_tokens,
            stage_one_steps=max(1, config.steps_of("stage_one_share")),
            generator=generator,
        ),
        "expert_choice": lambda: ExpertChoiceGate(width, n_experts, generator=generator),
        "dts": lambda: DenseToSparseGate(
            width,
            n_experts,
            config.temperature,
            threshold=config.threshold,
            shared_steps=config.shared_steps,
            hard_after=config.hard_after,
            weights_from=config.weights_from,
            noise=config.noise,
            generator=generator,
        ),
    }
    return makers["dts" if config.gate == "evomoe" else config.gate]()
