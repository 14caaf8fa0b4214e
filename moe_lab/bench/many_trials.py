"""Trials per hour: the recommender's trials one at a time against many in one stack, on whatever device there is.

What is timed is what a study does, from the untrained model to the finished Result: training, evaluation after each
epoch, checkpoints, test rows. Loading the data is not: both ways share it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from moe_lab.experiments import comet_recommender
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.stacked_trials import run_stack
from moe_lab.results import Result
from moe_lab.runtime import device_name, pick_device
from moe_lab.search_spaces import search_space
from moe_lab.train import NonFiniteLoss
from moe_lab.tuning import draw_trials

# About 155,000 training rows and as many users and items, without a download.
_AS_LARGE_AS_MOVIELENS_100K = {"n_users": 943, "n_items": 1682, "items_per_user": 106}


@dataclass(frozen=True)
class ManyTrialsBench:
    """What to time.

    Attributes:
        recommender: the `RecommenderConfig` profile that gives the sizes of the model.
        gates: a row of the table for each.
        side_by_side: K, trials of a stack.
        alone: trials that are run one at a time; their mean counts.
        changes: fields of `RecommenderConfig` for all trials: device, epochs, data. Default: planted rows, as many as
            MovieLens-100k has.

    Raises:
        ValueError: no trial; an unknown gate or profile.
    """

    recommender: str = "standard"
    gates: Sequence[str] = ("hash", "topk", "topk+", "comet", "comet+")
    side_by_side: int = 200
    alone: int = 2
    changes: Mapping[str, Any] = field(
        default_factory=lambda: {
            "dataset": "planted-recommender",
            "data_options": dict(_AS_LARGE_AS_MOVIELENS_100K),
            "device": "auto",
            "epochs": 8,
        }
    )

    def __post_init__(self) -> None:
        if min(self.side_by_side, self.alone) < 1:
            raise ValueError(
                f"need at least one trial each way, got side_by_side={self.side_by_side} and alone={self.alone}"
            )
        self.study  # noqa: B018 - checks gates, profile and changes

    @property
    def study(self) -> TuningConfig:
        """The study whose first trials are run."""
        return TuningConfig(self.recommender, self.gates, max(self.side_by_side, self.alone), changes=self.changes)

    def trials(self, gate: str) -> list[RecommenderConfig]:
        """The trials of a gate, as random search draws them."""
        study = self.study
        dataset = RecommenderConfig.profile(self.recommender, **self.changes).dataset
        try:
            drawn = draw_trials(search_space(dataset, gate), study.n_trials, seed=study.seed)
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            raise ModuleNotFoundError("trials are drawn by Optuna, which is not here: pip install optuna") from error
        return [study.trial(gate, index, values) for index, values in enumerate(drawn)]


def _seconds(work: Callable[[str], object]) -> float:
    """Of ``work(folder)`` in a folder that is thrown away. Results are on the host, so the device is done by then."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        work(folder)
        return time.perf_counter() - began


def _one_by_one(trials: Sequence[RecommenderConfig], folder: str) -> None:
    for trial in trials:
        with suppress(NonFiniteLoss):
            comet_recommender.run(trial, root=folder, progress=False)


def _time(gate: str, stack: list[RecommenderConfig], alone: list[RecommenderConfig]) -> dict[str, Any]:
    device = pick_device(stack[0].device)
    on_gpu = device.type == "cuda"
    comet_recommender.load_data(stack[0])
    short = [dataclasses.replace(stack[0], epochs=1)]  # the first run on a device also loads its libraries
    _seconds(partial(_one_by_one, short))
    _seconds(lambda folder: run_stack(short, root=folder, progress=False))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    results: list[Result] = []
    stack_s = _seconds(lambda folder: results.extend(run_stack(stack, root=folder, progress=False)))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")
    alone_s = _seconds(partial(_one_by_one, alone)) / len(alone)
    return {
        "gate": gate,
        "device": device_name(device),
        "trials": len(stack),
        "epochs": stack[0].epochs,
        "stack_s": stack_s,
        "alone_s": alone_s,
        "per_hour_stacked": 3600 * len(stack) / stack_s,
        "per_hour_alone": 3600 / alone_s,
        "times": len(stack) * alone_s / stack_s,
        "failed": sum(not result.finished for result in results),
        "peak_gib": peak,
    }


def trials_table(config: ManyTrialsBench) -> list[dict[str, Any]]:
    """Time both ways.

    Returns:
        A row per gate: gate, device, trials (K), epochs (of a trial, at most), stack_s, alone_s (of one trial),
        per_hour_stacked, per_hour_alone, times (stacked / alone), failed (trials of the stack that diverged: they end
        early), and peak_gib, the memory of the stack (nan on a CPU).
    """
    rows = []
    for gate in config.gates:
        trials = config.trials(gate)
        rows.append(_time(gate, trials[: config.side_by_side], trials[: config.alone]))
    return rows
