"""What the EvoMoE experiments share: building, the optimiser, terms of the loss, and looking at the gates.

Legend: B batch, S sequence, T tokens, E experts, L mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.experiments.mixture_config import MixtureConfig, make_gate
from moe_lab.experts.evolve import Evolution, expert_distances
from moe_lab.gates import DenseToSparseGate
from moe_lab.metrics.routing import RoutingTally
from moe_lab.models.transformer import GateFactory, MixtureFeedForward
from moe_lab.results import Result
from moe_lab.routing import Routing, sum_losses
from moe_lab.train import FitConfig

_PROBES = 256  # tokens on which experts are compared
_FOLLOWED = 2048  # validation tokens whose expert is remembered from one evaluation to the next


def gate_factory(config: MixtureConfig, n_tokens: int, counts: Tensor | None = None) -> GateFactory | None:
    """Index of the mixture -> gate; None for "dense"."""
    if config.gate == "dense":
        return None
    return lambda index: make_gate(config, index, n_tokens, counts)


def token_counts(tokens: Tensor, n_tokens: int) -> Tensor:
    """(n_tokens,) how often each id occurs."""
    return torch.bincount(tokens.flatten(), minlength=n_tokens)


def mixtures_of(model: nn.Module) -> list[MixtureFeedForward]:
    """All mixtures in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, MixtureFeedForward)]


def evolve(model: nn.Module, config: MixtureConfig) -> None:
    """Give each mixture of an "evomoe" model the `Evolution` that spawns its experts (other gates: nothing)."""
    if config.gate != "evomoe":
        return
    for index, mixture in enumerate(mixtures_of(model)):
        mixture.evolution = Evolution(
            mixture.moe.experts,
            config.shared_steps,
            mask_ratio=config.mask_ratio,
            noise=config.expert_noise,
            neurons=config.neurons,
            state=config.optimizer_state,
            seed=1000 * config.seed + index,
        )


def make_optimizer(model: nn.Module, config: MixtureConfig) -> torch.optim.AdamW:
    """AdamW, decay on matrices only; told to the modules that spawn experts.

    Decay belongs to matrices (also stacked ones), not to biases (stacked ones have two dimensions, too), norms and
    embeddings.
    """
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() > 1 and "bias" not in name and "embedding" not in name
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    for module in model.modules():
        if isinstance(module, Evolution):
            module.attach(optimizer)
    return optimizer


def fit_config(config: MixtureConfig, *, steps: int | None = None, schedule: str = "cosine", **options) -> FitConfig:
    """``steps`` optimiser steps (default: the config's), whatever the number of passes."""
    return FitConfig(
        epochs=None,
        max_steps=config.steps if steps is None else steps,
        clip_norm=config.clip_norm,
        learning_rate=config.learning_rates(schedule),
        **options,
    )


