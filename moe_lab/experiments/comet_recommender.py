"""COMET in a recommender: two tasks, shared experts, a gate per task (COMET, KDD 2023, section 5).

    loss = w BCE(watched) + (1 - w) MSE(rating, rated rows only) + sum over gates of coefficient x regulariser

A row is a (user, item) pair; "watched" asks whether the user rated it, "rating" how. Both tasks share the embeddings
and the experts, each has its gate and its head. The validation loss (tasks only, no regulariser) chooses the epoch;
the test rows are looked at once, at the end.

Where we differ: losses of a data set are exact means (``test_loss_official`` is the authors' batch-weighted estimate),
the AUC is the exact rank statistic, the best epoch's weights are restored also when the epoch limit ends the run (the
authors' only when early stopping triggers), experts with weight 0 are not run, and hash tables are seeded.

Taught in notebook 03.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from moe_lab import datasets
from moe_lab.batches import Batches
from moe_lab.experiments.recommender_config import TASKS, RecommenderConfig
from moe_lab.gates.build import build_gates
from moe_lab.gates.local_search import Permutation
from moe_lab.gates.sinkhorn import permutation_matrix, row_error, soft_hard_distance
from moe_lab.metrics.ranking import auc, baselines, batchwise_masked_mse, masked_mse
from moe_lab.metrics.routing import RoutingTally
from moe_lab.models import TwoTaskRecommender, recommender_adam
from moe_lab.results import Result, run_cached
from moe_lab.routing import sum_losses
from moe_lab.runtime import pick_device
from moe_lab.train import FitConfig, History, evaluating, fit

EXPERIMENT = "comet_recommender"
_EVALUATION_ROWS = 4096  # per forward pass; results are exact means, so the number is only a matter of memory
COLUMNS = ("user", "item", "watched", "rating", "has_rating")


def run(
    config: RecommenderConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Train and test one gate, or read the finished Result back.

    Returns:
        A Result whose curves are ``epochs`` (made by `fit`: training terms, ``valid_loss``, ``valid_auc``,
        ``valid_mse``), ``routing`` (a row per task and epoch, 0 is before training: experts per row, load,
        importance, saturation) and, with "+", ``permutation`` (health of the search). Metrics: see `final_metrics`.

    Raises:
        DatasetNotFound: the real data set is not in the cache; the message says how to fetch it.
    """
    return run_cached(EXPERIMENT, config, partial(_train_and_test, config, progress), root=root, recompute=recompute)


@lru_cache(maxsize=2)
def _load(name: str, seed: int, options: tuple[tuple[str, Any], ...]) -> datasets.Dataset:
    return datasets.load(name, seed=seed, **dict(options))


def load_data(config: RecommenderConfig) -> datasets.Dataset:
    """The data of this run; runs of one process that differ in gate or seed alone share it."""
    return _load(config.dataset, config.data_seed, tuple(sorted(config.data_options.items())))


def build_model(config: RecommenderConfig, n_users: int, n_items: int, steps_per_epoch: int) -> TwoTaskRecommender:
    """The untrained model. Everything but the gates starts equal for all gates of one seed."""
    gates = build_gates(
        config.gate,
        len(TASKS),
        in_features=2 * config.embedding,
        n_experts=config.n_experts,
        k=config.k,
        gamma=config.gamma,
        n_keys=n_users,
        seed=config.seed,
        permutation_steps=max(1, round(config.permutation_epochs * steps_per_epoch)) if _searches(config) else None,
        schedule=config.permutation_schedule,
    )
    return TwoTaskRecommender(
        n_users,
        n_items,
        embedding=config.embedding,
        hidden=config.hidden,
        head=config.head,
        n_experts=config.n_experts,
        gates=gates,
        dropout=config.dropout,
        generator=torch.Generator().manual_seed(config.seed),
    )


