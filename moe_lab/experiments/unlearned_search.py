"""What is left of "+" if nothing is searched? The control of a tuning study.

Local search does two things: as long as the permutation is soft, every expert learns from every row; and the
permutation is learned. Here the first happens without the second. The permutation's logits get no gradient, so P walks
through the same temperatures, from nearly uniform to the permutation it was drawn with, which is a random one. Point,
seed, data, batches and length of the soft phase are those of the same trial in `comet_tuning`, or in `vision_tuning`:
compare trial by trial.

Taught in notebook 06.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from moe_lab.batches import Batches
from moe_lab.experiments import comet_tuning, comet_vision, vision_tuning
from moe_lab.experiments.comet_recommender import (
    build_model,
    final_metrics,
    load_data,
    predict,
    task_metrics,
    train_recommender,
)
from moe_lab.experiments.comet_tuning import Trials, TuningConfig, diverged, run_trials
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.stacked_trials import Kind, recommender_kind, run_stack, vision_kind
from moe_lab.experiments.vision_config import VisionConfig
from moe_lab.experiments.vision_tuning import VisionTuningConfig
from moe_lab.models import MultiDigitClassifier, TwoTaskRecommender
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import NonFiniteLoss
from moe_lab.tuning import Interval

EXPERIMENT = "comet_unlearned_search"
TRIAL, VISION_TRIAL = "comet_unlearned_trial", "comet_unlearned_vision_trial"
_EVALUATION_ROWS = 4096


def run(
    config: TuningConfig | VisionTuningConfig,
    *,
    root: Path | str | None = None,
    progress: bool = True,
    n_workers: int = 1,
    stack_size: int = 1,
    checkpoint_epochs: int = 1,
) -> Result:
    """The trials of the study's "+" gates once more, without learning the permutation; arguments of `comet_tuning.run`.

    Returns:
        A Result with ``curves["trials"]``: gate, trial, drawn values, valid_loss, test_loss, seconds (NaN losses:
        diverged), for `comet_tuning.pools`. It resumes trial by trial.

    Raises:
        ValueError: no gate of the study has a "+".
    """
    if not any(gate.endswith("+") for gate in config.gates):
        raise ValueError(f"a control needs a gate with local search, got {', '.join(config.gates)}")
    how = Trials(_one_trial, _one_stack, root, False, progress, n_workers, stack_size, checkpoint_epochs)
    return run_cached(EXPERIMENT, config, partial(_run_trials, config, how), root=root)


def compare(study: Result, control: Result) -> pd.DataFrame:
    """What "+" changes, and what of it is left without learning; test losses, means over all trials.

    Args:
        study: of `comet_tuning`.
        control: the same points without learning.

    Returns:
        A row per "+" gate. ``without``, ``learned``, ``unlearned``: mean loss of the gate, of gate+, of gate+ with
        nothing learned (the expected loss after one trial). ``plus``: learned minus without, two independent samples.
        ``learning``: learned minus unlearned, trial by trial. Both with a standard error. ``left``: share of what "+"
        gains that is left without learning (of no meaning where "+" gains nothing; over pairs), ``left_low`` and
        ``left_high``: its 95 % interval, trials resampled. ``pairs``: trials that finished in both.

    Raises:
        ValueError: the control belongs to another study.
    """
    losses = _losses(study, control)
    rows = {name: _effect(*of_gate) for name in control.config["gates"] if (of_gate := _of(losses, name)) is not None}
    return pd.DataFrame(rows).T.rename_axis("gate")


def by_soft_epochs(study: Result, control: Result, gate: str) -> pd.DataFrame:
    """`compare` for one "+" gate, its trials grouped by the epochs for which the permutation was soft.

    Args:
        study: of `comet_tuning`.
        control: the same points without learning.
        gate: of local search ("hash+").

    Returns:
        A row per number of soft epochs, columns of `compare`. ``without`` is the same in all: trials of the gate
        without "+" have no soft phase.

    Raises:
        ValueError: the control belongs to another study, or has no such gate.
    """
    of_gate = _of(_losses(study, control), gate)
    if of_gate is None:
        raise ValueError(f"the study needs {gate} with and without local search")
    without, learned, unlearned = of_gate
    drawn = {row["trial"]: row["drawn"] for row in control.curves["trials"] if row["gate"] == gate}
    scale = study.config.get("search_scale", 1)  # whole numbers stay whole
    epochs = pd.Series({trial: round(values["permutation_epochs"] * scale, 9) for trial, values in drawn.items()})
    rows = {
        soft: _effect(without, *(losses[losses.index.isin(trials)] for losses in (learned, unlearned)))
        for soft, trials in epochs.groupby(epochs).groups.items()
    }
    return pd.DataFrame(rows).T.rename_axis("soft epochs")


def _losses(study: Result, control: Result) -> pd.DataFrame:
    """Test losses; a row per trial, columns (learned or unlearned, gate)."""
    if study.config != control.config:
        raise ValueError("study and control have different configs: their trials are not the same points")
    losses = pd.concat(
        [pd.DataFrame(study.curves["trials"]).assign(kind="learned"), pd.DataFrame(control.curves["trials"])]
    ).fillna({"kind": "unlearned"})
    return losses.pivot_table("test_loss", "trial", ["kind", "gate"], dropna=False)


def _of(losses: pd.DataFrame, name: str) -> tuple[pd.Series, pd.Series, pd.Series] | None:
    """Losses without "+", learned and unlearned, of trials that finished; None if one of them was not asked for."""
    base = name.removesuffix("+")
    columns = (("learned", base), ("learned", name), ("unlearned", name))
    if base == name or not all(column in losses for column in columns):
        return None
    without, learned, unlearned = (losses[column].dropna() for column in columns)
    return without, learned, unlearned


def _effect(without: pd.Series, learned: pd.Series, unlearned: pd.Series) -> dict[str, float]:
    """A row of `compare`."""
    paired = (learned - unlearned).dropna()
    left = _left(without.to_numpy(), learned[paired.index].to_numpy(), unlearned[paired.index].to_numpy())
    return {
        "without": without.mean(),
        "learned": learned.mean(),
        "unlearned": unlearned.mean(),
        "plus": learned.mean() - without.mean(),
        "plus_error": float(np.hypot(without.sem(), learned.sem())),
        "learning": paired.mean(),
        "learning_error": paired.sem(),
        "left": left.value,
        "left_low": left.low,
        "left_high": left.high,
        "pairs": len(paired),
    }


def _left(
    without: np.ndarray, learned: np.ndarray, unlearned: np.ndarray, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Share of the gain that is left; resampled are the gate's trials and, independently, the pairs of gate+."""
    if not len(without) or not len(learned):
        return Interval(*(float("nan"),) * 3)
    rng = np.random.default_rng(seed)
    n, pairs = len(without), len(learned)
    alone = np.append(without[rng.integers(n, size=(n_resamples, n))].mean(1), without.mean())  # last: as measured
    drawn = np.vstack([rng.integers(pairs, size=(n_resamples, pairs)), np.arange(pairs)])
    with np.errstate(divide="ignore", invalid="ignore"):  # "+" changes nothing
        shares = (alone - unlearned[drawn].mean(1)) / (alone - learned[drawn].mean(1))
    return Interval(float(shares[-1]), *(float(share) for share in np.nanquantile(shares[:-1], (0.025, 0.975))))


