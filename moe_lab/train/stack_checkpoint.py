"""What a checkpoint of a stack holds: everything that the next step depends on.

What is random depends on (seed, epoch, step) only, so there is no generator to save. The file itself, its predecessor
and its checksums are those of `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_lab.results.plain import to_plain
from moe_lab.train.config import History
from moe_lab.train.stack import Trial

if TYPE_CHECKING:
    from moe_lab.train.stack_trainer import StackTrainer


def stack_settings(trainer: StackTrainer) -> dict[str, Any]:
    """What a run that resumes another one must have in common with it; see `settings`."""
    config = {f"config.{name}": value for name, value in asdict(trainer.config).items()}
    del config["config.progress"], config["config.checkpoint_every"]  # they change nothing in the outcome
    shapes = {f"model.{n}": tuple(v.shape) for n, v in trainer.all_trials[0].model.state_dict().items()}
    return to_plain(
        {
            **config,
            **shapes,
            "train": trainer.train[0].describe(),
            "seeds": [batches.seed for batches in trainer.train],
            "learning_rates": trainer.learning_rates,
            "coefficients": trainer.coefficients,
            "monitor": trainer.monitor if trainer.evaluate else None,
            "eps": trainer.eps,
        },
        "settings",
    )


def stack_content(trainer: StackTrainer) -> dict[str, Any]:
    """The state between two steps."""
    return {
        "settings": stack_settings(trainer),
        "living": [trial.index for trial in trainer.stack.trials],
        "parameters": {name: value.detach() for name, value in trainer.stack.parameters.items()},
        "moments": [trainer.adam.first, trainer.adam.second],
        "best": trainer.best,
        "trials": [_trial_content(trial) for trial in trainer.all_trials],
        "position": [trainer.steps, trainer.epoch, trainer.step_in_epoch, trainer.seconds],
        "meter": trainer.meter.state(),
    }


def _trial_content(trial: Trial) -> dict[str, Any]:
    ended = dict(trial.model.named_parameters()) if trial.ended else {}  # the others' are rows of the stack
    return {
        "history": asdict(trial.history),
        "curves": trial.curves,
        "failed": trial.failed,
        "buffers": trial.buffers(),
        "best_buffers": trial.best_buffers,
        "parameters": {name: value.detach() for name, value in ended.items()},
    }


def restore_stack(trainer: StackTrainer, content: Mapping[str, Any]) -> None:
    """Inverse of `stack_content`, for a trainer that has not begun."""
    stack = trainer.stack
    stack.keep(content["living"])
    for trial, saved in zip(trainer.all_trials, content["trials"], strict=True):
        trial.history, trial.curves = History(**saved["history"]), saved["curves"]
        trial.failed, trial.best_buffers = saved["failed"], saved["best_buffers"]
        if trial.ended:
            trial.load(saved["parameters"], saved["buffers"])
        else:
            trial.load_buffers(saved["buffers"])
    for name, value in content["parameters"].items():
        stack.parameters[name].data.copy_(value)
    moments = [{name: value.to(stack.device) for name, value in part.items()} for part in content["moments"]]
    trainer.adam.first, trainer.adam.second = moments
    best = content["best"]
    trainer.best = None if best is None else {name: value.to(stack.device) for name, value in best.items()}
    trainer.steps, trainer.epoch, trainer.step_in_epoch, trainer.seconds = content["position"]
    trainer.meter.restore(content["meter"])