def two_task_loss(model: TwoTaskRecommender, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The unweighted terms: watch, rating, and what the gates ask for (summed over the two)."""
    out = model(batch["user"], batch["item"])
    return {
        "watch": binary_cross_entropy_with_logits(out.watch_logit, batch["watched"]),
        "rating": masked_mse(out.rating, batch["rating"], batch["has_rating"]),
        **sum_losses(out.routings),
    }


@torch.no_grad()
def predict(
    model: TwoTaskRecommender, batches: Iterable[Mapping[str, Tensor]], k: int
) -> tuple[Tensor, Tensor, dict[str, dict[str, Any]]]:
    """Predictions on the CPU, (N,) logits and (N,) ratings, and per task the gate's `RoutingTally` summary."""
    tallies = [RoutingTally(k) for _ in TASKS]
    logits, ratings = [], []
    for batch in batches:
        out = model(batch["user"], batch["item"])
        logits.append(out.watch_logit.cpu())
        ratings.append(out.rating.cpu())
        for tally, routing in zip(tallies, out.routings, strict=True):
            tally.add(routing)
    summaries = {task: tally.summary() for task, tally in zip(TASKS, tallies, strict=True)}
    return torch.cat(logits), torch.cat(ratings), summaries


def task_metrics(
    config: RecommenderConfig, logit: Tensor, rating: Tensor, rows: Mapping[str, Tensor]
) -> dict[str, float]:
    """loss (task-weighted), bce, mse, auc: exact means over ``rows``."""
    bce = float(binary_cross_entropy_with_logits(logit.double(), rows["watched"].double()))
    mse = float(masked_mse(rating.double(), rows["rating"].double(), rows["has_rating"]))
    weights = config.task_weights
    total = weights["watch"] * bce + weights["rating"] * mse
    # A diverged model gets NaN here, and `fit` an error that says what to change.
    area = auc(logit, rows["watched"]) if torch.isfinite(logit).all() else float("nan")
    return {"loss": total, "bce": bce, "mse": mse, "auc": area}


def final_metrics(
    config: RecommenderConfig, model: TwoTaskRecommender, data: datasets.Dataset, device: torch.device
) -> dict[str, Any]:
    """What the test rows say about the restored model.

    Returns:
        test_loss, test_bce, test_mse, test_auc; test_loss_official (the authors' estimate); experts_per_example (mean
        over rows and tasks); within_k (share of rows with at most k experts, the worse task); used_experts (the worse
        task); ``routing`` per task as in `RoutingTally.summary`; ``baselines`` and the losses they give.
    """
    batches = Batches({"user": data.test["user"], "item": data.test["item"]}, _EVALUATION_ROWS, device=device)
    with evaluating(model):
        logit, rating, routing = predict(model, batches.epoch(0), config.k)
    scores = task_metrics(config, logit, rating, data.test)
    official_mse = batchwise_masked_mse(rating, data.test["rating"], data.test["has_rating"], config.official_batch)
    return gathered_metrics(config, scores, official_mse, routing, known_baselines(data))


def known_baselines(data: datasets.Dataset) -> dict[str, float]:
    """What needs no network on these test rows, see `metrics.ranking.baselines`."""
    return baselines(data.train, data.test, data.info["n_users"], data.info["n_items"])


def gathered_metrics(
    config: RecommenderConfig,
    task_scores: Mapping[str, float],
    official_mse: float,
    routing: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, float],
) -> dict[str, Any]:
    """`final_metrics` from what was measured.

    Args:
        config: of the run.
        task_scores: `task_metrics` of the test rows.
        official_mse: see `batchwise_masked_mse`.
        routing: per task, `RoutingTally.summary`.
        known: `known_baselines`.
    """
    scores = {f"test_{name}": value for name, value in task_scores.items()}
    weights = config.task_weights
    return {
        **scores,
        "test_loss_official": weights["watch"] * scores["test_bce"] + weights["rating"] * official_mse,
        "experts_per_example": sum(gate["experts_mean"] for gate in routing.values()) / len(routing),
        "within_k": min(gate["within_k"] for gate in routing.values()),
        "used_experts": min(gate["used"] for gate in routing.values()),
        "constant_loss": weights["watch"] * known["constant_bce"] + weights["rating"] * known["constant_mse"],
        **known,
        "routing": routing,
    }


