"""Who else could decide: thresholds on trained modules, fixed exits, and oracles.

    static                       everybody at one exit
    geometric, shared            thresholds on the largest probability of separately trained modules: the usual
                                 geometric shares, and one threshold for all exits; *_entropy, *_margin: on those
    geometric_port               the shares end before the last exit: as in JEI-DNN's published comparison
    target_accuracy              thresholds per exit that reach a share of the backbone's accuracy
    constant, constant_shared    both rules on modules trained by the warm-up loss to the end at a constant rate: the
                                 authors' control, a weaker baseline than "separate", whose rate falls
    boosted, weighted            geometric thresholds on BoostedNet's and L2W-DEN's modules; *_shared: one threshold
    oracle_cheapest, _earliest   see the labels

All thresholds come from the validation part "thresholds".
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from moe_lab.exits.losses import cross_entropies
from moe_lab.exits.policies import (
    CONFIDENCES,
    apply_thresholds,
    cheapest_exits,
    confidence,
    earliest_right_exits,
    geometric_thresholds,
    static_exits,
    target_accuracy_thresholds,
)
from moe_lab.experiments.jei_config import JeiConfig
from moe_lab.experiments.jei_score import Answers, Contender
from moe_lab.metrics.calibration import exit_temperatures

Trained = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""separate, constant, boosted, weighted -> thresholds, calibration, test -> logits (N, L, K) and labels (N,)."""

_TARGETS = (0.8, 0.85, 0.9, 0.95, 0.98, 1.0)

METHODS = (
    "jei_dnn",
    *(f"{rule}{suffix}" for suffix in ("", "_entropy", "_margin") for rule in ("geometric", "shared")),
    *("geometric_port", "target_accuracy", "static", "constant", "constant_shared"),
    *("boosted", "boosted_shared", "weighted", "weighted_shared"),
    *("oracle_cheapest", "oracle_earliest"),
)
"""Every method of the curve ``points``."""


def _thresholds(config: JeiConfig, sure: Tensor, names: tuple[str, str]) -> Iterator[tuple[str, float, Tensor]]:
    """(method, setting, thresholds (L,)) by both rules, from confidences (N, L)."""
    for rho in config.rhos:
        yield names[0], rho, geometric_thresholds(sure, rho)
    for value in torch.quantile(sure.flatten()[:10_000_000], torch.linspace(0.02, 0.98, config.n_thresholds)).tolist():
        yield names[1], value, torch.full((sure.shape[1],), value)


def _policies(
    config: JeiConfig, costs: Tensor, trained: Trained
) -> Iterator[tuple[str, str, float, dict[str, Tensor]]]:
    """(modules, method, setting, exits per set of samples)."""
    parts = trained["separate"]

    @cache
    def confidences(modules: str, kind: str) -> dict[str, Tensor]:
        return {name: confidence(logits, kind) for name, (logits, _) in trained[modules].items()}

    def cut(modules: str, kind: str, thresholds: Tensor) -> dict[str, Tensor]:
        return {name: apply_thresholds(sure, thresholds.to(sure)) for name, sure in confidences(modules, kind).items()}

    for level in range(len(costs)):
        exits = {
            name: static_exits(len(labels), level, len(costs)).to(labels.device) for name, (_, labels) in parts.items()
        }
        yield "separate", "static", level, exits
    for modules in trained:
        for kind in CONFIDENCES if modules == "separate" else CONFIDENCES[:1]:
            suffix = "" if kind == "probability" else f"_{kind}"
            names = (f"geometric{suffix}", f"shared{suffix}")
            names = names if modules == "separate" else (modules, f"{modules}_shared")
            sure = confidences(modules, kind)["thresholds"].cpu().float()
            for method, setting, thresholds in _thresholds(config, sure, names):
                yield modules, method, setting, cut(modules, kind, thresholds)
    logits, labels = parts["thresholds"]
    right = logits.argmax(-1) == labels.unsqueeze(1)
    sure = confidence(logits)
    for rho in config.rhos:
        thresholds = geometric_thresholds(sure.cpu().float(), rho, to_last=False)
        yield "separate", "geometric_port", rho, cut("separate", "probability", thresholds)
    for share in _TARGETS:
        target = share * float(right[:, -1].double().mean())
        thresholds = target_accuracy_thresholds(sure, right, target)
        yield "separate", "target_accuracy", share, cut("separate", "probability", thresholds)
    losses = {name: cross_entropies(*pair) for name, pair in parts.items()}
    for price in config.prices:
        near = {name: cheapest_exits(value, costs.to(value), price) for name, value in losses.items()}
        yield "separate", "oracle_cheapest", price, near
    yield "separate", "oracle_earliest", 0.0, {name: earliest_right_exits(*pair) for name, pair in parts.items()}


def baselines(config: JeiConfig, costs: Tensor, trained: Trained) -> Iterator[Contender]:
    """Every method but JEI-DNN at every setting."""
    temperatures = {modules: exit_temperatures(*parts["calibration"]) for modules, parts in trained.items()}
    for modules, method, setting, exits in _policies(config, costs, trained):
        test, known = (Answers(*trained[modules][name], exits[name]) for name in ("test", "calibration"))
        yield Contender(method, setting, test, known, temperatures[modules])
