"""JEI-DNN on a backbone, beside every baseline, on one whole test set (Regol et al., ICLR 2024, section 5).

1. Train a body on the training images, once for all runs that share it; freeze it; compute the features behind every
   block once (`jei_backbone`).
2. Train inference modules and gates for all prices side by side (`exits.joint`); each price keeps its own best weights
   by loss + price x cost.
3. Train modules without gates: plain cross entropy in the same phases ("separate": with mode "released" the modules are
   the same and only the gates differ), the same at a constant rate, BoostedNet, L2W-DEN. On them: thresholds
   (`jei_baselines`).
4. Every method is a set of points (cost, accuracy, ...; `jei_score`). Thresholds are set on part 0 of the validation
   images, models are chosen on part 1, prediction sets and temperatures are calibrated on part 2; the test images are
   looked at once.

Where we differ: `exits.cost` counts all tokens; methods without gates are scored on the same test images; the last gate
phase fits the gates to the final modules; of the epochs the one with the least validation loss + price x cost is taken
(the authors look at accuracy, which ignores the cost). The body trains with AdamW, all of it at one rate, also where it
starts from ImageNet weights (the authors: SGD, blocks at a hundredth of the head's rate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from moe_lab.batches import StepBatches
from moe_lab.exits.boosted import BoostedExits
from moe_lab.exits.joint import JointExits
from moe_lab.exits.losses import cross_entropies
from moe_lab.exits.weighted import WeightedExits
from moe_lab.experiments.jei_backbone import (
    augmentation,
    build_backbone,
    cached_features,
    finetune,
    load_images,
    normalised_costs,
    shared_backbone,
)
from moe_lab.experiments.jei_baselines import baselines
from moe_lab.experiments.jei_config import WEIGHTINGS, JeiConfig
from moe_lab.experiments.jei_score import (
    Answers,
    Contender,
    conformal_rows,
    exit_rows,
    gain,
    mean_cost,
    nearest,
    reliability_rows,
    score,
)
from moe_lab.metrics.calibration import exit_temperatures
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import FitConfig, LearningRate, fit

EXPERIMENT = "jei_dnn"
STEPS_PER_EPOCH = 100
PARTS = {"thresholds": 0, "choice": 1, "calibration": 2}
"""What the three parts of the validation images are for."""

__all__ = ["PARTS", "build_backbone", "cached_features", "gain", "load_images", "normalised_costs", "part", "run"]

Cached = dict[str, dict[str, Tensor]]
"""train, thresholds, choice, calibration, test -> features, last, label."""


def run(config: JeiConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True) -> Result:
    """Train, test, or read the finished Result back. ``recompute`` leaves the backbone, which other runs share.

    Returns:
        A Result with the curves of all trainings (``backbone``, perhaps ``finetune``, ``joint``, ``separate``,
        ``constant``, ``boosted``, ``weighted``); ``points``: one row per method and setting, see `jei_score.score`;
        ``by_exit``, ``conformal`` and ``reliability`` of JEI-DNN and of the thresholds that cost about as much.
        Metrics: see `_train_and_test`.
    """
    compute = partial(_train_and_test, config, root, progress)
    return run_cached(EXPERIMENT, config, compute, root=root, recompute=recompute)


def part(split: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Rows of one of the three validation parts."""
    rows = split["part"] == index
    return {key: values[rows] for key, values in split.items()}


def _fit_modules(
    config: JeiConfig,
    cached: Cached,
    model: nn.Module,
    optimizer: Any,
    terms: tuple[str, ...],
    evaluate: Callable[[Any], dict[str, float]],
    curve: str,
    result: Result,
    progress: bool,
) -> None:
    """Every training on cached features: the same batches, steps and, but for "constant", learning-rate schedule."""
    columns = {key: cached["train"][key] for key in ("features", "last", "label")}
    device = columns["label"].device
    steps = {"steps": STEPS_PER_EPOCH, "shuffle": True, "seed": config.seed, "device": device}
    fit(
        model,
        StepBatches(columns, config.batch_size, **steps),
        lambda model, batch: model.terms(batch),
        optimizer=optimizer,
        coefficients=dict.fromkeys(terms, 1.0),
        evaluate=evaluate,
        config=FitConfig(
            epochs=None,
            max_steps=config.steps,
            learning_rate=None if curve == "constant" else LearningRate(0, config.steps, floor=0.02),
            progress=progress,
        ),
        result=result,
        curve=curve,
        resume=True,
    )


