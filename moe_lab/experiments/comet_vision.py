"""COMET in vision: convolutional experts, one gate per digit in the image (COMET, KDD 2023, section 5).

    loss = mean over tasks of CE(label_s) + sum over gates of coefficient x regulariser

MultiMNIST: an image holds two digits, one at the top left, one at the bottom right; each is a task with a gate and a
head of its own, the experts are shared. The gates see the raw pixels, not features: nothing that is trained stands
between image and split, so a split that has become hard for an image stays hard. The mixtures (MNIST + SVHN) are one
task with one gate. The validation loss (tasks only) chooses the epoch; the test images are looked at once, at the end.

Where we differ: losses of a data set are exact means, the best epoch's weights are restored also when the epoch limit
ends the run (theirs are only when early stopping triggers), experts with weight 0 are not run, and hash keys come from
the pixels. ``center_pixels`` is ours, and off by default.

Taught in notebook 04.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.datasets import Dataset
from moe_lab.experiments.comet_recommender import training_metrics
from moe_lab.experiments.vision_config import BASELINES, VisionConfig
from moe_lab.experiments.vision_data import constant_baseline, load_data, mean_image, task_names
from moe_lab.experiments.vision_measure import Measurement, measure, routing_of
from moe_lab.gates.base import Gate
from moe_lab.gates.build import build_gates
from moe_lab.gates.hashed import HashGate
from moe_lab.gates.local_search import PermutationSearch
from moe_lab.models import MultiDigitClassifier
from moe_lab.results import Result, run_cached
from moe_lab.routing import sum_losses
from moe_lab.runtime import pick_device
from moe_lab.train import FitConfig, evaluating, fit

EXPERIMENT = "comet_vision"
_EVALUATION_ROWS = 2048  # per forward pass; results are exact means, so the number is only a matter of memory
_ADAM_EPSILON = 1e-7  # Keras's, with which the authors trained


def run(
    config: VisionConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Train and test one gate, or read the finished Result back.

    Returns:
        A Result with the curves

        * ``epochs``, made by `fit`: training terms, ``valid_loss``, ``valid_accuracy`` (also per task);
        * ``routing``, per epoch (0: before training) and task: experts per image, load, importance, saturation;
        * ``watched``, now and then: ``weights`` (images, E) and ``leaves`` (images, E, K) of a few validation images
          per task; the last rows (``final``) are those of the restored model;
        * ``permutation`` with "+": health of the search.

        Metrics: see `final_metrics`.

    Raises:
        DatasetNotFound: the real data set is not in the cache; the message says how to fetch it.
    """
    return run_cached(EXPERIMENT, config, partial(train_and_test, config, progress), root=root, recompute=recompute)


def _baseline_gates(config: VisionConfig, n_tasks: int) -> list[HashGate]:
    """Gates that do not look: every image of task s goes to expert s ("expert_per_task") or 0 ("one_expert")."""
    n_experts = 1 if config.gate == "one_expert" else n_tasks
    gates = [HashGate(config.n_keys, n_experts) for _ in range(n_tasks)]
    for task, gate in enumerate(gates):
        gate.table.fill_(task % n_experts)
    return gates


def _gates(config: VisionConfig, n_tasks: int, in_features: int, steps_per_epoch: int) -> list[Gate]:
    if config.gate in BASELINES:
        return _baseline_gates(config, n_tasks)
    return build_gates(
        config.gate,
        n_tasks,
        in_features=in_features,
        n_experts=config.n_experts,
        k=config.k,
        gamma=config.gamma,
        n_keys=config.n_keys,
        seed=config.seed,
        permutation_steps=max(1, round(config.permutation_epochs * steps_per_epoch)) if config.searches else None,
        schedule=config.permutation_schedule,
    )


def build_model(config: VisionConfig, data: Dataset, steps_per_epoch: int) -> MultiDigitClassifier:
    """The untrained model. Everything but the gates starts equal for all gates of one seed (baselines excepted)."""
    n_tasks, (channels, side, _) = data.info["n_tasks"], data.train["image"].shape[1:]
    return MultiDigitClassifier(
        _gates(config, n_tasks, channels * side * side, steps_per_epoch),
        image_size=side,
        in_channels=channels,
        n_tasks=n_tasks,
        n_classes=data.info["n_classes"],
        channels=config.channels,
        kernel=config.kernel,
        dense=config.dense,
        head=config.head,
        scale=data.info["scale"],
        gate_offset=mean_image(data) if config.center_pixels else None,
        generator=torch.Generator().manual_seed(config.seed),
    )


def classification_loss(tasks: tuple[str, ...], model: MultiDigitClassifier, batch: dict[str, Tensor]) -> dict:
    """The unweighted terms: cross entropy of each task, and what the gates ask for (summed over the gates)."""
    logits, routings = model(batch["image"], batch["key"])
    terms = {
        task: cross_entropy(scores, label) for task, scores, label in zip(tasks, logits, batch["labels"].T, strict=True)
    }
    return terms | sum_losses(routings)


