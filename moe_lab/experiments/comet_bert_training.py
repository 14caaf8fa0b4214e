"""COMET-BERT's trainings: the teacher, the importance of its neurons, the student; what each is, says `comet_bert`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.bert import SentenceClassifier, become_mixture, layer_loss, neuron_importance, prediction_loss
from moe_lab.bert.texts import trimmed
from moe_lab.experiments.comet_bert_config import (
    CometBertConfig,
    ImportanceConfig,
    TeacherConfig,
    learning_rates,
    make_gate,
)
from moe_lab.experiments.comet_bert_data import Texts, load_texts, load_weights, new_classifier, save_weights
from moe_lab.experiments.comet_bert_measure import predict
from moe_lab.experiments.mixture_training import (
    GateWatch,
    Recorder,
    make_optimizer,
    mean_experts,
    precision,
    routing_terms,
    step_batches,
)
from moe_lab.metrics.glue import score
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device, seed_everything
from moe_lab.train import FitConfig, evaluating, fit

TEACHER, IMPORTANCE, STUDENT = "comet_bert_teacher", "comet_bert_importance", "comet_bert_student"


@dataclass(frozen=True)
class _Stage:
    """The fields of one training under the names that the helpers of `mixture_training` know."""

    learning_rate: float
    weight_decay: float
    batch_size: int
    seed: int


def _answer(config: TeacherConfig, model: SentenceClassifier, batch: dict[str, Tensor]):
    with precision(config, batch["tokens"].device):
        return model(batch["tokens"], batch["seen"], batch["segments"])


def first(metrics: dict[str, float]) -> float:
    return next(iter(metrics.values()))


def _scores(found) -> dict[str, float]:
    """What a training is watched by. ``valid_error``: 1 - the metric to choose by."""
    return {
        "valid_error": 1 - first(found.metrics),
        "valid_loss": found.loss,
        **{f"valid_{name}": value for name, value in found.metrics.items()},
    }


# ---- the teacher


def finetune(
    config: TeacherConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Fine-tune the encoder on the task.

    Returns:
        A Result with the curve ``epochs``. Metrics: valid_<metric>, valid_loss, constant_<metric> (always the most
        frequent training label), n_cut (texts that were too long), parameters, seconds.
    """
    compute = partial(_finetune, config.teacher, progress)
    return run_cached(TEACHER, config.teacher, compute, root=root, recompute=recompute)