def _fit_joint(
    config: JeiConfig, cached: Cached, costs: Tensor, mode: str, curve: str, result: Result, progress: bool
) -> JointExits:
    """Curve "joint": all prices; "separate": one run, price 0, whose gates nobody uses; "constant": a warm-up only."""
    _, n_exits, width = cached["train"]["features"].shape
    phases = config.phases
    if curve == "constant":  # the gate phase behind the last step never comes
        phases = replace(phases, warmup=config.steps, steps=config.steps + phases.gate_steps)
    model = JointExits(
        n_exits,
        width,
        cached["train"]["last"].shape[1],
        config.prices if curve == "joint" else (0.0,),
        costs,
        phases=phases,
        mode=mode,
        balance=config.balance,
        model=config.model,
        gate_inputs=config.gate_inputs if curve == "joint" else "all",
        warmup_patience=None if curve == "constant" else config.warmup_patience,
        warmup_loss=config.warmup_loss,
        generator=torch.Generator().manual_seed(config.seed),
    ).to(cached["train"]["features"].device)
    known, choice = cached["thresholds"], cached["choice"]

    def evaluate(model: JointExits) -> dict[str, float]:
        model.weights_from(known["features"], known["last"], known["label"])
        logits, exits = model.decide(choice["features"], choice["last"])
        losses = model.cross_entropies(logits, choice["label"])
        if curve == "joint":
            at = losses.gather(-1, exits.unsqueeze(-1)).squeeze(-1)
            values = (at + model.prices.unsqueeze(1) * model.costs[exits]).mean(1)
        else:
            values = losses.mean((1, 2))
        model.watch_warmup((logits[0].argmax(-1) == choice["label"].unsqueeze(1)).double().mean(0)[:-1])
        kept = model.keep_best(values, ready=curve != "joint" or model.gates_ready)
        return {"valid_loss": kept, "valid_now": float(values.mean())}

    groups = [
        {"params": list(model.gates.parameters()), "lr": config.gate_rate},
        {"params": [model.weight, model.bias], "lr": config.module_rate, "weight_decay": 5e-4},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    _fit_modules(config, cached, model, optimizer, ("gates", "modules"), evaluate, curve, result, progress)
    model.take_best()
    return model


def _fit_baseline(
    config: JeiConfig, cached: Cached, name: str, result: Result, progress: bool
) -> BoostedExits | WeightedExits:
    """ "boosted" or "weighted"; the weights of the least mean cross entropy over exits."""
    _, n_exits, width = cached["train"]["features"].shape
    sizes = (n_exits, width, cached["train"]["last"].shape[1])
    rate = config.module_rate / (n_exits - 1)  # a sum over exits where the others have a mean
    generator = torch.Generator().manual_seed(config.seed)
    device, choice = cached["train"]["features"].device, cached["choice"]
    if name == "boosted":
        model: BoostedExits | WeightedExits = BoostedExits(*sizes, omega=config.omega, generator=generator).to(device)
        parameters = [model.weight, model.bias]
        optimizer: Any = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)
        terms: tuple[str, ...] = ("modules",)
    else:
        model = WeightedExits(*sizes, WEIGHTINGS[config.weighted], generator=generator).to(device)
        optimizer, terms = model.optimizers(rate), ("modules", "weights")

    def evaluate(model: Any) -> dict[str, float]:
        logits = model.logits(choice["features"], choice["last"])
        return {"valid_loss": float(cross_entropies(logits, choice["label"]).mean())}

    _fit_modules(config, cached, model, optimizer, terms, evaluate, name, result, progress)
    return model


def _learned(config: JeiConfig, joint: JointExits, cached: Cached) -> Iterator[Contender]:
    """JEI-DNN at every price."""
    found = {
        name: tuple(values.cpu() for values in joint.decide(cached[name]["features"], cached[name]["last"]))
        for name in ("test", "calibration")
    }
    for index, price in enumerate(config.prices):
        test, known = (
            Answers(logits[index], cached[name]["label"].cpu(), exits[index]) for name, (logits, exits) in found.items()
        )
        yield Contender("jei_dnn", price, test, known, exit_temperatures(known.logits, known.labels))


