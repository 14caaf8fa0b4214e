"""Random search per gate on images: `comet_tuning` for the vision experiment (COMET, KDD 2023, section 5).

The plan, the rows of a study, how trials run (one by one, on several cores, or in stacks) and what is made of them
(`comet_tuning.pools`, `moe_lab.tuning`) are those of `comet_tuning`. The search space is the paper's.

Where we differ: fewer epochs than the paper's 200, and the local search takes its share of them: as many epochs as
were drawn from 1 .. 10, scaled by ``search_scale``.

Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_lab.experiments import comet_vision
from moe_lab.experiments.comet_tuning import Trials, diverged, planned, run_trials
from moe_lab.experiments.settings import profile_settings
from moe_lab.experiments.stacked_trials import run_stack
from moe_lab.experiments.vision_config import VisionConfig
from moe_lab.gates.build import check_gate_name
from moe_lab.results import Result, run_cached
from moe_lab.train import NonFiniteLoss

EXPERIMENT = "comet_vision_tuning"
GATES = ("softmax", "hash", "hash+", "topk", "topk+", "dselect_k", "comet", "comet+")
_TINY = {"digit_size": 8, "n_train": 300, "n_valid": 100, "n_test": 100}
_KEPT = ("valid_loss", "test_loss", "test_accuracy", "experts_per_example", "used_experts", "best_epoch")
_PROFILES: dict[str, dict[str, Any]] = {
    # Embedded 10 x 10 images, seconds per trial on one core: for tests.
    "quick": {},
    # The paper's images and architecture; a minute per trial and less on a GPU.
    "standard": {"vision": "standard", "gates": GATES, "n_trials": 8, "changes": {"epochs": 5, "patience": None}},
    "paper": {"vision": "paper", "gates": GATES, "n_trials": 500, "changes": {}, "search_scale": 1.0},
}


@dataclass(frozen=True)
class VisionTuningConfig:
    """One study. The defaults are those of profile "quick".

    Attributes:
        vision: the `VisionConfig` profile that says data set and sizes.
        gates: which gates, each with its own search space and as many trials as the others.
        n_trials: trials per gate; the paper has 500.
        seed: of the draws; trial i trains with seed 1000 x seed + i, the same i for all gates.
        changes: fields of `VisionConfig` that hold for all trials.
        search_scale: epochs of the local search per epoch drawn; 0.2: a fifth, as runs are shorter than the paper's.

    Raises:
        ValueError: unknown gate or profile, no trial, a scale that is not positive.
    """

    vision: str = "quick"
    gates: Sequence[str] = ("hash", "hash+", "comet")
    n_trials: int = 4
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 2, "data_options": _TINY})
    search_scale: float = 0.2

    def __post_init__(self) -> None:
        for gate in self.gates:
            check_gate_name(gate)
        if self.n_trials < 1:
            raise ValueError(f"n_trials must be at least 1, got {self.n_trials}")
        if not self.search_scale > 0:
            raise ValueError(f"search_scale must be positive, got {self.search_scale}")
        self.fixed()

    @classmethod
    def profile(cls, name: str, **changes: Any) -> VisionTuningConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))

    def fixed(self, **changes: Any) -> VisionConfig:
        """What all trials have in common, and changes."""
        return VisionConfig.profile(self.vision, **{"watched_images": 0, **self.changes, **changes})

    @property
    def dataset(self) -> str:
        """Whose search space it is; embedded images are searched like MultiMNIST."""
        name = self.fixed().dataset
        return "multimnist" if name == "multidigits" else name

    def trial(self, gate: str, index: int, drawn: Mapping[str, Any]) -> VisionConfig:
        """The config of one trial."""
        drawn = dict(drawn)
        if "permutation_epochs" in drawn:
            drawn["permutation_epochs"] *= self.search_scale
        return self.fixed(gate=gate, seed=1000 * self.seed + index, **drawn)


def plan(config: VisionTuningConfig, *, root: Path | str | None = None) -> Result:
    """Open the study and write down which points will be tried; nothing is trained. Needs Optuna."""
    return planned(Result.open(EXPERIMENT, config, root=root), config)


def run(
    config: VisionTuningConfig,
    *,
    root: Path | str | None = None,
    recompute: bool = False,
    progress: bool = True,
    n_workers: int = 1,
    stack_size: int = 1,
    checkpoint_epochs: int = 1,
) -> Result:
    """Run the study, or what is left of it. Arguments and rows as in `comet_tuning.run`.

    Returns:
        A Result with ``curves["trials"]``: gate, trial, drawn values, valid_loss, test_loss, test_accuracy,
        experts_per_example, used_experts, best_epoch, seconds; a trial that diverged has NaN losses.
    """
    how = Trials(_one_trial, _one_stack, root, recompute, progress, n_workers, stack_size, checkpoint_epochs)
    return run_cached(EXPERIMENT, config, partial(run_trials, config, how), root=root, recompute=recompute)


def _outcome(result: Result) -> dict[str, Any]:
    if not result.finished:
        return diverged()
    return {**{name: result.metrics[name] for name in _KEPT}, "seconds": round(result.wall_seconds, 2)}


def _one_trial(job: tuple[VisionConfig, Path | str | None, bool, dict[str, Any]]) -> dict[str, Any]:
    config, root, recompute, _ = job
    try:
        return _outcome(comet_vision.run(config, root=root, recompute=recompute, progress=False))
    except NonFiniteLoss:
        return diverged()


def _one_stack(
    job: tuple[list[VisionConfig], Path | str | None, bool, bool, int, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    configs, root, recompute, progress, checkpoint_epochs, _ = job
    results = run_stack(configs, root=root, recompute=recompute, progress=progress, checkpoint_epochs=checkpoint_epochs)
    return [_outcome(result) for result in results]
