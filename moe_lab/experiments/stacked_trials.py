"""Many trials of the recommender at once: one stack of parameters, one pass of the GPU, a Result for each trial.

Trials that differ in seed, learning rate, gamma, loss weights and length of the search train side by side; whatever
changes shapes, data or the number of epochs makes another stack. All gates of `GATE_NAMES` stack, with and without "+".

A trial's Result is the one that `comet_recommender.run` would leave (same experiment, config, curves and metrics) and
is found again by either. The numbers are the same up to rounding where there is no dropout; with dropout the masks
come from another source (`counted_dropout`), as they do when a CPU run is repeated on a GPU. ``wall_seconds`` and the
epochs' ``seconds`` are the trial's share: time of the stack / living trials.

It is for GPUs, which a single small model leaves idle. A CPU core is busy with one trial, and the stack runs experts
that a sparse gate skips: `bench.many_trials` compares.

A stack trains whole or not at all: if one of its trials is missing (or diverged), all are trained, since a row more
costs little, and finished Results are kept as they are. A study does not ask again for a trial that diverged.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from moe_lab import datasets
from moe_lab.batches import Batches
from moe_lab.experiments.comet_recommender import COLUMNS, EXPERIMENT, build_model, load_data, run_metrics
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.stacked_recommender import StackedRecommender, make_template
from moe_lab.results import Result
from moe_lab.results.plain import fingerprint
from moe_lab.runtime import configure_threads, environment, pick_device
from moe_lab.train import FitConfig, NonFiniteLoss
from moe_lab.train.checkpoint import remove_checkpoint
from moe_lab.train.stack import Trial
from moe_lab.train.stacked import fit_stacked

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


def check_stackable(configs: Sequence[RecommenderConfig]) -> None:
    """Refuse trials that cannot train side by side.

    Raises:
        ValueError: none or the same one twice; a gate that does not stack; a field outside `OWN_FIELDS` that differs.
    """
    if not configs:
        raise ValueError("a stack needs at least one trial")
    gate = configs[0].gate
    if gate.removesuffix("+") not in GATES:
        raise ValueError(f"trials with gate {gate!r} train one by one. These stack, also with '+': {', '.join(GATES)}")
    for field in dataclasses.fields(RecommenderConfig):
        values = [getattr(config, field.name) for config in configs]
        if field.name not in OWN_FIELDS and any(value != values[0] for value in values):
            raise ValueError(
                f"trials of a stack must agree in {field.name}, got {values[0]!r} and others: make a stack of each. "
                f"They may differ in {', '.join(OWN_FIELDS)}"
            )
    if len({fingerprint(config) for config in configs}) < len(configs):
        raise ValueError("two trials of the stack have the same config: give them different seeds")


def run_stack(
    configs: Sequence[RecommenderConfig],
    *,
    root: Path | str | None = None,
    recompute: bool = False,
    progress: bool = True,
    checkpoint_epochs: int = 1,
) -> list[Result]:
    """Train and test these trials, or what is left of them: goes on from the stack's checkpoint.

    Args:
        configs: see `check_stackable`. How many fit is a matter of memory: weights, gradients, two moments and best
            weights of each, and its activations, K x batch x E x hidden numbers a few times over.
        root, recompute, progress: as in `comet_recommender.run`.
        checkpoint_epochs: see `fit_stacked`.

    Returns:
        A Result per config, in order. One that diverged has status ``failed`` and says at which step.
    """
    check_stackable(configs)
    configure_threads()
    results = [Result.open(EXPERIMENT, config, root=root, recompute=recompute) for config in configs]
    if all(result.finished for result in results):
        return results
    path = results[0].path.parent / f"stack-{fingerprint(list(configs))}.ckpt"
    if recompute:
        remove_checkpoint(path)
    device, data = pick_device(configs[0].device), load_data(configs[0])
    with ExitStack() as stack:
        for result in results:
            if not result.finished:
                stack.enter_context(result.recording())
        trials = _train(configs, data, device, path, progress, checkpoint_epochs)
    started = next(result.started for result in results if not result.finished)
    finished = [
        _finish(Result.open(EXPERIMENT, config, root=root), config, trial, data, device, started, len(configs))
        for config, trial in zip(configs, trials, strict=True)
    ]
    remove_checkpoint(path)
    return finished


def _train(
    configs: Sequence[RecommenderConfig],
    data: datasets.Dataset,
    device: torch.device,
    path: Path,
    progress: bool,
    checkpoint_epochs: int,
) -> list[Trial]:
    arrays = {name: data.train[name].to(device) for name in COLUMNS}
    config = configs[0]
    train = [Batches(arrays, config.batch_size, shuffle=True, seed=own.seed, device=device) for own in configs]
    sizes = data.info["n_users"], data.info["n_items"]
    recommender = StackedRecommender(configs, data, device)
    with warnings.catch_warnings():
        # Not lost: the permutation curve says ``agreed``.
        warnings.filterwarnings("ignore", message="local search ended undecided")
        return fit_stacked(
            [build_model(own, *sizes, len(train[0])) for own in configs],
            train,
            recommender.loss,
            learning_rates=[own.learning_rate for own in configs],
            coefficients=[own.coefficients() for own in configs],
            config=FitConfig(epochs=config.epochs, patience=config.patience, progress=progress),
            template=make_template(config, *sizes),
            evaluate=recommender.evaluate,
            inputs=recommender.inputs,
            learning=recommender.learning,
            look_first=True,
            checkpoint=path,
            checkpoint_epochs=checkpoint_epochs,
            resume=True,
        )


def _finish(
    result: Result,
    config: RecommenderConfig,
    trial: Trial,
    data: datasets.Dataset,
    device: torch.device,
    started: str,
    n_trials: int,
) -> Result:
    if result.finished:
        return result
    result.started, result.environment = started, environment(device) | {"trials_side_by_side": n_trials}
    if trial.failed:
        with suppress(NonFiniteLoss), result.recording():
            raise NonFiniteLoss(trial.failed)
        return result
    history = trial.history
    metrics = run_metrics(config, trial.model.to(device), history, data, device)
    trial.model.cpu()
    result.curves = {"epochs": history.rows, **trial.curves}
    result.wall_seconds = sum(row["seconds"] for row in history.rows)
    return result.finish(metrics)
