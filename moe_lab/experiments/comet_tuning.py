"""How much tuning does a gate need? Random search per gate, with and without local search (COMET, KDD 2023, section 5).

A study draws ``n_trials`` points of each gate's `search_space`, trains the recommender once per point, and keeps one
row per trial: validation loss, test loss, what was drawn. `moe_lab.tuning` turns the rows into top-5 % tables and
budget curves.

Trials run one by one, on several cores (``n_workers``), or many at once on one device (``stack_size``, see
`stacked_trials`). Points are drawn in advance, all of them: random search learns nothing from finished trials, so a
batch of any size proposes what single trials would.

Resumable twice over: the study's Result keeps the plan (which points) and the finished trials; a trial is itself a
Result and is found again even if the study's file is lost. With the plan written beforehand (`plan`) a machine without
Optuna can run the trials.

Where we differ: each trial has its own seed, and its own hash table (the authors' trials share one unseeded table).

Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_lab.experiments import comet_recommender
from moe_lab.experiments.parallel import in_parallel
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.settings import profile_settings
from moe_lab.experiments.stacked_trials import run_stack
from moe_lab.gates.build import check_gate_name
from moe_lab.results import Result, run_cached
from moe_lab.runtime import environment, pick_device
from moe_lab.search_spaces import search_space
from moe_lab.train import NonFiniteLoss
from moe_lab.tuning import Pool, draw_trials

EXPERIMENT = "comet_tuning"
_TINY = {"n_users": 200, "n_items": 100, "items_per_user": 25}
_PROFILES: dict[str, dict[str, Any]] = {
    "quick": {},
    "standard": {
        "recommender": "standard",
        "gates": ("softmax", "hash", "hash+", "topk", "topk+", "dselect_k", "comet", "comet+"),
        "n_trials": 40,
        "changes": {"epochs": 8},
    },
    "paper": {
        "recommender": "paper",
        "gates": ("softmax", "hash", "hash+", "topk", "topk+", "dselect_k", "comet", "comet+"),
        "n_trials": 500,
        "changes": {},
    },
}


@dataclass(frozen=True)
class TuningConfig:
    """One study. The defaults are those of profile "quick".

    Attributes:
        recommender: the `RecommenderConfig` profile that says data set and sizes.
        gates: which gates, each with its own search space and as many trials as the others.
        n_trials: trials per gate; 16 take half a minute and give a budget curve of sorts, the paper has 500.
        seed: of the draws; trial i trains with seed 1000 x seed + i, the same i for all gates.
        changes: fields of `RecommenderConfig` that hold for all trials (epochs, sizes, task weight).

    Raises:
        ValueError: unknown gate or profile, no trial.
    """

    recommender: str = "quick"
    gates: Sequence[str] = ("hash", "hash+", "topk", "topk+")
    n_trials: int = 16
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 5, "data_options": _TINY})

    def __post_init__(self) -> None:
        for gate in self.gates:
            check_gate_name(gate)
        if self.n_trials < 1:
            raise ValueError(f"n_trials must be at least 1, got {self.n_trials}")
        RecommenderConfig.profile(self.recommender, **self.changes)

    @classmethod
    def profile(cls, name: str, **changes: Any) -> TuningConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))

    def trial(self, gate: str, index: int, drawn: Mapping[str, Any]) -> RecommenderConfig:
        """The config of one trial."""
        fixed = {"gate": gate, "seed": 1000 * self.seed + index}
        return RecommenderConfig.profile(self.recommender, **{**self.changes, **fixed, **drawn})

    @property
    def dataset(self) -> str:
        """Its name; it chooses the search space."""
        return RecommenderConfig.profile(self.recommender, **self.changes).dataset


def plan(config: TuningConfig, *, root: Path | str | None = None) -> Result:
    """Open the study and write down which points will be tried; nothing is trained. Needs Optuna."""
    return planned(Result.open(EXPERIMENT, config, root=root), config)


def run(
    config: TuningConfig,
    *,
    root: Path | str | None = None,
    recompute: bool = False,
    progress: bool = True,
    n_workers: int = 1,
    stack_size: int = 1,
    checkpoint_epochs: int = 1,
) -> Result:
    """Run the study, or what is left of it.

    Args:
        config, root, recompute, progress: as in `comet_recommender.run`.
        n_workers: processes side by side.
        stack_size: trials of one gate that train as one stack; 1 trains each by itself. Trials 0 .. n - 1 make the
            first stack of a gate, n .. 2n - 1 the second, whichever of them are done.
        checkpoint_epochs: see `run_stack`.

    Returns:
        A Result with ``curves["trials"]``: gate, trial, drawn values, valid_loss, test_loss, test_auc, test_mse,
        experts_per_example, used_experts, seconds; a trial that diverged has NaN losses.
    """
    how = Trials(_one_trial, _one_stack, root, recompute, progress, n_workers, stack_size, checkpoint_epochs)
    compute = partial(run_trials, config, how)
    return run_cached(EXPERIMENT, config, compute, root=root, recompute=recompute)


def pools(result: Result) -> dict[str, Pool]:
    """The finished trials as one `Pool` per gate that has any, trials in order of their index."""
    losses: dict[str, list[tuple[float, float]]] = {gate: [] for gate in result.config["gates"]}
    for row in sorted(result.curves["trials"], key=lambda row: row["trial"]):
        losses[row["gate"]].append((row["valid_loss"], row["test_loss"]))
    return {gate: Pool.of(*zip(*pairs, strict=True)) for gate, pairs in losses.items() if pairs}


def planned(result: Result, config: TuningConfig) -> Result:
    """The study, with the points to try in ``curves["plan"]``; a longer study begins with those of a shorter one."""
    if "plan" in result.curves:
        return result
    for place, gate in enumerate(config.gates):
        drawn = draw_trials(search_space(config.dataset, gate), config.n_trials, seed=1000 * config.seed + place)
        for index, values in enumerate(drawn):
            result.log("plan", gate=gate, trial=index, drawn=values)
    result.save()
    return result


def is_shorter(earlier: Result, study: Result) -> bool:
    """The two studies differ in the number of trials only, and ``earlier`` has fewer."""
    ours, theirs = study.config, earlier.config
    return {**ours, "n_trials": None} == {**theirs, "n_trials": None} and theirs["n_trials"] < ours["n_trials"]


def take_over(study: Result, earlier: Result) -> int:
    """Give a planned study the trials of a shorter one that was recorded, so that only the others are left to run.

    The curve ``taken_over`` of the study says how many trials of ``earlier`` were run on which machine, by which code.

    Returns:
        How many trials the study did not have yet.

    Raises:
        ValueError: the two differ in more than the number of trials, or ``earlier`` is not the shorter one; or points
            differ, because another version of Optuna drew them.
    """
    if not is_shorter(earlier, study):
        raise ValueError(f"{earlier.path.name} is no shorter study of the same kind as {study.path.name}")
    drawn = {(row["gate"], row["trial"]): row["drawn"] for row in study.curves["plan"]}
    done = {(row["gate"], row["trial"]) for row in study.curves.get("trials", [])}
    missing = [row for row in earlier.curves["trials"] if (row["gate"], row["trial"]) not in done]
    if other := [row for row in missing if row["drawn"] != drawn[row["gate"], row["trial"]]]:
        raise ValueError(
            f"{len(other)} points of {earlier.path.name} are not those of {study.path.name}: another version of Optuna "
            "draws others. Run the study from its beginning, or with that version"
        )
    for row in missing:
        study.log("trials", **row)
    if missing:
        before = earlier.curves.get("taken_over", [])  # which it had from others itself
        own = len(earlier.curves["trials"]) - sum(row["trials"] for row in before)
        about = {name: earlier.environment.get(name) for name in ("device", "torch", "commit")}
        for row in (*before, {"trials": own, **about}):
            study.log("taken_over", **row)
        study.save()
    return len(missing)


def diverged() -> dict[str, Any]:
    return {"valid_loss": float("nan"), "test_loss": float("nan")}


def _outcome(result: Result) -> dict[str, Any]:
    kept = ("valid_loss", "test_loss", "test_auc", "test_mse", "experts_per_example", "used_experts", "best_epoch")
    return {**{name: result.metrics[name] for name in kept}, "seconds": round(result.wall_seconds, 2)}


def _one_trial(job: tuple[RecommenderConfig, Path | str | None, bool, dict[str, Any]]) -> dict[str, Any]:
    config, root, recompute, _ = job
    try:
        return _outcome(comet_recommender.run(config, root=root, recompute=recompute, progress=False))
    except NonFiniteLoss:
        return diverged()


def _one_stack(
    job: tuple[list[RecommenderConfig], Path | str | None, bool, bool, int, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    configs, root, recompute, progress, checkpoint_epochs, _ = job
    results = run_stack(configs, root=root, recompute=recompute, progress=progress, checkpoint_epochs=checkpoint_epochs)
    return [_outcome(result) if result.finished else diverged() for result in results]


def _stacks(plan: Sequence[Mapping[str, Any]], size: int) -> list[list[Mapping[str, Any]]]:
    """The plan in stacks of one gate; all gates advance together."""
    stacks: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in plan:
        stacks.setdefault((row["trial"] // size, row["gate"]), []).append(row)
    return [stacks[key] for key in sorted(stacks, key=lambda key: key[0])]


@dataclass(frozen=True)
class Trials:
    """How the trials of a study run.

    Attributes:
        one: job -> outcome of one trial; a job is (config, root, recompute, row of the plan).
        many: job -> outcomes of a stack; a job is (configs, root, recompute, progress, checkpoint_epochs, rows).
        root, recompute, progress, n_workers, stack_size, checkpoint_epochs: see `run`.

    Raises:
        ValueError: a stack of no trial.
    """

    one: Callable[[Any], dict[str, Any]]
    many: Callable[[Any], list[dict[str, Any]]]
    root: Path | str | None
    recompute: bool
    progress: bool
    n_workers: int
    stack_size: int
    checkpoint_epochs: int

    def __post_init__(self) -> None:
        if self.stack_size < 1:
            raise ValueError(f"stack_size must be at least 1, got {self.stack_size}")


def run_trials(
    config: TuningConfig, how: Trials, result: Result, plan: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Run what is missing of the plan (default: the study's own), a row of ``curves["trials"]`` each.

    Returns:
        The study's metrics.
    """
    plan = planned(result, config).curves["plan"] if plan is None else plan
    trials = result.curves.setdefault("trials", [])
    done = {(row["gate"], row["trial"]) for row in trials}

    def is_missing(row: Mapping[str, Any]) -> bool:
        return (row["gate"], row["trial"]) not in done

    def trial(row: Mapping[str, Any]) -> Any:
        return config.trial(row["gate"], row["trial"], row["drawn"])

    if how.stack_size == 1:
        todo = sorted(filter(is_missing, plan), key=lambda row: row["trial"])  # an unfinished study can be compared
        jobs = [(trial(row), how.root, how.recompute, row) for row in todo]
        for job, losses in in_parallel(how.one, jobs, how.n_workers, label="trials", progress=how.progress):
            result.log("trials", **job[-1], **losses)
            result.save()
    else:
        stacks = [rows for rows in _stacks(plan, how.stack_size) if any(map(is_missing, rows))]
        show = how.progress and how.n_workers == 1
        jobs = [
            ([trial(row) for row in rows], how.root, how.recompute, show, how.checkpoint_epochs, rows)
            for rows in stacks
        ]
        for job, outcomes in in_parallel(how.many, jobs, how.n_workers, label="stacks", progress=how.progress):
            for row, losses in zip(job[-1], outcomes, strict=True):
                if is_missing(row):
                    result.log("trials", **row, **losses)
            result.save()
    trials.sort(key=lambda row: (config.gates.index(row["gate"]), row["trial"]))
    result.environment = environment(pick_device(trial(plan[0]).device))
    if how.stack_size > 1:
        result.environment["trials_side_by_side"] = how.stack_size
    return {"trials": len(trials), "trial_seconds": sum(row.get("seconds", 0.0) for row in trials)}
