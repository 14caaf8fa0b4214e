"""What the EvoMoE experiments share: building, the optimiser, terms of the loss, and looking at the gates.

Legend: B batch, S sequence, T tokens, E experts, L mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.batches import StepBatches
from moe_lab.experiments.mixture_config import MixtureConfig, make_gate
from moe_lab.experts.evolve import Evolution, expert_distances
from moe_lab.gates import DenseToSparseGate
from moe_lab.metrics.routing import RoutingTally
from moe_lab.models.transformer import GateFactory, MixtureFeedForward
from moe_lab.results import Result
from moe_lab.routing import Routing, sum_losses
from moe_lab.train import FitConfig, History, evaluating, fit

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
    return followed(torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True), model)


def followed(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """The optimiser, told to the modules that spawn experts: its state has to follow."""
    for module in model.modules():
        if isinstance(module, Evolution):
            module.attach(optimizer)
    return optimizer


def step_batches(config: MixtureConfig, arrays: dict[str, Tensor], steps: int, device: torch.device) -> StepBatches:
    """Training batches, ``steps`` of them between two evaluations."""
    return StepBatches(
        arrays, config.batch_size, steps=steps, shuffle=True, seed=config.seed, device=device, keep_on_device=True
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
        watch.start()
        with Probes(model) as probes:
            for batch in valid:
                logits, routings = model(batch)
                watch.add(routings)
        watch.write(model, probes.in_order(), step=step)
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
        summaries = [tally.summary() for tally in self.tallies]
        for layer, (summary, main, weights) in enumerate(zip(summaries, self.main, self.watched, strict=True)):
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
        return {
            "valid_experts": sum(summary["experts_mean"] for summary in summaries) / len(summaries),
            "valid_max_load": max(summary["max_over_mean"] for summary in summaries),
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


def _sparse_gates(model: nn.Module) -> list[DenseToSparseGate]:
    return [module for module in model.modules() if isinstance(module, DenseToSparseGate)]


def rules_differ(model: nn.Module) -> bool:
    """The rule of the current phase is another one than top-1: a dense-to-sparse gate is in its soft phase."""
    return any(gate.phase == "soft" for gate in _sparse_gates(model))


@contextmanager
def inference(model: nn.Module, rule: str) -> Iterator[None]:
    """Inside the block all dense-to-sparse gates of the model infer by ``rule``, "topk" or "matched"."""
    before = [(gate, gate.inference) for gate in _sparse_gates(model)]
    try:
        for gate, _ in before:
            gate.inference = rule
        yield
    finally:
        for gate, old in before:
            gate.inference = old


Measure = Callable[[Any, GateWatch], dict[str, float]]
"""Model, watch -> scores of the validation set; hands the Routings to the watch."""


class Recorder:
    """What `fit` asks for at each evaluation: scores of the validation set, and rows of the gates' curves.

    Args:
        config: of the run.
        result: gets the rows.
        measure: see `Measure`.
        curve: of `fit`, whose rows say how far the run is.
    """

    def __init__(self, config: MixtureConfig, result: Result, measure: Measure, curve: str = "epochs"):
        self.config, self.result, self.measure, self.curve = config, result, measure, curve
        self.watch = GateWatch(config, result)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Scores at the next evaluation."""
        evaluations = len(self.result.curves.get(self.curve, [])) + 1
        return self.look(model, min(evaluations * self.config.evaluate_every, self.config.steps))

    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        """The same, saying at which step."""
        self.watch.start()
        with Probes(model) as probes:
            scores = self.measure(model, self.watch)
        return scores | self.watch.write(model, probes.in_order(), step=step)


def train_mixture(
    config: MixtureConfig,
    model: nn.Module,
    arrays: dict[str, Tensor],
    loss: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    measure: Measure,
    result: Result,
    *,
    task: str,
    curve: str = "epochs",
    schedule: str = "cosine",
    progress: bool = True,
) -> History:
    """``config.steps`` steps, whatever the number of passes; goes on from the checkpoint of ``curve``.

    Args:
        config: of the run.
        model: on its device.
        arrays: the training split.
        loss: see `fit`.
        measure: see `Measure`; step 0, before training, is measured too.
        result: gets the curves.
        task: name of the task's term in the loss; its coefficient is 1.
        curve: see `fit`.
        schedule: of the learning rate.
        progress: show a bar.
    """
    recorder = Recorder(config, result, measure, curve)
    if not result.checkpoint_of(curve).exists():
        result.curves.clear()  # of a process that was killed before its first checkpoint
        with evaluating(model):
            recorder.look(model, 0)
    history = fit(
        model,
        step_batches(config, arrays, config.evaluate_every, next(model.parameters()).device),
        loss,
        optimizer=make_optimizer(model, config),
        coefficients=config.coefficients(**{task: 1.0}),
        evaluate=recorder,
        config=FitConfig(
            epochs=None,
            max_steps=config.steps,
            clip_norm=config.clip_norm,
            learning_rate=config.learning_rates(schedule),
            progress=progress,
        ),
        result=result,
        curve=curve,
        resume=True,
    )
    result.curves.pop("main_expert", None)  # only needed to compare two evaluations
    return history


def mean_experts(history: History) -> float:
    """Experts per token, mean over the steps of training."""
    steps = [0, *(row["step"] for row in history.rows)]
    lengths = [later - sooner for sooner, later in pairwise(steps)]
    experts = [row.get("train_experts", 1.0) for row in history.rows]
    return sum(n * k for n, k in zip(lengths, experts, strict=True)) / steps[-1]


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
