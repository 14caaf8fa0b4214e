"""What the README says of COMET: the recommender, the images, the random searches and their controls.

Joined to the other papers in `summary`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_lab.experiments.claims import recommender_claims, tuning_claims
from moe_lab.experiments.comet_tuning import pools
from moe_lab.experiments.compare import markdown, scores
from moe_lab.experiments.recorded_studies import (
    control_of,
    cpu_study,
    gpu_study,
    machine,
    side_by_side,
    tuning_table,
    vision_study,
)
from moe_lab.experiments.unlearned_search import compare, readable
from moe_lab.experiments.vision_claims import vision_claims
from moe_lab.experiments.vision_config import BASELINES
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results

_RECOMMENDER = ("test_loss", "test_auc", "test_mse", "experts_per_example", "used_experts")
_FLOOR = {"test_loss": "constant_loss", "test_auc": "popularity_auc", "test_mse": "constant_mse"}
_VISION = ("test_loss", "test_accuracy", "experts_per_example", "used_experts")


def main_recommender_runs(n_experts: int = 8) -> list[Result]:
    """MovieLens-100k, task weights (0.9, 0.1), default gamma and entropy weight: one run per gate and seed.

    ``n_experts=1``: the baseline without anything to route.
    """
    same = {"dataset": "ml-100k", "watch_weight": 0.9, "gamma": 1.0, "entropy_weight": 0.1}
    return find_results("comet_recommender", root=recorded_dir(), n_experts=n_experts, **same)


def main_vision_runs() -> list[Result]:
    """MultiMNIST, raw pixels, default gamma and entropy weight: one run per gate or baseline and seed."""
    same = {"dataset": "multimnist", "gamma": 10.0, "entropy_weight": 0.1, "center_pixels": False}
    return find_results("comet_vision", root=recorded_dir(), **same)


def tuning_study() -> Result:
    """The random search on MovieLens-100k of a 2-core CPU."""
    study = cpu_study()
    assert study is not None
    return study


def unlearned_control() -> Result:
    """The control of `tuning_study`: "+" with nothing learned."""
    control = control_of(tuning_study())
    assert control is not None
    return control


def _study_tables() -> list[str]:
    """Paragraphs on the random searches; that of a GPU beside that of a CPU where both are there."""
    small, large, images = tuning_study(), gpu_study(), vision_study()
    said = "8 epochs each, best 5 % by validation loss, mean and standard error of their test loss."
    if large is None:
        parts = [
            f"Random search on MovieLens-100k, {small.config['n_trials']} trials per gate, {said}",
            markdown(tuning_table("ml-100k", pools(small))),
        ]
    else:
        parts = [
            f"Random search on MovieLens-100k, {said} CPU: {machine(small)}. GPU: {machine(large)}.",
            markdown(side_by_side({"CPU": small, "GPU": large}, "ml-100k")),
        ]
    if images is not None:
        epochs = images.config["changes"]["epochs"]
        parts += [
            f"Random search on MultiMNIST, 100,000 / 20,000 / 20,000 images, 16 CNN experts, {epochs} epochs each, "
            f"best 5 % by validation loss, mean and standard error of their test loss and accuracy. {machine(images)}.",
            markdown(side_by_side({"GPU": images}, "multimnist")),
        ]
    controls = {"CPU" if large is not None else "": (small, unlearned_control())}
    for label, study in {"GPU": large, "Images, GPU": images}.items():
        if study is not None and (control := control_of(study)) is not None:
            controls[label] = (study, control)
    question = 'Is it the search? The same trials of "+" once more, the permutation never learned'
    parts.append(f"{question}: test loss, mean over trials.")
    for label, pair in controls.items():
        parts += [f"{label}:"] * bool(label) + [markdown(readable(compare(*pair)))]
    return parts


def _order(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda result: (result.config["gate"] not in BASELINES, result.config["gate"]))


def comet_summary() -> list[str]:
    """Paragraphs: the claims; then recommender, vision, tuning, mean ± standard deviation over seeds (or trials)."""
    recommender, vision = main_recommender_runs(), main_vision_runs()
    known = recommender[0].metrics
    floor = {name: known[kind] for name, kind in _FLOOR.items()}
    data = "ml-100k"
    claims = [recommender_claims(recommender), vision_claims(vision), tuning_claims(pools(tuning_study()), data)]
    for dataset, study in ((data, gpu_study()), ("multimnist", vision_study())):
        if study is not None:
            claims.append(tuning_claims(pools(study), f"{dataset}, {study.environment['device']}"))
    return [
        markdown(pd.concat(claims)),
        "MovieLens-100k, two tasks, 8 experts of 64, k = 2, 12 epochs. Without a network: the constant's loss and "
        "MSE, the AUC of popularity.",
        markdown(scores(_order(recommender), _RECOMMENDER, one_expert=main_recommender_runs(n_experts=1), floor=floor)),
        "MultiMNIST, 100,000 / 20,000 / 20,000 images, 16 CNN experts, k = 4, at most 15 epochs. `one_expert` and "
        "`expert_per_task`: no routing, networks of an expert's size.",
        markdown(scores(_order(vision), _VISION)),
        *_study_tables(),
    ]
