"""The vision experiment for `fit_stacked`: the words of one trial that `torch.func.vmap` reads for all.

Legend: K trials, B images of H x W pixels, C channels, E experts, F outputs, D = k k C numbers of a patch.

Every expert sees every image; the weights' zeros are exact (see `stacked_recommender`). A layer of all experts of all
trials is one `pooled_convolution`: three kernels on a GPU, products of patches elsewhere.

On a GPU the convolutions have bfloat16 operands and float32 sums, and what goes from layer to layer, and back as its
gradient, is bfloat16: what a step costs is mostly memory traffic. Everything else, gates and dense layers included, is
float32. (`comet_vision.run` leaves convolutions to cuDNN, which rounds operands to TF32 by default.)

Where we differ from `comet_vision.run`: no watched images are written down (``watched_images=0``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.datasets import Dataset
from moe_lab.experiments.comet_vision import classification_loss, columns, final_metrics
from moe_lab.experiments.pooled_convolution import pooled_convolution
from moe_lab.experiments.stacked_gates import StackedGates, run_gate
from moe_lab.experiments.stacked_measures import StackedTally
from moe_lab.experiments.vision_config import VisionConfig
from moe_lab.experiments.vision_data import task_names
from moe_lab.experiments.vision_measure import Measurement, measurement_of
from moe_lab.experts import ConvExperts
from moe_lab.models import MultiDigitClassifier
from moe_lab.routing import Routing
from moe_lab.train.stack import TrialStack

_EVALUATION_ROWS = 512  # of each trial at a time; a matter of memory only


def dense_experts(bank: ConvExperts, x: Tensor) -> Tensor:
    """Every expert on every image: x (B, C, H, W) -> (E, B, F)."""
    dtype, x = x.dtype, x.permute(0, 2, 3, 1).unsqueeze(0)  # all experts look at the same images
    if x.is_cuda and dtype == torch.float32:
        x = x.to(torch.bfloat16)
    for weight, bias in zip(bank.weights, bank.biases, strict=True):
        filters = weight.permute(0, 3, 4, 2, 1).flatten(1, 3)  # (E, D, C)
        x = pooled_convolution(x, filters, bias, weight.shape[-1])
    x = x.movedim(-1, 2).flatten(2).to(dtype)
    for weight, bias in zip(bank.head.weights, bank.head.biases, strict=True):
        x = (torch.bmm(x, weight) + bias[:, None]).relu()
    return x


def dense_forward(model: MultiDigitClassifier, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Routing]]:
    """``model(image, key)`` without the sparse dispatch.

    Args:
        model: a template.
        inputs: ``image``, ``key``; ``gamma`` and ``matrix`` where the gate has them.
    """
    x = inputs["image"].to(model.heads[0][0].weight.dtype) / model.scale
    pixels = x.flatten(1) if model.gate_offset is None else x.flatten(1) - model.gate_offset
    seen = [inputs["key"] if gate.gate_input == "keys" else pixels for gate in model.moe.gates]
    routings = [run_gate(gate, what, inputs) for gate, what in zip(model.moe.gates, seen, strict=True)]
    h = dense_experts(model.moe.experts, x)
    mixtures = torch.einsum("sbe,ebf->sbf", torch.stack([routing.weights for routing in routings]), h)
    return [layer(y) for layer, y in zip(model.heads, mixtures, strict=True)], routings


class StackedVision(StackedGates):
    """What `fit_stacked` asks about K trials of one data set: loss, inputs, evaluation; and the test images at the end.

    Args:
        configs: one per trial, see `stacked_trials.check_stackable`.
        data: their data.
        device: where the stack lives.
        learns: see `StackedGates`.
    """

    def __init__(self, configs: Sequence[VisionConfig], data: Dataset, device: torch.device, learns: bool = True):
        super().__init__(configs, device, learns)
        self.data, self.tasks = data, task_names(data.info["n_tasks"])
        self.valid = Batches(columns(data.valid), _EVALUATION_ROWS, device=device, keep_on_device=True)

    def loss(self, model: MultiDigitClassifier, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`classification_loss` of one trial."""
        terms = classification_loss(self.tasks, lambda image, key: dense_forward(model, inputs), inputs)
        if "permutation" in terms:
            terms["permutation"] = terms["permutation"] * inputs["soft"]  # 0 after the search, as `fit` has it
        return terms

    def inputs(self, stack: TrialStack, step: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gamma and permutation matrices of a training step."""
        return self.widths(stack) | self.search(stack)

    def _predict(self, model: MultiDigitClassifier, inputs: dict[str, Tensor]) -> tuple:
        logits, routings = dense_forward(model, inputs)
        labels = inputs["labels"].T
        losses = [cross_entropy(s.double(), y, reduction="sum") for s, y in zip(logits, labels, strict=True)]
        hits = [(s.argmax(1) == y).sum().double() for s, y in zip(logits, labels, strict=True)]
        trees = [routing.details.get("tree_probabilities") for routing in routings]
        return (
            torch.stack([torch.stack(losses), torch.stack(hits)]),
            torch.stack([routing.weights for routing in routings]),
            [tree for tree in trees if tree is not None],
        )

    def measure(self, stack: TrialStack, batches: Batches) -> list[Measurement]:
        """`vision_measure.measure` of each trial."""
        own = self.for_evaluation(stack)
        tallies = [StackedTally(self.configs[0].k) for _ in self.tasks]
        sums, weights, labels, domains = [], [], [], []
        for batch in batches.epoch(0):
            found, weight, trees = stack.call(self._predict, own, batch)
            sums.append(found)
            weights.append(weight)
            labels.append(batch["labels"])
            domains.append(batch.get("domain"))
            for place, tally in enumerate(tallies):
                tally.add(weight[:, place], trees[place] if trees else None)
        means = (torch.stack(sums).sum(0) / batches.n_rows).transpose(1, 2).tolist()  # per trial and task: loss, hits
        weight, label = torch.cat(weights, 2), torch.cat(labels).T
        domain = None if domains[0] is None else torch.cat(domains)
        summaries = [tally.summaries() for tally in tallies]
        n_classes = self.data.info["n_classes"]
        return [
            measurement_of(self.tasks, means[row], [s[row] for s in summaries], weight[row], label, domain, n_classes)
            for row in range(len(stack))
        ]

    def evaluate(self, stack: TrialStack) -> list[dict[str, float]]:
        """Validation metrics of each trial; logs its ``routing`` and ``permutation`` rows as the ordinary run does."""
        found = self.measure(stack, self.valid)
        for trial, of_trial in zip(stack.trials, found, strict=True):
            epoch = len(trial.curves.get("routing", [])) // len(self.tasks)
            for task, summary in of_trial.routing.items():
                trial.log("routing", epoch=epoch, task=task, **summary)
        if self.searches:
            with self.permutations_on_host(stack) as permutations:
                for trial, permutation in zip(stack.trials, permutations, strict=True):
                    epoch = len(trial.curves.get("permutation", []))
                    trial.log("permutation", epoch=epoch, **permutation.health())
        return [{f"valid_{name}": value for name, value in of_trial.scores.items()} for of_trial in found]

    @torch.no_grad()
    def test(self, stack: TrialStack) -> list[dict[str, Any]]:
        """`final_metrics` of each trial."""
        stack.template.eval()
        batches = Batches(columns(self.data.test), _EVALUATION_ROWS, device=self.device)
        return [final_metrics(found, self.data) for found in self.measure(stack, batches)]