def precision(config: MixtureConfig, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 if asked for."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def routing_terms(config: MixtureConfig, routings: Iterable[Routing]) -> dict[str, Tensor]:
    """Terms of the gates (summed over mixtures), and what is only logged: mean experts per token, share dropped."""
    routings = list(routings)
    if not routings:
        return {}
    terms = dict(sum_losses(routings))
    with torch.no_grad():
        per_token = [routing.active.sum() / max(1, routing.weights.shape[0]) for routing in routings]
        terms["experts"] = torch.stack(per_token).mean()
        if config.gate == "switch_capacity":
            terms["dropped"] = torch.stack([routing.details["dropped"] for routing in routings]).mean()
    return terms


class GateWatch:
    """Looks at the gates while a validation set is run through the model, and writes down what it saw.

    Curves, a row per evaluation and mixture:

    * ``routing``: experts per token, load, largest over mean load, ``changed``: share of followed tokens whose main
      expert is another one than at the last evaluation;
    * ``distances``: mean distance of two experts in parameters and in function;
    * ``watched``: weights (tokens, E) of the first validation tokens.

    Example::

        watch = GateWatch(config, result)
        with watch.looking(model):
            for batch in valid: model(batch)          # Routings are handed over by watch.add
        watch.write(step)
    """

    def __init__(self, config: MixtureConfig, result: Result):
        self.config, self.result = config, result
        self._k = {"gshard": 2, "topk": config.k, "softmax": config.n_experts}.get(config.gate, 1)

    def start(self) -> None:
        """Forget the last evaluation."""
        self.tallies: list[RoutingTally] = []
        self.main: list[list[Tensor]] = []
        self.watched: list[Tensor] = []

    def add(self, routings: list[Routing]) -> None:
        """The Routings of one batch, from the lowest mixture up."""
        if not self.tallies:
            self.tallies = [RoutingTally(self._k) for _ in routings]
            self.main = [[] for _ in routings]
            self.watched = [routing.weights[: self.config.watched_tokens].float().cpu() for routing in routings]
        for tally, main, routing in zip(self.tallies, self.main, routings, strict=True):
            tally.add(routing)
            if sum(map(len, main)) < _FOLLOWED:
                main.append(routing.weights.argmax(-1).cpu())

    def write(self, model: nn.Module, probes: list[Tensor], **where: Any) -> dict[str, float]:
        """Rows for all mixtures; returns what belongs beside the loss: experts per token, largest load."""
        if not self.tallies:
            return {}
        before = self.result.curves.get("main_expert", [])
        rows = []
        for layer, (tally, main, weights) in enumerate(zip(self.tallies, self.main, self.watched, strict=True)):
            summary = tally.summary()
            del summary["histogram"], summary["mass_error"]
            now = torch.cat(main)[:_FOLLOWED]
            changed = None
            if before:
                changed = float((now != torch.tensor(before[layer]["expert"])).double().mean())
            summary["max_over_mean"] = max(summary["load"]) * len(summary["load"])
            self.result.log("routing", layer=layer, changed=changed, **where, **summary)
            if self.config.watched_tokens:
                self.result.log("watched", layer=layer, **where, weights=(weights * 1e4).round().div(1e4).tolist())
            rows.append({"layer": layer, "expert": now.tolist()})
        self.result.curves["main_expert"] = rows  # one evaluation's worth: the next one compares with it
        for layer, (mixture, x) in enumerate(zip(mixtures_of(model), probes, strict=True)):
            distances = expert_distances(mixture.moe.experts, x[:_PROBES])
            n = mixture.moe.experts.n_experts
            means = {name: float(values.sum() / max(1, n * (n - 1))) for name, values in distances.items()}
            self.result.log("distances", layer=layer, **where, **means)
        summaries = [tally.summary() for tally in self.tallies]
        return {
            "valid_experts": sum(summary["experts_mean"] for summary in summaries) / len(summaries),
            "valid_max_load": max(max(s["load"]) * len(s["load"]) for s in summaries),
        }


class Probes:
    """Catches what the experts of each mixture see in the first forward pass inside the block."""

    def __init__(self, model: nn.Module):
        self.mixtures, self.inputs = mixtures_of(model), {}

    def __enter__(self) -> Probes:
        self.handles = [
            mixture.moe.register_forward_pre_hook(self._catch(index)) for index, mixture in enumerate(self.mixtures)
        ]
        return self

    def _catch(self, index: int) -> Callable:
        def hook(_, args: tuple) -> None:
            self.inputs.setdefault(index, args[0].detach()[:_PROBES])

        return hook

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def in_order(self) -> list[Tensor]:
        """(up to 256, D) inputs of each mixture."""
        return [self.inputs[index].float() for index in range(len(self.mixtures))]


def with_inference(model: nn.Module, rule: str) -> Callable[[], None]:
    """Let all dense-to-sparse gates of the model infer by ``rule`` ("topk" or "matched"); returns what undoes it."""
    gates = [module for module in model.modules() if isinstance(module, DenseToSparseGate)]
    before = [gate.inference for gate in gates]
    for gate in gates:
        gate.inference = rule

    def undo() -> None:
        for gate, old in zip(gates, before, strict=True):
            gate.inference = old

    return undo


def phase_curve(config: MixtureConfig, points: int = 400) -> dict[str, list]:
    """Temperature and phase of a "dts" or "evomoe" run over its steps, for pictures: step, temperature, phase."""
    gate = DenseToSparseGate(
        None, config.n_experts, config.temperature, shared_steps=config.shared_steps, hard_after=config.hard_after
    )
    steps = list(range(0, config.steps + 1, max(1, config.steps // points)))
    return {
        "step": steps,
        "temperature": [float(config.temperature(max(0, step - config.shared_steps))) for step in steps],
        "phase": [gate.phase_after(step) for step in steps],
    }
