"""JEI-DNN on a frozen backbone, beside every baseline, on one whole test set (Regol et al., ICLR 2024, section 5).

1. Train a small vision transformer on the training images; freeze it; compute the normalised class token behind every
   block once.
2. Train inference modules and gates for all prices side by side (`exits.joint`).
3. Train modules without gates ("separate"): plain cross entropy in the same phases, so that with mode "released" the
   modules are the same and only the gates differ. On them: thresholds by the geometric schedule, one shared threshold,
   fixed exits, and two oracles that see the labels.
4. Every method is a set of points (cost, accuracy). Thresholds are set on part 0 of the validation images, the model is
   chosen on part 1, prediction sets are calibrated on part 2; the test images are looked at once.

Two artefacts of the published comparison stand beside the honest numbers: calibration error per batch of 64, and of
probabilities that went through the softmax twice.

Where we differ: `exits.cost` counts all tokens; modules without gates are scored on the same test images; the last gate
phase fits the gates to the final modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches, StepBatches
from moe_lab.datasets import Dataset
from moe_lab.exits import exit_costs
from moe_lab.exits.joint import JointExits
from moe_lab.exits.policies import (
    apply_thresholds,
    at_exit,
    cheapest_exits,
    confidence,
    earliest_right_exits,
    geometric_thresholds,
    shared_threshold_exits,
    static_exits,
)
from moe_lab.experiments.jei_config import JeiConfig
from moe_lab.experiments.settings import load_of_kind
from moe_lab.metrics.calibration import double_softmax, expected_calibration_error
from moe_lab.metrics.conformal import coverage_and_size, exit_quantiles, prediction_sets
from moe_lab.models.vit import VisionTransformer
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import FitConfig, LearningRate, evaluating, fit

EXPERIMENT = "jei_dnn"
METHODS = ("jei_dnn", "geometric", "shared", "static", "oracle_cheapest", "oracle_earliest")


def run(config: JeiConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True) -> Result:
    """Train, test, or read the finished Result back.

    Returns:
        A Result with the curves ``backbone`` and ``joint`` (training), and ``points``: one row per method and setting:
        cost (relative), accuracy, ece, ece_per_batch, ece_double_softmax, coverage, set_size, exits (share per exit).
        Metrics: see `_train_and_test`.
    """
    return run_cached(EXPERIMENT, config, partial(_train_and_test, config, progress), root=root, recompute=recompute)


def load_images(config: JeiConfig) -> Dataset:
    """The images. ValueError for a data set of another kind."""
    return load_of_kind(config, "images", "an experiment with early exits")


def build_backbone(config: JeiConfig, data: Dataset) -> VisionTransformer:
    """The untrained vision transformer. Draws from the global generator: seed it first."""
    return VisionTransformer(
        side=data.info["side"],
        channels=data.info["channels"],
        n_classes=data.info["n_classes"],
        patch=config.patch,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
    )


def normalised_costs(backbone: VisionTransformer, data: Dataset) -> tuple[Tensor, float]:
    """(L,) relative multiply-adds until each exit, and the whole network's in millions."""
    heads = [nn.Sequential(backbone.pool, backbone.head)] * len(backbone.blocks)  # of the same size at every exit
    device = next(backbone.parameters()).device
    x = data.test["image"][:1].to(device)
    costs = exit_costs(list(backbone.blocks), heads, x, data.info["n_classes"], stem=backbone.stem)
    return costs / costs[-1], float(costs[-1]) / 1e6


def _backbone_loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"label": cross_entropy(model(batch["image"]), batch["label"])}


def _valid_loss(valid: Batches, model: nn.Module) -> dict[str, float]:
    total, right, n = 0.0, 0, 0
    for batch in valid.epoch(0):
        logits = model(batch["image"])
        total += float(cross_entropy(logits, batch["label"], reduction="sum"))
        right += int((logits.argmax(-1) == batch["label"]).sum())
        n += len(logits)
    return {"valid_loss": total / n, "valid_accuracy": right / n}


