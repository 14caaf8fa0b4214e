"""What a teacher or student is worth and what it costs: scores, FLOPs, milliseconds, and which words go where.

Legend: N sentences, S sequence, T tokens, E experts, L layers, V vocabulary, Y classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.bench.timing import Timing, take_turns
from moe_lab.bert import SentenceClassifier, switched_off
from moe_lab.bert.cost import active_parameters, flops_per_token, head_flops
from moe_lab.bert.texts import trimmed
from moe_lab.datasets.glue import TextTask
from moe_lab.experiments.comet_bert_config import TeacherConfig
from moe_lab.experiments.mixture_training import precision
from moe_lab.metrics.glue import score
from moe_lab.metrics.routing import RoutingTally
from moe_lab.routing import Routing

_BATCH = 256
_WORDS = 12  # per expert
LATENCY_BATCHES = (1, 64)


class Predictions(NamedTuple):
    """logits (N, Y) on the CPU, mean loss in nats, and metrics of the task by name, the one to choose by first."""

    logits: Tensor
    loss: float
    metrics: dict[str, float]


def predict(
    config: TeacherConfig,
    model: SentenceClassifier,
    arrays: Mapping[str, Tensor],
    task: TextTask,
    look: Callable[[dict[str, Tensor], list[Routing]], None] | None = None,
) -> Predictions:
    """Run a split through a model in eval mode.

    Args:
        config: for the precision.
        model: on its device.
        arrays: tokens, segments, seen, label.
        task: of the labels.
        look: gets every batch and its Routings.
    """
    device = next(model.parameters()).device
    logits = []
    for rows in Batches(arrays, _BATCH, device=device).epoch(0):
        batch = trimmed(rows)
        with precision(config, device):
            answer = model(batch["tokens"], batch["seen"], batch["segments"])
        logits.append(answer.logits.float().cpu())
        if look is not None:
            look(batch, answer.trace.routings)
    found = torch.cat(logits)
    metrics = score(task, found.argmax(-1).numpy(), arrays["label"].numpy())
    return Predictions(found, float(cross_entropy(found, arrays["label"])), metrics)


class WordTally:
    """Which token ids go to which expert, layer by layer (an expert counts where its weight is the largest)."""

    def __init__(self, n_ids: int):
        self.n_ids = n_ids
        self.counts: list[Tensor] = []
        self.routings: list[RoutingTally] = []

    def add(self, batch: Mapping[str, Tensor], routings: list[Routing]) -> None:
        """Count one batch (padding not, even where it was routed)."""
        if not self.counts:
            self.counts = [torch.zeros(self.n_ids, routing.n_experts, dtype=torch.int64) for routing in routings]
            self.routings = [RoutingTally(1) for _ in routings]
        seen = batch["seen"].flatten()
        ids = batch["tokens"].flatten()[seen].cpu()
        for counts, tally, routing in zip(self.counts, self.routings, routings, strict=True):
            weights = routing.weights if len(routing.weights) == len(ids) else routing.weights[seen]
            tally.add(Routing(weights))
            counts.index_put_((ids, weights.argmax(-1).cpu()), torch.ones_like(ids), accumulate=True)

    def rows(self, tokenizer: Any) -> list[dict[str, Any]]:
        """The curve "words", one row per layer and expert.

        Returns:
            layer, expert, share of the tokens, and words: [piece, times here, share of all its occurrences], the most
            frequent here first.
        """
        rows = []
        for layer, counts in enumerate(self.counts):
            everywhere = counts.sum(1)
            for expert, here in enumerate(counts.T):
                top = here.argsort(descending=True, stable=True)[:_WORDS]
                ids = [index for index in top.tolist() if here[index] > 0]
                words = [
                    [piece, int(here[index]), round(float(here[index] / everywhere[index]), 3)]
                    for piece, index in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
                ]
                share = float(here.sum() / counts.sum())
                rows.append({"layer": layer, "expert": expert, "share": share, "words": words})
        return rows

    def decided_by_word(self) -> list[float]:
        """Per layer: share of tokens that go where most occurrences of the same id go. 1 for a hash table; about 1/E at
        least. Read it beside the experts' shares: one expert for all has 1, too."""
        return [float(counts.max(1).values.sum() / counts.sum()) for counts in self.counts]


