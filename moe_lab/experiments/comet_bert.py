"""COMET-BERT step by step: fine-tune a teacher, measure its neurons, distil a mixture, evaluate both (COMET, KDD 2023).

    finetune(config)     the teacher         CE(label)
    importance(config)   I_h of every hidden neuron, on training rows
    distil(config)       the student: the teacher's feed-forward blocks split into experts behind a gate, trained with
                         CE(label) + layers + predictions + terms of the gate        (`moe_lab.bert.distil`)
    evaluate(config)     scores on the test rows, costs, milliseconds, which words go where
    run(config)          all of it

Each step leaves a `Result` (and weights beside it, as safetensors), does the steps before it if they are not done, is
found again when it is finished, and goes on from its checkpoint when it was interrupted. Teacher and importance are
filed under their own part of the config: all gates and seeds share them.

The checkpoint of either training is chosen on validation rows by the task's first metric; the test rows (for GLUE the
official dev set) are looked at by ``evaluate`` only. The authors choose and report on the dev set.

Taught in notebook 07.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_lab.bert import SentenceClassifier
from moe_lab.experiments.comet_bert_config import CometBertConfig
from moe_lab.experiments.comet_bert_data import Texts
from moe_lab.experiments.comet_bert_measure import (
    LATENCY_BATCHES,
    WordTally,
    agreement,
    costs,
    latencies,
    predict,
    watched_sentences,
)
from moe_lab.experiments.comet_bert_training import (
    build_student,
    distil,
    distillation_terms,
    finetune,
    first,
    importance,
    load_student,
    load_teacher,
    teacher_loss,
)
from moe_lab.results import Result, run_cached
from moe_lab.runtime import environment, pick_device

__all__ = [
    "EXPERIMENT",
    "build_student",
    "distil",
    "distillation_terms",
    "evaluate",
    "finetune",
    "importance",
    "load_student",
    "load_teacher",
    "retime",
    "run",
    "teacher_loss",
]
EXPERIMENT = "comet_bert"


def evaluate(
    config: CometBertConfig,
    *,
    root: Path | str | None = None,
    recompute: bool = False,
    progress: bool = True,
    timed: bool = True,
) -> Result:
    """Score and measure student and teacher on the test rows.

    Args:
        config: of the student.
        root, recompute: see `run_cached`.
        progress: bars for steps that are missing.
        timed: False: leave latency and speed-up out; `retime` adds them when nothing else uses the machine.

    Returns:
        A Result with the curves ``words`` and ``sentences`` (see `comet_bert_measure`), and those of distillation.
        Metrics, for gate "teacher" those of the teacher under the same names:
        test_score (the task's first metric), test_<metric>, test_loss, valid_<metric>, teacher_score,
        teacher_agreement (share of test rows with the teacher's class), experts_per_token (mean over layers, on test
        tokens), experts_by_layer, decided_by_word (mean over layers), flops_per_token, active_parameters, parameters,
        and the teacher's as teacher_<name>; seconds of distillation; if ``timed``, latency_ms_1, latency_ms_64
        (medians), their quartiles, the teacher's, speedup_1, speedup_64 (teacher's median over the student's), and
        timed_alone: False, see `retime`.
    """
    compute = partial(_evaluate, config, root, progress, timed)
    return run_cached(EXPERIMENT, config, compute, root=root, recompute=recompute)


def retime(config: CometBertConfig, *, root: Path | str | None = None) -> Result:
    """Measure the latencies of an evaluation once more, and keep all else that its Result says.

    Runs that share a machine disturb each other's clocks: what was trained side by side is timed afterwards, one run
    after the other. The metric ``timed_alone`` is True from then on; that nothing else runs is the caller's promise.

    Returns:
        The Result of `evaluate`, saved.

    Raises:
        FileNotFoundError: weights are not here, see `load_weights`.
    """
    result = evaluate(config, root=root, progress=False, timed=False)
    student, teacher, texts = _to_compare(config, root, progress=False)
    result.metrics |= _latency_metrics(config, student, teacher, texts) | {"timed_alone": True}
    result.save()
    return result


def run(
    config: CometBertConfig,
    *,
    root: Path | str | None = None,
    recompute: bool = False,
    progress: bool = True,
    timed: bool = True,
) -> Result:
    """All steps that are missing; the Result of `evaluate`. ``recompute``: evaluation and student, not the teacher."""
    if config.gate != "teacher":
        distil(config, root=root, recompute=recompute, progress=progress)
    return evaluate(config, root=root, recompute=recompute, progress=progress, timed=timed)


def _to_compare(
    config: CometBertConfig, root: Any, progress: bool
) -> tuple[SentenceClassifier | None, SentenceClassifier, Texts]:
    """Student (None for gate "teacher"), teacher, texts."""
    if config.gate == "teacher":
        return None, *load_teacher(config, root=root, progress=progress)
    return load_student(config, root=root, progress=progress)


def _evaluate(config: CometBertConfig, root: Any, progress: bool, timed: bool, result: Result) -> dict[str, Any]:
    result.curves.clear()
    metrics: dict[str, Any] = {}
    result.environment = environment(pick_device(config.device))
    student, teacher, texts = _to_compare(config, root, progress)
    trained = finetune(config, root=root) if student is None else distil(config, root=root)
    if student is not None:
        for curve in ("epochs", "routing", "distances"):
            result.curves[curve] = trained.curves[curve]
    test = texts.arrays["test"]
    with torch.no_grad():
        of_teacher = predict(config, teacher, test, texts.task)
        own, tally = of_teacher, WordTally(len(texts.counts))
        if student is not None:
            own = predict(config, student, test, texts.task, tally.add)
            result.curves["words"] = tally.rows(texts.tokenizer)
            if config.watched_sentences:
                rows = watched_sentences(config, student, test, texts.tokenizer, config.watched_sentences)
                result.curves["sentences"] = rows
    length = float(test["seen"].sum(1).double().mean())
    experts = [each.summary()["experts_mean"] for each in tally.routings]
    decided = tally.decided_by_word()
    if student is None:  # one expert for all
        experts = decided = [1.0] * len(teacher.encoder.encoder.layer)
    of_its_own = costs(teacher, length, None)
    metrics |= {
        "test_score": first(own.metrics),
        **{f"test_{name}": value for name, value in own.metrics.items()},
        "test_loss": own.loss,
        **{name: value for name, value in trained.metrics.items() if name.startswith("valid_")},
        "teacher_score": first(of_teacher.metrics),
        "teacher_agreement": agreement(own.logits, of_teacher.logits),
        "tokens_per_sentence": length,
        **(of_its_own if student is None else costs(student, length, experts)),
        **{f"teacher_{name}": value for name, value in of_its_own.items()},
        "experts_per_token": sum(experts) / len(experts),
        "experts_by_layer": experts,
        "decided_by_word": sum(decided) / len(decided),
        "seconds": trained.metrics["seconds"],
    }
    if timed:
        metrics |= _latency_metrics(config, student, teacher, texts) | {"timed_alone": False}
    return metrics


def _latency_metrics(
    config: CometBertConfig, student: SentenceClassifier | None, teacher: SentenceClassifier, texts: Texts
) -> dict[str, Any]:
    """What a forward pass takes; without a student the teacher beside itself."""
    models = {"teacher": teacher} if student is None else {"teacher": teacher, "student": student}
    timings = latencies(config, models, texts.arrays["test"], config.latency_rounds)
    subject = "teacher" if student is None else "student"
    metrics: dict[str, Any] = {}
    for size in LATENCY_BATCHES:
        own_time, base = timings[f"{subject}_{size}"], timings[f"teacher_{size}"]
        low, high = own_time.quartiles
        metrics |= {
            f"latency_ms_{size}": 1e3 * own_time.median,
            f"latency_ms_{size}_quartiles": [1e3 * low, 1e3 * high],
            f"teacher_latency_ms_{size}": 1e3 * base.median,
            f"speedup_{size}": base.median / own_time.median,
        }
    return metrics
