"""How well a vision model classifies, and whom its gates send where, over a whole split.

Legend: N images, E experts, K trees or selectors, Y classes. Weights and sums stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        domain_weights: the same by visual domain, (domains, E); empty where there are no domains.
        experts_run: mean number of experts that run on an image; one that several tasks want is counted once.
    """

    scores: dict[str, float]
    routing: dict[str, dict[str, Any]]
    class_weights: dict[str, list[list[float]]]
    domain_weights: dict[str, list[list[float]]]
    experts_run: float


def _most_frequent(sets: Tensor) -> float:
    """Share of the most frequent row of (N, E) bool."""
    if sets.shape[1] < 63:  # a row as one number: far quicker to sort
        bits = 2 ** torch.arange(sets.shape[1], device=sets.device)
        return float((sets * bits).sum(1).unique(return_counts=True)[1].max() / len(sets))
    return float(sets.unique(dim=0, return_counts=True)[1].max() / len(sets))


def _mean_by_group(group: Tensor, weights: Tensor, n_groups: int) -> list[list[float]]:
    """(n_groups, E) mean of the rows of weights (N, E) with this group (N,); 0 for a group without rows."""
    total = weights.new_zeros(n_groups, weights.shape[1]).index_add(0, group, weights)
    count = torch.bincount(group, minlength=n_groups).clamp(min=1)
    return rounded((total / count[:, None]).tolist())


@torch.no_grad()
def measure(
    model: MultiDigitClassifier, batches: Batches, tasks: tuple[str, ...], k: int, n_classes: int
) -> Measurement:
    """Run the model (in the mode it is in) over all batches."""
    tallies = [RoutingTally(k) for _ in tasks]
    sums, weights, labels, domains = [], [], [], []
    for batch in batches.epoch(0):
        logits, routings = model(batch["image"], batch["key"])
        of_batch = []
        for scores, routing, label, tally in zip(logits, routings, batch["labels"].T, tallies, strict=True):
            hits = (scores.argmax(1) == label).sum().double()
            of_batch.append(torch.stack((cross_entropy(scores.double(), label, reduction="sum"), hits)))
            tally.add(routing)
        sums.append(torch.stack(of_batch))
        weights.append(torch.stack([routing.weights for routing in routings]))
        labels.append(batch["labels"])
        domains.append(batch.get("domain"))
    means = (torch.stack(sums).sum(0) / batches.n_rows).tolist()
    return measurement_of(
        tasks,
        means,
        [tally.summary() for tally in tallies],
        torch.cat(weights, 1),
        torch.cat(labels).T,
        None if domains[0] is None else torch.cat(domains),
        n_classes,
    )


def measurement_of(
    tasks: tuple[str, ...],
    means: Sequence[Sequence[float]],
    summaries: Sequence[dict[str, Any]],
    weight: Tensor,
    label: Tensor,
    domain: Tensor | None,
    n_classes: int,
) -> Measurement:
    """Put together what was counted.

    Args:
        tasks: their names, S of them.
        means: per task, loss and share of hits.
        summaries: per task, `RoutingTally.summary`.
        weight: (S, N, E) what each gate gives to each expert.
        label: (S, N).
        domain: (N,) or None.
        n_classes: Y.
    """
    active = weight != 0
    scores = {
        "loss": sum(loss for loss, _ in means) / len(tasks),
        "accuracy": sum(hit for _, hit in means) / len(tasks),
    }
    for task, (loss, accuracy) in zip(tasks, means, strict=True):
        scores |= {f"loss_{task}": loss, f"accuracy_{task}": accuracy}
    return Measurement(
        scores,
        {
            task: rounded({**summary, "same_set": _most_frequent(of_task)})
            for task, summary, of_task in zip(tasks, summaries, active, strict=True)
        },
        {task: _mean_by_group(label[s], weight[s], n_classes) for s, task in enumerate(tasks)},
        {} if domain is None else {t: _mean_by_group(domain, w, 2) for t, w in zip(tasks, weight, strict=True)},
        float(active.any(0).sum(1).double().mean()),
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
