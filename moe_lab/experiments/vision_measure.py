"""How well a vision model classifies, and whom its gates send where, over a whole split.

Legend: N images, E experts, K trees or selectors, Y classes. Sums stay on the device; the CPU waits once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.experiments.comet_recommender import rounded
from moe_lab.metrics.routing import RoutingTally
from moe_lab.models import MultiDigitClassifier


@dataclass(frozen=True)
class Measurement:
    """Of one split.

    Attributes:
        scores: loss and accuracy, means over the tasks; loss_<task> (cross entropy, nats) and accuracy_<task>.
        routing: per task, `RoutingTally.summary`, and ``same_set``: share of images that go to the most frequent set of
            experts (1: the gate does not look at the image).
        class_weights: per task, (Y, E) mean weight that images with this label give to each expert.
        experts_run: mean number of experts that run on an image; one that several tasks want is counted once.
    """

    scores: dict[str, float]
    routing: dict[str, dict[str, Any]]
    class_weights: dict[str, list[list[float]]]
    experts_run: float


def _most_frequent(sets: Tensor) -> float:
    """Share of the most frequent row of (N, E) bool."""
    return float(sets.unique(dim=0, return_counts=True)[1].max() / len(sets))


@torch.no_grad()
def measure(
    model: MultiDigitClassifier, batches: Batches, tasks: tuple[str, ...], k: int, n_classes: int
) -> Measurement:
    """Run the model (in the mode it is in) over all batches."""
    tallies = [RoutingTally(k) for _ in tasks]
    sums: list[Tensor] = []
    by_class: list[Tensor] = []
    active: list[Tensor] = []
    for batch in batches.epoch(0):
        logits, routings = model(batch["image"], batch["key"])
        losses, weights = [], []
        for scores, routing, label, tally in zip(logits, routings, batch["labels"].T, tallies, strict=True):
            hits = (scores.argmax(1) == label).sum().double()
            losses.append(torch.stack((cross_entropy(scores.double(), label, reduction="sum"), hits)))
            of_class = torch.nn.functional.one_hot(label, n_classes).double()
            weights.append(torch.cat((of_class.T @ routing.weights.double(), of_class.sum(0)[:, None]), 1))
            tally.add(routing)
        sums.append(torch.stack(losses))
        by_class.append(torch.stack(weights))
        active.append(torch.stack([routing.active for routing in routings]))
    means = (torch.stack(sums).sum(0) / batches.n_rows).tolist()
    totals = torch.stack(by_class).sum(0).cpu()  # (tasks, Y, E + 1), last column: how many images
    shares = totals[..., :-1] / totals[..., -1:].clamp(min=1)
    scores = {
        "loss": sum(loss for loss, _ in means) / len(tasks),
        "accuracy": sum(hit for _, hit in means) / len(tasks),
    }
    for task, (loss, accuracy) in zip(tasks, means, strict=True):
        scores |= {f"loss_{task}": loss, f"accuracy_{task}": accuracy}
    sets = torch.cat(active, 1)  # (tasks, N, E)
    return Measurement(
        scores,
        {
            task: rounded({**tally.summary(), "same_set": _most_frequent(of_task)})
            for task, tally, of_task in zip(tasks, tallies, sets, strict=True)
        },
        {task: rounded(share.tolist()) for task, share in zip(tasks, shares, strict=True)},
        float(sets.any(0).sum(1).double().mean()),
    )


@torch.no_grad()
def routing_of(
    model: MultiDigitClassifier, arrays: dict[str, Tensor], tasks: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Per task ``weights`` (N, E) and, for gates with trees or selectors, ``leaves`` (N, E, K), as rounded lists."""
    _, routings = model(arrays["image"], arrays["key"])
    rows = {}
    for task, routing in zip(tasks, routings, strict=True):
        rows[task] = {"weights": rounded(routing.weights.tolist(), 3)}
        leaves = routing.details.get("tree_probabilities")
        if leaves is not None:
            rows[task]["leaves"] = rounded(leaves.tolist(), 3)
    return rows