def _train_and_test(config: JeiConfig, root: Path | str | None, progress: bool, result: Result) -> dict[str, Any]:
    """Metrics: backbone_accuracy, exit_accuracy (separately trained modules, per exit), costs (per exit),
    million_multiply_adds; gain_over_<baseline>: mean accuracy difference at equal cost, over all prices;
    middle_gain_over_<baseline>: over those of cost .4 to .85; sets_minus_<baseline>: the same difference in set size;
    coverage and set_size (means over prices); best_steps (per price); title of the data, n_exits, seconds."""
    device = pick_device(config.device)
    data = load_images(config)
    body, trained_body = shared_backbone(config.backbone, data, device, root=root, progress=progress)
    result.curves["backbone"] = list(trained_body.curves["backbone"])
    if config.finetune_epochs:
        body = finetune(config, data, body, result, progress)
    augment = augmentation(config, data, device)
    costs, millions = normalised_costs(body, data)
    valid = cached_features(body, data.valid, device)
    cached = {
        "train": cached_features(body, data.train, device, augment=augment, copies=config.feature_copies),
        "test": cached_features(body, data.test, device),
        **{name: part(valid, index) for name, index in PARTS.items()},
    }
    joint = _fit_joint(config, cached, costs.to(device), config.mode, "joint", result, progress)
    separate, constant = (
        _fit_joint(config, cached, costs.to(device), "uniform", name, result, progress)
        for name in ("separate", "constant")
    )
    boosted, weighted = (_fit_baseline(config, cached, name, result, progress) for name in ("boosted", "weighted"))

    def logits_of(model: Any, name: str) -> Tensor:
        found = model.logits(cached[name]["features"], cached[name]["last"]).detach().cpu()  # scores: small work
        return found[0] if isinstance(model, JointExits) else found

    names = ("thresholds", "calibration", "test")
    modules_of = {"separate": separate, "constant": constant, "boosted": boosted, "weighted": weighted}
    trained = {
        modules: {name: (logits_of(model, name), cached[name]["label"].cpu()) for name in names}
        for modules, model in modules_of.items()
    }
    learned = list(_learned(config, joint, cached))
    others = list(baselines(config, costs, trained))
    shown = list(learned)
    for method in ("geometric", "shared"):
        settings = [contender for contender in others if contender.method == method]
        near = {
            found.setting: found
            for own in learned
            for found in [nearest(settings, costs, mean_cost(costs, own.calibration.exits))]
        }
        shown += near.values()
    rows = {
        "points": (score(contender, costs, config.alpha) for contender in (*learned, *others)),
        "by_exit": (row for contender in shown for row in exit_rows(contender)),
        "conformal": (row for contender in shown for row in conformal_rows(contender, config.alphas)),
        "reliability": (row for contender in shown for row in reliability_rows(contender)),
    }
    for curve, logged in rows.items():
        result.curves[curve] = []
        for row in logged:
            result.log(curve, **row)
    points = pd.DataFrame(result.curves["points"])
    own = points[points.method == "jei_dnn"]
    logits, labels = trained["separate"]["test"]
    trainings = [row for name, curve in result.curves.items() if name not in rows for row in curve]
    compared = ("geometric", "shared", "geometric_port", "constant", "boosted", "weighted", "oracle_cheapest")
    return {
        "title": data.info.get("title", config.dataset),
        "n_exits": len(costs),
        "backbone_accuracy": float((logits[:, -1].argmax(-1) == labels).double().mean()),
        "exit_accuracy": (logits.argmax(-1) == labels.unsqueeze(1)).double().mean(0).tolist(),
        "costs": costs.tolist(),
        "million_multiply_adds": millions,
        **{f"gain_over_{name}": gain(points, name) for name in compared},
        **{f"middle_gain_over_{name}": gain(points, name, between=(0.4, 0.85)) for name in compared[:2]},
        **{f"sets_minus_{name}": gain(points, name, "set_size") for name in compared[:2]},
        "coverage": float(own.coverage.mean()),
        "set_size": float(own.set_size.mean()),
        "best_steps": joint.best_step.tolist(),
        "seconds": sum(row["seconds"] for row in trainings),
    }
