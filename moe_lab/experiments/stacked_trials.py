"""Many trials at once, of the recommender or of vision: one stack of parameters, one pass of the GPU, a Result each.

Trials that differ in seed, learning rate, gamma, loss weights and length of the search train side by side; whatever
changes shapes, data or the number of epochs makes another stack. All gates of `GATE_NAMES` stack, with and without "+".

A trial's Result is the one that `comet_recommender.run` or `comet_vision.run` would leave (same experiment, config,
curves and metrics) and is found again by either. The numbers are the same up to rounding where there is no dropout;
with dropout the masks come from another source (`counted_dropout`), as they do when a CPU run is repeated on a GPU.
``wall_seconds`` and the epochs' ``seconds`` are the trial's share: time of the stack / living trials.

It is for GPUs, which a single small model leaves idle. A CPU core is busy with one trial, and the stack runs experts
that a sparse gate skips: `bench.many_trials` compares.

A stack trains whole or not at all: if one of its trials is missing (or diverged), all are trained, since a row more
costs little, and finished Results are kept as they are. A study does not ask again for a trial that diverged.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.batches import Batches
from moe_lab.datasets import Dataset
from moe_lab.experiments import comet_recommender
from moe_lab.experiments.comet_recommender import COLUMNS, training_metrics
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.stacked_gates import StackedGates, open_gates
from moe_lab.experiments.stacked_recommender import StackedRecommender, make_template
from moe_lab.experiments.vision_config import VisionConfig
from moe_lab.results import Result
from moe_lab.results.plain import fingerprint
from moe_lab.runtime import configure_threads, environment, pick_device
from moe_lab.train import FitConfig, NonFiniteLoss
from moe_lab.train.checkpoint import remove_checkpoint
from moe_lab.train.stack import Trial, TrialStack
from moe_lab.train.stacked import fit_stacked

Config = RecommenderConfig | VisionConfig

GATES = ("softmax", "topk", "hash", "hash_balanced", "dselect_k", "comet")  # each with and without "+"
OWN_FIELDS = (
    "seed",
    "learning_rate",
    "gamma",
    "entropy_weight",
    "load_balance_weight",
    "permutation_weight",
    "permutation_epochs",
    "watch_weight",
    "official_batch",
)


@dataclass(frozen=True)
class Kind:
    """What an experiment brings along.

    Attributes:
        experiment: name of its Results.
        load: config -> data.
        arrays: a split -> what a batch needs.
        build: (config, data, steps per epoch) -> untrained model.
        template: (config, data) -> see `TrialStack`.
        questions: (configs, data, device) -> loss, inputs, learning, evaluate, test.
        coefficients: (config, data) -> of the loss terms.
        alike: fields that need one certain value.
    """

    experiment: str
    load: Callable[[Any], Dataset]
    arrays: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    build: Callable[[Any, Dataset, int], nn.Module]
    template: Callable[[Any, Dataset], nn.Module]
    questions: Callable[[Sequence[Any], Dataset, torch.device], StackedGates]
    coefficients: Callable[[Any, Dataset], dict[str, float]]
    alike: Mapping[str, Any] = field(default_factory=dict)


def recommender_kind() -> Kind:
    """That of `comet_recommender`."""

    def sizes(data: Dataset) -> tuple[int, int]:
        return data.info["n_users"], data.info["n_items"]

    return Kind(
        comet_recommender.EXPERIMENT,
        comet_recommender.load_data,
        lambda split: {name: split[name] for name in COLUMNS},
        lambda config, data, steps: comet_recommender.build_model(config, *sizes(data), steps),
        lambda config, data: make_template(config, *sizes(data)),
        StackedRecommender,
        lambda config, data: config.coefficients(),
    )


def vision_kind() -> Kind:
    """That of `comet_vision`."""
    from moe_lab.experiments import comet_vision  # only here: a recommender needs no images
    from moe_lab.experiments.stacked_vision import StackedVision
    from moe_lab.experiments.vision_data import load_data, task_names

    def template(config: VisionConfig, data: Dataset) -> nn.Module:
        model = comet_vision.build_model(config, data, 1)
        open_gates(model, config.n_experts)
        return model

    return Kind(
        comet_vision.EXPERIMENT,
        load_data,
        comet_vision.columns,
        comet_vision.build_model,
        template,
        StackedVision,
        lambda config, data: config.coefficients(task_names(data.info["n_tasks"])),
        {"watched_images": 0},
    )


def _kind(config: Config) -> Kind:
    return vision_kind() if isinstance(config, VisionConfig) else recommender_kind()


def check_stackable(configs: Sequence[Config]) -> None:
    """Refuse trials that cannot train side by side.

    Raises:
        ValueError: none or the same one twice; a gate that does not stack; a field outside `OWN_FIELDS` that differs;
            watched images.
    """
    if not configs:
        raise ValueError("a stack needs at least one trial")
    gate = configs[0].gate
    if gate.removesuffix("+") not in GATES:
        raise ValueError(f"trials with gate {gate!r} train one by one. These stack, also with '+': {', '.join(GATES)}")
    for name in (each.name for each in dataclasses.fields(configs[0])):
        values = [getattr(config, name) for config in configs]
        if name not in OWN_FIELDS and any(value != values[0] for value in values):
            raise ValueError(
                f"trials of a stack must agree in {name}, got {values[0]!r} and others: make a stack of each. "
                f"They may differ in {', '.join(OWN_FIELDS)}"
            )
    for name, value in _kind(configs[0]).alike.items():
        if getattr(configs[0], name) != value:
            raise ValueError(f"trials of a stack need {name}={value}, got {getattr(configs[0], name)!r}")
    if len({fingerprint(config) for config in configs}) < len(configs):
        raise ValueError("two trials of the stack have the same config: give them different seeds")


def run_stack(
    configs: Sequence[Config],
    *,
    root: Path | str | None = None,
    recompute: bool = False,
    progress: bool = True,
    checkpoint_epochs: int = 1,
    kind: Kind | None = None,
) -> list[Result]:
    """Train and test these trials, or what is left of them: goes on from the stack's checkpoint.

    Args:
        configs: see `check_stackable`. How many fit is a matter of memory: weights, gradients, two moments and best
            weights of each, and its activations, K x batch x E x hidden numbers a few times over.
        root, recompute, progress: as in `comet_recommender.run`.
        checkpoint_epochs: see `fit_stacked`.
        kind: of a variant of an experiment; default: the experiment of the configs.

    Returns:
        A Result per config, in order. One that diverged has status ``failed`` and says at which step.
    """
    check_stackable(configs)
    configure_threads()
    kind = _kind(configs[0]) if kind is None else kind
    results = [Result.open(kind.experiment, config, root=root, recompute=recompute) for config in configs]
    if all(result.finished for result in results):
        return results
    path = results[0].path.parent / f"stack-{fingerprint([kind.experiment, *configs])}.ckpt"
    if recompute:
        remove_checkpoint(path)
    device, data = pick_device(configs[0].device), kind.load(configs[0])
    with ExitStack() as stack:
        for result in results:
            if not result.finished:
                stack.enter_context(result.recording())
        trials = _train(kind, configs, data, device, path, progress, checkpoint_epochs)
    started = next(result.started for result in results if not result.finished)
    about = environment(device) | {"trials_side_by_side": len(configs)}
    metrics = _metrics(kind, configs, trials, data, device)
    finished = []
    for config, trial in zip(configs, trials, strict=True):
        result = Result.open(kind.experiment, config, root=root)
        if not result.finished:
            result.started, result.environment = started, about
        finished.append(_finish(result, trial, metrics.get(trial.index)))
    remove_checkpoint(path)
    return finished


def _train(
    kind: Kind,
    configs: Sequence[Config],
    data: Dataset,
    device: torch.device,
    path: Path,
    progress: bool,
    checkpoint_epochs: int,
) -> list[Trial]:
    arrays = {name: array.to(device) for name, array in kind.arrays(data.train).items()}
    config = configs[0]
    train = [Batches(arrays, config.batch_size, shuffle=True, seed=own.seed, device=device) for own in configs]
    asked = kind.questions(configs, data, device)
    with warnings.catch_warnings():
        # Not lost: the permutation curve says ``agreed``.
        warnings.filterwarnings("ignore", message="local search ended undecided")
        return fit_stacked(
            [kind.build(own, data, len(train[0])) for own in configs],
            train,
            asked.loss,
            learning_rates=[own.learning_rate for own in configs],
            coefficients=[kind.coefficients(own, data) for own in configs],
            config=FitConfig(epochs=config.epochs, patience=config.patience, progress=progress),
            template=kind.template(config, data),
            evaluate=asked.evaluate,
            inputs=asked.inputs,
            learning=asked.learning,
            look_first=True,
            checkpoint=path,
            checkpoint_epochs=checkpoint_epochs,
            resume=True,
        )


def _metrics(
    kind: Kind, configs: Sequence[Config], trials: Sequence[Trial], data: Dataset, device: torch.device
) -> dict[int, dict[str, Any]]:
    """Index -> metrics of each trial that did not fail: the test rows, once more in a stack."""
    fine = [trial for trial in trials if not trial.failed]
    if not fine:
        return {}
    own = [configs[trial.index] for trial in fine]
    stack = TrialStack([trial.model for trial in fine], kind.template(own[0], data), device)
    tested = kind.questions(own, data, device).test(stack)
    return {
        trial.index: {**training_metrics(trial.model, trial.history), **found}
        for trial, found in zip(fine, tested, strict=True)
    }


def _finish(result: Result, trial: Trial, metrics: dict[str, Any] | None) -> Result:
    """Write down a trial; one that failed has no metrics. A Result that is finished stays as it is."""
    if result.finished:
        return result
    if metrics is None:
        with suppress(NonFiniteLoss), result.recording():
            raise NonFiniteLoss(trial.failed)
        return result
    result.curves = {"epochs": trial.history.rows, **trial.curves}
    result.wall_seconds = sum(row["seconds"] for row in trial.history.rows)
    return result.finish(metrics)