def readable(comparison: pd.DataFrame) -> pd.DataFrame:
    """`compare` as text."""
    text = pd.DataFrame(index=comparison.index)
    for name, column in (("without +", "without"), ("+", "learned"), ("+, nothing learned", "unlearned")):
        text[name] = comparison[column].map("{:.4f}".format)
    for name, column in (("+ minus without", "plus"), ("learned minus not learned", "learning")):
        value, error = comparison[column], comparison[f"{column}_error"]
        text[name] = value.map("{:+.4f}".format) + " ± " + error.map("{:.4f}".format)
    text["pairs"] = comparison["pairs"].astype(int)
    return text


def sentences(comparison: pd.DataFrame) -> list[str]:
    """What `compare` says, a sentence per "+" gate; two means are told apart if over 2 standard errors lie between."""
    said = []
    for gate, row in comparison.iterrows():
        by = f"by {abs(row['learning']):.4f} ± {row['learning_error']:.4f} ({row['pairs']:.0f} pairs)"
        if row["learning"] < -2 * row["learning_error"]:
            sentence = f"{gate}: learned permutations are better than random ones {by}"
        elif row["learning"] > 2 * row["learning_error"]:
            sentence = f"{gate}: learned permutations are worse than random ones {by}"
        else:
            value = f"{row['learning']:+.4f} ± {row['learning_error']:.4f}"
            sentence = (
                f"{gate}: learned and random permutations cannot be told apart ({value}, {row['pairs']:.0f} pairs)"
            )
        if row["plus"] < -2 * row["plus_error"]:
            left, low, high = (100 * row[name] for name in ("left", "left_low", "left_high"))
            sentence += f'; {left:.0f} % [{low:.0f}, {high:.0f}] of what "+" gains is left if nothing is learned'
        elif row["plus"] > 2 * row["plus_error"]:
            sentence += f'; "+" is behind the gate without it by {row["plus"]:.4f} ± {row["plus_error"]:.4f}'
        else:
            sentence += '; "+" gains nothing that can be told from chance'
        said.append(f"{sentence}.")
    return said