def teacher_loss(config: TeacherConfig, model: SentenceClassifier, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms of fine-tuning."""
    batch = trimmed(batch)
    return {"task": cross_entropy(_answer(config, model, batch).logits.float(), batch["label"])}


def _finetune(config: TeacherConfig, progress: bool, result: Result) -> dict[str, Any]:
    device = pick_device(config.device)
    texts = load_texts(config)
    seed_everything(config.teacher_seed)
    model = new_classifier(config, texts).to(device)
    stage = _Stage(config.teacher_rate, config.weight_decay, config.teacher_batch_size, config.teacher_seed)
    history = fit(
        model,
        step_batches(stage, texts.arrays["train"], config.teacher_every, device),
        partial(teacher_loss, config),
        optimizer=make_optimizer(model, stage),
        coefficients={"task": 1.0},
        evaluate=lambda model: _scores(predict(config, model, texts.arrays["valid"], texts.task)),
        monitor="valid_error",
        config=FitConfig(
            epochs=None,
            max_steps=config.teacher_steps,
            clip_norm=config.clip_norm,
            learning_rate=learning_rates(config.warmup, config.teacher_steps),
            progress=progress,
        ),
        result=result,
        resume=True,
    )
    save_weights(model, result)
    best = history.rows[history.best_epoch - 1]
    return {name: value for name, value in best.items() if name.startswith("valid_")} | {
        **_constant(texts),
        "n_cut": texts.n_cut,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": sum(row["seconds"] for row in history.rows),
    }


def _constant(texts: Texts) -> dict[str, float]:
    """What always saying the most frequent training label would score on the test rows."""
    most = int(torch.bincount(texts.arrays["train"]["label"]).argmax())
    label = texts.arrays["test"]["label"]
    constant = score(texts.task, torch.full_like(label, most).numpy(), label.numpy())
    return {f"constant_{name}": value for name, value in constant.items()}


def load_teacher(
    config: TeacherConfig, *, root: Path | str | None = None, progress: bool = True
) -> tuple[SentenceClassifier, Texts]:
    """The fine-tuned teacher in eval mode on its device, and its texts; fine-tuned first if it is not there."""
    result = finetune(config, root=root, progress=progress)
    texts = load_texts(config)
    model = new_classifier(config, texts)
    load_weights(model, result)
    return model.to(pick_device(config.device)).eval(), texts


# ---- importance


def importance(
    config: ImportanceConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Importance of the teacher's hidden neurons.

    Returns:
        A Result with the curve ``importance``: per layer, ``values`` (F,). Metrics: rows, top_half (per layer: share of
        all importance that the more important half has; 0.5 if all are alike), seconds.
    """
    part = config.part(ImportanceConfig)
    return run_cached(IMPORTANCE, part, partial(_importance, part, root, progress), root=root, recompute=recompute)


def _importance(config: ImportanceConfig, root: Any, progress: bool, result: Result) -> dict[str, Any]:
    model, texts = load_teacher(config, root=root, progress=progress)
    arrays = {name: values[: config.importance_rows] for name, values in texts.arrays[config.importance_split].items()}
    device = next(model.parameters()).device

    def losses(model: SentenceClassifier, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["tokens"], batch["seen"], batch["segments"]).logits  # in float32: small differences count
        return cross_entropy(logits, batch["label"], reduction="none")

    batches = Batches(arrays, 64, device=device)
    found = neuron_importance(model, map(trimmed, batches.epoch(0)), losses)
    result.curves.clear()
    for layer, values in enumerate(found):
        result.log("importance", layer=layer, values=values.tolist())
    halves = [values.sort(descending=True).values[: len(values) // 2].sum() / values.sum() for values in found]
    return {"rows": batches.n_rows, "top_half": [float(half) for half in halves]}


# ---- the student


def build_student(
    config: CometBertConfig, teacher: SentenceClassifier, texts: Texts, values: list[Tensor]
) -> SentenceClassifier:
    """The mixture before distillation, on the teacher's device.

    Args:
        config: with a gate other than "teacher".
        teacher: fine-tuned.
        texts: of its task.
        values: importance of each layer's neurons.
    """
    width = teacher.encoder.config.hidden_size
    expert_width = config.expert_width
    if config.gate == "pruned" and expert_width is None:  # as wide as one of the mixture's experts
        expert_width = len(values[0]) // config.n_experts
    return become_mixture(
        teacher,
        values,
        lambda index: make_gate(config, index, width, texts.counts),
        expert_width=expert_width,
        shared=config.shared,
        mix=config.mix,
        route_padding=config.padding,
    )


def distil(
    config: CometBertConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Build the mixture and train it to do as the teacher does.

    Returns:
        A Result with the curves ``epochs``, and ``routing``, ``distances`` of every evaluation (step 0: before
        training). Metrics: valid_<metric>, valid_loss, start_<metric> (before training), experts_per_token (mean over
        the steps of training), seconds.

    Raises:
        ValueError: gate "teacher": there is no student; experts that do not divide the layer, see `bert.mixture`.
    """
    if config.gate == "teacher":
        raise ValueError("gate='teacher' has no student to distil; evaluate it, or choose another gate")
    return run_cached(STUDENT, config, partial(_distil, config, root, progress), root=root, recompute=recompute)


def distillation_terms(
    config: CometBertConfig, teacher: SentenceClassifier, model: SentenceClassifier, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Terms of distillation; the teacher is no part of the model and stays in eval mode."""
    batch = trimmed(batch)
    with torch.no_grad():
        wanted = _answer(config, teacher, batch)
    given = _answer(config, model, batch)
    return {
        "task": cross_entropy(given.logits.float(), batch["label"]),
        "layers": layer_loss(given.trace.hidden, wanted.trace.hidden, batch["seen"], padding=config.padding),
        "predictions": prediction_loss(given.logits, wanted.logits),
        **routing_terms(config, given.trace.routings),
    }


def student_at_start(config: CometBertConfig, root: Any, progress: bool):
    measured = importance(config, root=root, progress=progress)
    teacher, texts = load_teacher(config, root=root, progress=progress)
    values = [torch.tensor(row["values"], dtype=torch.float64) for row in measured.curves["importance"]]
    return teacher, build_student(config, teacher, texts, values), texts


def _distil(config: CometBertConfig, root: Any, progress: bool, result: Result) -> dict[str, Any]:
    teacher, model, texts = student_at_start(config, root, progress)
    seed_everything(config.seed)  # the steps before this one may have drawn, or were found
    device = next(model.parameters()).device

    def measure(model: SentenceClassifier, watch: GateWatch) -> dict[str, float]:
        return _scores(
            predict(config, model, texts.arrays["valid"], texts.task, lambda _, routings: watch.add(routings))
        )

    recorder = Recorder(config, result, measure)
    if not result.checkpoint_path.exists():
        result.curves.clear()  # of a process that was killed before its first checkpoint
        with evaluating(model):
            result.log("start", **recorder.look(model, 0))
    history = fit(
        model,
        step_batches(config, texts.arrays["train"], config.evaluate_every, device),
        partial(distillation_terms, config, teacher),
        optimizer=make_optimizer(model, config),
        coefficients=config.coefficients(),
        evaluate=recorder,
        monitor="valid_error",
        config=FitConfig(
            epochs=None,
            max_steps=config.steps,
            clip_norm=config.clip_norm,
            learning_rate=learning_rates(config.warmup, config.steps),
            progress=progress,
        ),
        result=result,
        resume=True,
    )
    result.curves.pop("main_expert", None)
    save_weights(model, result)
    best = history.rows[history.best_epoch - 1]
    (start,) = result.curves["start"]
    return {name: value for name, value in best.items() if name.startswith("valid_")} | {
        **{name.replace("valid_", "start_"): value for name, value in start.items() if name.startswith("valid_")},
        "experts_per_token": mean_experts(history),
        "seconds": sum(row["seconds"] for row in history.rows),
    }


def load_student(
    config: CometBertConfig, *, root: Path | str | None = None, progress: bool = True
) -> tuple[SentenceClassifier, SentenceClassifier, Texts]:
    """Student and teacher in eval mode on their device, and the texts; steps that are missing are done first."""
    result = distil(config, root=root, progress=progress)
    teacher, model, texts = student_at_start(config, root, progress)
    load_weights(model, result)
    return model.eval(), teacher, texts