def watched_sentences(
    config: TeacherConfig, model: SentenceClassifier, arrays: Mapping[str, Tensor], tokenizer: Any, n_sentences: int
) -> list[dict[str, Any]]:
    """The curve "sentences": routing token by token, and what happens when an expert is switched off.

    Returns:
        One row per sentence: pieces, label, probability (Y), expert [layer][piece], weight [layer][piece] of that
        expert, without [layer][expert]: probabilities (Y) when this expert is off.
    """
    device = next(model.parameters()).device
    batch = trimmed({name: values[:n_sentences].to(device) for name, values in arrays.items()})

    def run() -> tuple[Tensor, list[Routing]]:
        with precision(config, device):
            answer = model(batch["tokens"], batch["seen"], batch["segments"])
        return answer.logits.float().softmax(-1).cpu(), answer.trace.routings

    probability, routings = run()
    without: list[list[Tensor]] = []
    for layer, routing in enumerate(routings):
        without.append([])
        for expert in range(routing.n_experts):
            with switched_off(model, layer, expert):
                without[-1].append(run()[0])
    chosen = []
    for routing in routings:
        weights = routing.weights
        if len(weights) != int(batch["seen"].sum()):
            weights = weights[batch["seen"].flatten()]
        best = weights.max(-1)
        chosen.append((best.indices.tolist(), best.values.tolist()))
    rows, first = [], 0
    for index, length in enumerate(batch["seen"].sum(1).tolist()):
        here = slice(first, first + length)
        rows.append(
            {
                "pieces": tokenizer.convert_ids_to_tokens(batch["tokens"][index, :length].tolist()),
                "label": int(batch["label"][index]),
                "probability": _short(probability[index]),
                "expert": [experts[here] for experts, _ in chosen],
                "weight": [[round(value, 3) for value in values[here]] for _, values in chosen],
                "without": [[_short(off[index]) for off in layer] for layer in without],
            }
        )
        first += length
    return rows


def _short(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def costs(model: SentenceClassifier, length: float, experts: list[float] | None) -> dict[str, float]:
    """FLOPs per token of a sentence of ``length`` tokens (the head's are shared out), and active parameters."""
    return {
        "flops_per_token": flops_per_token(model.encoder, length, experts) + head_flops(model) / length,
        "active_parameters": active_parameters(model, experts),
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
    }


def latencies(
    config: TeacherConfig,
    models: Mapping[str, SentenceClassifier],
    arrays: Mapping[str, Tensor],
    rounds: int,
    steps: int = 5,
) -> dict[str, Timing]:
    """``<model>_<batch size>`` -> `Timing` of one forward pass; all models take turns on the same sentences.

    The single sentence is the one of median length; a batch is the first 64 of the split (fewer are repeated), padded
    to its longest. Includes a wait for the device; tokenising is not included.
    """
    device = next(iter(models.values())).head.weight.device
    lengths = arrays["seen"].sum(1)
    rows = {1: lengths.argsort(stable=True)[len(lengths) // 2 :][:1], 64: torch.arange(64) % len(lengths)}

    def case(model: SentenceClassifier, size: int) -> Callable[[], None]:
        batch = trimmed({name: values[rows[size]].to(device) for name, values in arrays.items()})

        def step() -> None:
            with precision(config, device):
                model(batch["tokens"], batch["seen"], batch["segments"])
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return step

    cases = {f"{name}_{size}": case(model, size) for name, model in models.items() for size in LATENCY_BATCHES}
    with torch.no_grad():
        return take_turns(cases, rounds=rounds, steps=steps)


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of sentences on which two predictions (N, Y) name the same class."""
    return float(np.mean(first.argmax(-1).numpy() == second.argmax(-1).numpy()))