def _searches(config: RecommenderConfig) -> bool:
    return config.gate.endswith("+")


def permutation_health(permutation: Permutation) -> dict[str, Any]:
    """Where the search stands: row error of the soft matrix, its distance to the permutation, and that permutation."""
    assignment = permutation.assignment()
    hard = bool(permutation.hardened)
    soft = permutation_matrix(assignment) if hard else permutation.soft_matrix()
    return {
        "hard": hard,
        "agreed": bool(permutation.agreed),
        "row_error": float(row_error(soft).max()),
        "soft_hard": float(soft_hard_distance(soft, permutation_matrix(assignment)).max()),
        "assignment": assignment[0].tolist(),
    }


def train_recommender(
    config: RecommenderConfig,
    model: TwoTaskRecommender,
    train: Batches,
    evaluate: Callable[[TwoTaskRecommender], dict[str, float]],
    result: Result,
    progress: bool,
) -> History:
    """`fit` with the settings of the config; goes on from the checkpoint."""
    with warnings.catch_warnings():
        # Not lost: the permutation curve says ``agreed``.
        warnings.filterwarnings("ignore", message="local search ended undecided")
        return fit(
            model,
            train,
            two_task_loss,
            optimizer=recommender_adam(model, config.learning_rate),
            coefficients=config.coefficients(),
            evaluate=evaluate,
            config=FitConfig(epochs=config.epochs, patience=config.patience, progress=progress),
            result=result,
            resume=True,
        )


def _train_and_test(config: RecommenderConfig, progress: bool, result: Result) -> dict[str, Any]:
    device = pick_device(config.device)
    data = load_data(config)
    train = Batches(
        {name: data.train[name] for name in COLUMNS},
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        device=device,
        keep_on_device=True,
    )
    valid = Batches({"user": data.valid["user"], "item": data.valid["item"]}, _EVALUATION_ROWS, device=device)
    model = build_model(config, data.info["n_users"], data.info["n_items"], len(train)).to(device)
    permutation = getattr(model.moe.gates[0], "permutation", None)

    def evaluate(model: TwoTaskRecommender) -> dict[str, float]:
        logit, rating, routing = predict(model, valid.epoch(0), config.k)
        epoch = len(result.curves.get("routing", [])) // len(TASKS)
        for task, summary in routing.items():
            result.log("routing", epoch=epoch, task=task, **rounded(summary))
        if permutation is not None:
            result.log("permutation", epoch=epoch, **permutation_health(permutation))
        return {f"valid_{name}": value for name, value in task_metrics(config, logit, rating, data.valid).items()}

    if "routing" not in result.curves:
        with evaluating(model):
            evaluate(model)  # epoch 0: how the gate routes before it has learned anything
    history = train_recommender(config, model, train, evaluate, result, progress)
    return run_metrics(config, model, history, data, device)


def run_metrics(
    config: RecommenderConfig, model: TwoTaskRecommender, history: History, data: datasets.Dataset, device: torch.device
) -> dict[str, Any]:
    """All metrics of a run: `training_metrics` and `final_metrics`."""
    return {**training_metrics(model, history), **final_metrics(config, model, data, device)}


def training_metrics(model: nn.Module, history: History) -> dict[str, Any]:
    """How training went; ``steps_per_second`` includes evaluation."""
    return {
        "best_epoch": history.best_epoch,
        "valid_loss": history.best_value,
        "epochs": len(history.rows),
        "steps_per_second": history.steps / sum(row["seconds"] for row in history.rows),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def rounded(value: Any, digits: int = 4) -> Any:
    """Floats inside lists and dicts rounded: curves of loads stay small files."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list) else value