def run_trial(config: RecommenderConfig | VisionConfig, *, root: Path | str | None = None) -> Result:
    """One training; metrics as in `comet_recommender.run` or `comet_vision.run`. The gate must have a "+"."""
    if isinstance(config, VisionConfig):
        train = partial(comet_vision.train_and_test, config, False, prepare=stop_learning)
        return run_cached(VISION_TRIAL, config, train, root=root)
    return run_cached(TRIAL, config, partial(_train_and_test, config), root=root)


def stop_learning(model: TwoTaskRecommender | MultiDigitClassifier) -> None:
    """Let the permutation (all gates share one) cool and harden as planned, but keep its logits where they are."""
    model.moe.gates[0].permutation.logits.register_hook(torch.zeros_like)


def _train_and_test(config: RecommenderConfig, result: Result) -> dict[str, Any]:
    device = pick_device(config.device)
    data = load_data(config)
    train = Batches(data.train, config.batch_size, shuffle=True, seed=config.seed, device=device, keep_on_device=True)
    valid = Batches({name: data.valid[name] for name in ("user", "item")}, _EVALUATION_ROWS, device=device)
    model = build_model(config, data.info["n_users"], data.info["n_items"], len(train)).to(device)
    stop_learning(model)

    def evaluate(model: TwoTaskRecommender) -> dict[str, float]:
        logit, rating, _ = predict(model, valid.epoch(0), config.k)
        return {f"valid_{name}": value for name, value in task_metrics(config, logit, rating, data.valid).items()}

    history = train_recommender(config, model, train, evaluate, result, progress=False)
    return {"valid_loss": history.best_value, **final_metrics(config, model, data, device)}


def _outcome(result: Result) -> dict[str, Any]:
    known = ("valid_loss", "test_loss", "test_auc", "test_mse", "test_accuracy")
    kept = {name: result.metrics[name] for name in known if name in result.metrics}
    return {**kept, "seconds": round(result.wall_seconds, 2)}


def _one_trial(
    job: tuple[RecommenderConfig | VisionConfig, Path | str | None, bool, Mapping[str, Any]],
) -> dict[str, Any]:
    config, root, _, _ = job
    try:
        return _outcome(run_trial(config, root=root))
    except NonFiniteLoss:
        return diverged()


def _kind(config: RecommenderConfig | VisionConfig) -> Kind:
    if isinstance(config, VisionConfig):
        kind, experiment = vision_kind(), VISION_TRIAL
    else:
        kind, experiment = recommender_kind(), TRIAL
    return dataclasses.replace(kind, experiment=experiment, questions=partial(kind.questions, learns=False))


def _one_stack(job: tuple[list[Any], Path | str | None, bool, bool, int, Any]) -> list[dict[str, Any]]:
    configs, root, _, progress, checkpoint_epochs, _ = job
    how = {"progress": progress, "checkpoint_epochs": checkpoint_epochs, "kind": _kind(configs[0])}
    results = run_stack(configs, root=root, **how)
    return [_outcome(result) if result.finished else diverged() for result in results]


def _run_trials(config: TuningConfig | VisionTuningConfig, how: Trials, result: Result) -> dict[str, Any]:
    study = vision_tuning if isinstance(config, VisionTuningConfig) else comet_tuning
    points = study.plan(config, root=how.root).curves["plan"]
    metrics = run_trials(config, how, result, [row for row in points if row["gate"].endswith("+")])
    return {"trials": metrics["trials"]}