def _train_backbone(config: JeiConfig, data: Dataset, result: Result, device: torch.device, progress: bool):
    columns = {name: {key: split[key] for key in ("image", "label")} for name, split in data.splits.items()}
    options = {"device": device, "keep_on_device": True}
    train = Batches(columns["train"], config.batch_size, shuffle=True, seed=config.seed, **options)
    valid = Batches({key: values[data.valid["part"] == 1] for key, values in columns["valid"].items()}, 512, **options)
    model = build_backbone(config, data).to(device)
    steps = config.backbone_epochs * len(train)
    optimizer = torch.optim.AdamW(model.parameters(), config.backbone_rate, weight_decay=config.backbone_decay)
    fit(
        model,
        train,
        _backbone_loss,
        optimizer=optimizer,
        coefficients={"label": 1.0},
        evaluate=partial(_valid_loss, valid),
        config=FitConfig(
            epochs=config.backbone_epochs,
            learning_rate=LearningRate(max(1, steps // 10), steps, floor=0.01),
            clip_norm=1.0,
            progress=progress,
        ),
        result=result,
        curve="backbone",
        resume=True,
    )
    model.requires_grad_(False)
    return model.eval()


def cached_features(model: VisionTransformer, split: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """features (N, L, D), last (N, K) logits of the frozen head, label (N,), part (N,)."""
    with evaluating(model):
        found = [model.features(images.to(device)) for images in split["image"].split(1024)]
        features = torch.cat(found)
        last = model.head(features[:, -1])
    return {"features": features, "last": last} | {key: split[key].to(device) for key in ("label", "part")}


def _fit_exits(
    config: JeiConfig,
    cached: dict[str, dict[str, Tensor]],
    costs: Tensor,
    mode: str,
    curve: str,
    result: Result,
    progress: bool,
) -> JointExits:
    _, n_exits, width = cached["train"]["features"].shape
    model = JointExits(
        n_exits,
        width,
        cached["train"]["last"].shape[1],
        config.prices if curve == "joint" else (0.0,),
        costs,
        phases=config.phases,
        mode=mode,
        balance=config.balance,
        model=config.model,
        generator=torch.Generator().manual_seed(config.seed),
    ).to(cached["train"]["features"].device)
    columns = {key: cached["train"][key] for key in ("features", "last", "label")}
    train = StepBatches(
        columns, config.batch_size, steps=100, shuffle=True, seed=config.seed, device=columns["label"].device
    )
    thresholds, choice = part(cached["valid"], 0), part(cached["valid"], 1)

    def evaluate(model: JointExits) -> dict[str, float]:
        model.weights_from(thresholds["features"], thresholds["last"], thresholds["label"])
        logits, exits = model.decide(choice["features"], choice["last"])
        losses = model.cross_entropies(logits, choice["label"])
        at = losses.gather(-1, exits.unsqueeze(-1)).squeeze(-1)
        paid = (
            (at + model.prices.unsqueeze(1) * model.costs[exits]).mean(1) if curve == "joint" else losses.mean((1, 2))
        )
        return {"valid_loss": float(paid.mean()), "valid_exit": float(exits.double().mean())}

    gate_parameters = list(model.gates.parameters())
    groups = [
        {"params": gate_parameters, "lr": config.gate_rate},
        {"params": [model.weight, model.bias], "lr": config.module_rate, "weight_decay": 5e-4},
    ]
    fit(
        model,
        train,
        lambda model, batch: model.terms(batch),
        optimizer=torch.optim.SGD(groups, momentum=0.9),
        coefficients={"gates": 1.0, "modules": 1.0},
        evaluate=evaluate,
        config=FitConfig(
            epochs=None,
            max_steps=config.steps,
            learning_rate=LearningRate(0, config.steps, floor=0.02),
            progress=progress,
        ),
        result=result,
        curve=curve,
        resume=True,
    )
    return model


def part(split: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Rows of one of the three validation parts."""
    rows = split["part"] == index
    return {key: values[rows] for key, values in split.items()}


def score(
    config: JeiConfig, costs: Tensor, test: tuple[Tensor, Tensor, Tensor], calibration: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Any]:
    """One point.

    Args:
        config: for alpha.
        costs: (L,).
        test, calibration: logits (N, L, K), labels (N,), exits (N,).
    """
    logits, labels, exits = test
    probabilities = at_exit(logits, exits).double().softmax(-1)
    top, predicted = probabilities.max(-1)
    right = predicted == labels
    c_logits, c_labels, c_exits = calibration
    quantiles = exit_quantiles(c_logits.double().softmax(-1), c_labels, c_exits, config.alpha)
    coverage, size = coverage_and_size(prediction_sets(probabilities, exits, quantiles), labels)
    twice = double_softmax(probabilities).max(-1).values
    return {
        "cost": float(costs[exits.cpu()].mean()),
        "accuracy": float(right.double().mean()),
        "ece": expected_calibration_error(top, right),
        "ece_per_batch": expected_calibration_error(top, right, per_batch=64),
        "ece_double_softmax": expected_calibration_error(twice, right),
        "coverage": coverage,
        "set_size": size,
        "exits": (torch.bincount(exits, minlength=len(costs)).double() / len(exits)).tolist(),
    }


def _baseline_exits(
    config: JeiConfig, costs: Tensor, by_part: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """(method, setting, exits per part); thresholds come from part "thresholds"."""
    sure = {name: confidence(logits) for name, (logits, _) in by_part.items()}
    known = sure["thresholds"].cpu()
    for level in range(len(costs)):
        yield "static", level, {name: static_exits(len(c), level).to(c.device) for name, c in sure.items()}
    for rho in config.rhos:
        thresholds = geometric_thresholds(known, rho)
        yield (
            "geometric",
            rho,
            {name: apply_thresholds(c, thresholds.to(c.device)) for name, c in sure.items()},
        )
    for value in torch.quantile(known.flatten(), torch.linspace(0.05, 0.95, 13)).tolist():
        yield "shared", value, {name: shared_threshold_exits(c.cpu(), value).to(c.device) for name, c in sure.items()}
    losses = {
        name: -logits.log_softmax(-1).gather(-1, labels[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(-1)
        for name, (logits, labels) in by_part.items()
    }
    for price in config.prices:
        near = {name: cheapest_exits(value, costs.to(value), price) for name, value in losses.items()}
        yield "oracle_cheapest", price, near
    yield "oracle_earliest", 0.0, {name: earliest_right_exits(*pair) for name, pair in by_part.items()}


def _train_and_test(config: JeiConfig, progress: bool, result: Result) -> dict[str, Any]:
    """Metrics: backbone_accuracy, exit_accuracy (separately trained modules, per exit), costs (per exit),
    million_multiply_adds, gain_over_geometric and gain_over_shared (mean accuracy difference at equal cost), coverage
    and set_size (means over prices), seconds."""
    device = pick_device(config.device)
    data = load_images(config)
    backbone = _train_backbone(config, data, result, device, progress)
    cached = {name: cached_features(backbone, split, device) for name, split in data.splits.items()}
    costs, millions = normalised_costs(backbone, data)
    joint = _fit_exits(config, cached, costs.to(device), config.mode, "joint", result, progress)
    separate = _fit_exits(config, cached, costs.to(device), "uniform", "separate", result, progress)
    parts = {"thresholds": part(cached["valid"], 0), "calibration": part(cached["valid"], 2), "test": cached["test"]}
    result.curves["points"] = []
    decided = {name: joint.decide(p["features"], p["last"]) for name, p in parts.items()}
    for index, price in enumerate(config.prices):
        test, calibration = (
            (decided[name][0][index], parts[name]["label"], decided[name][1][index]) for name in ("test", "calibration")
        )
        result.log("points", method="jei_dnn", setting=price, **score(config, costs, test, calibration))
    by_part = {name: (separate.logits(p["features"], p["last"])[0].detach(), p["label"]) for name, p in parts.items()}
    for method, setting, exits in _baseline_exits(config, costs, by_part):
        test, calibration = ((*by_part[name], exits[name]) for name in ("test", "calibration"))
        result.log("points", method=method, setting=setting, **score(config, costs, test, calibration))
    points = pd.DataFrame(result.curves["points"])
    own = points[points.method == "jei_dnn"]
    logits, labels = by_part["test"]
    rows = [row for curve in ("backbone", "joint", "separate") for row in result.curves[curve]]
    return {
        "backbone_accuracy": float((cached["test"]["last"].argmax(-1) == labels).double().mean()),
        "exit_accuracy": (logits.argmax(-1) == labels.unsqueeze(1)).double().mean(0).tolist(),
        "costs": costs.tolist(),
        "million_multiply_adds": millions,
        "gain_over_geometric": gain(points, "geometric"),
        "gain_over_shared": gain(points, "shared"),
        "coverage": float(own.coverage.mean()),
        "set_size": float(own.set_size.mean()),
        "seconds": sum(row["seconds"] for row in rows),
    }


def gain(points: pd.DataFrame, baseline: str) -> float | None:
    """Mean of the accuracy of JEI-DNN minus that of a baseline at equal cost.

    The baseline's accuracy is interpolated between its points; JEI-DNN's points outside its range of costs are left
    out. None if all are.
    """
    other = points[points.method == baseline].groupby("cost").accuracy.max().sort_index()
    own = points[(points.method == "jei_dnn") & points.cost.between(other.index.min(), other.index.max())]
    if own.empty:
        return None
    return float((own.accuracy - np.interp(own.cost, other.index, other.to_numpy())).mean())