class Recorder:
    """What `fit` asks for after each epoch: measures the validation images and writes the curves down."""

    def __init__(self, config: VisionConfig, data: Dataset, result: Result, device: torch.device):
        self.config, self.result, self.tasks = config, result, task_names(data.info["n_tasks"])
        self.valid = Batches(columns(data.valid), _EVALUATION_ROWS, device=device, keep_on_device=True)
        self.watched = {name: array[: config.watched_images] for name, array in self.valid.arrays.items()}
        self.n_classes = data.info["n_classes"]

    def __call__(self, model: MultiDigitClassifier) -> dict[str, float]:
        """Metrics of the validation images; a row per task in curve ``routing``, perhaps rows in ``watched``."""
        epoch = len(self.result.curves.get("routing", [])) // len(self.tasks)
        found = measure(model, self.valid, self.tasks, self.config.k, self.n_classes)
        for task, summary in found.routing.items():
            self.result.log("routing", epoch=epoch, task=task, **summary)
        if epoch <= 10 or epoch % 5 == 0:
            self.watch(model, epoch)
        permutation = _permutation_of(model)
        if permutation is not None:
            self.result.log("permutation", epoch=epoch, **permutation.health())
        return {f"valid_{name}": value for name, value in found.scores.items()}

    def watch(self, model: MultiDigitClassifier, epoch: int, final: bool = False) -> None:
        """Write down how the watched images are routed."""
        if self.config.watched_images:
            for task, row in routing_of(model, self.watched, self.tasks).items():
                self.result.log("watched", epoch=epoch, final=final, task=task, **row)


def _permutation_of(model: MultiDigitClassifier):
    gate = model.moe.gates[0]
    return gate.permutation if isinstance(gate, PermutationSearch) else None


def columns(split: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a run needs of a split."""
    return {name: split[name] for name in ("image", "labels", "key", "domain") if name in split}


def final_metrics(found: Measurement, data: Dataset) -> dict[str, Any]:
    """What the test images say about the restored model.

    Returns:
        test_loss, test_accuracy (means over the tasks), test_loss_<task>, test_accuracy_<task>;
        experts_per_example (mean over images and tasks); experts_run (mean number of experts that really run on
        an image: tasks that want the same one share it); within_k (share of images with at most k experts, the
        worse task); used_experts (the worse task); same_set (share of images that all go to the one most
        frequent set of experts: 1 = the gate does not look at the image; mean over tasks); constant_loss and
        constant_accuracy (no network); ``routing`` per task as in `RoutingTally.summary`; ``class_weights`` per
        task, (classes, E) mean weight of each expert for each class; ``domain_weights``, the same by visual
        domain (mixtures).
    """
    return {
        **{f"test_{name}": value for name, value in found.scores.items()},
        "experts_per_example": sum(gate["experts_mean"] for gate in found.routing.values()) / len(found.routing),
        "experts_run": found.experts_run,
        "same_set": sum(gate["same_set"] for gate in found.routing.values()) / len(found.routing),
        "within_k": min(gate["within_k"] for gate in found.routing.values()),
        "used_experts": min(gate["used"] for gate in found.routing.values()),
        **constant_baseline(data.train, data.test, data.info["n_classes"]),
        "routing": found.routing,
        "class_weights": found.class_weights,
        "domain_weights": found.domain_weights,
    }


def train_and_test(
    config: VisionConfig,
    progress: bool,
    result: Result,
    prepare: Callable[[MultiDigitClassifier], None] = lambda model: None,
) -> dict[str, Any]:
    """One training, into ``result``; its metrics. ``prepare`` may change the model before it."""
    device = pick_device(config.device)
    data = load_data(config)
    tasks = task_names(data.info["n_tasks"])
    train = Batches(
        columns(data.train), config.batch_size, shuffle=True, seed=config.seed, device=device, keep_on_device=True
    )
    model = build_model(config, data, len(train)).to(device)
    prepare(model)
    recorder = Recorder(config, data, result, device)
    if not result.checkpoint_path.exists():
        result.curves.clear()  # of a process that was killed before its first checkpoint
        with evaluating(model):
            recorder(model)  # epoch 0: before training
    history = fit(
        model,
        train,
        partial(classification_loss, tasks),
        optimizer=torch.optim.Adam(model.parameters(), lr=config.learning_rate, eps=_ADAM_EPSILON, fused=True),
        coefficients=config.coefficients(tasks),
        evaluate=recorder,
        config=FitConfig(epochs=config.epochs, patience=config.patience, progress=progress),
        result=result,
        resume=True,
    )
    test = Batches(columns(data.test), _EVALUATION_ROWS, device=device)
    with evaluating(model):
        recorder.watch(model, history.best_epoch, final=True)
        found = measure(model, test, tasks, config.k, data.info["n_classes"])
    return {**training_metrics(model, history), **final_metrics(found, data)}
