"""The README's table of what was measured, computed from the recorded Results; a test keeps the two equal.

python -m moe_lab.experiments.summary
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_lab.experiments.claims import recommender_claims, tuning_claims
from moe_lab.experiments.comet_tuning import pools
from moe_lab.experiments.compare import scores
from moe_lab.experiments.unlearned_search import compare, readable
from moe_lab.experiments.vision_claims import vision_claims
from moe_lab.experiments.vision_config import BASELINES
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results
from moe_lab.search_spaces import describe, search_space
from moe_lab.tuning import Pool, top_share

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
    """The random search on MovieLens-100k."""
    (study,) = find_results("comet_tuning", root=recorded_dir(), recommender="standard")
    return study


def unlearned_control() -> Result:
    """The control of `tuning_study`: "+" with nothing learned."""
    (control,) = find_results("comet_unlearned_search", root=recorded_dir(), recommender="standard")
    return control


def tuning_table(dataset: str, of_gate: dict[str, Pool]) -> pd.DataFrame:
    """The paper's table entry per gate: the best 5 % of trials, beside the size of the space they were drawn from."""
    rows = {}
    for gate, pool in of_gate.items():
        top = top_share(pool)
        rows[gate] = {
            "search space": describe(search_space(dataset, gate)),
            "trials": len(pool.test),
            f"test loss, best {top.n}": f"{top.mean:.4f}" + (f" ± {top.standard_error:.4f}" if top.n > 1 else ""),
        }
    return pd.DataFrame(rows).T.rename_axis("gate")


def _markdown(table: pd.DataFrame) -> str:
    header = [name for name in (table.index.name, *table.columns) if name]
    rows = table.reset_index().values if table.index.name else table.values
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _order(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda result: (result.config["gate"] not in BASELINES, result.config["gate"]))


def summary() -> str:
    """Markdown: the claims; then recommender, vision, tuning, mean ± standard deviation over seeds (or trials)."""
    recommender, vision, study = main_recommender_runs(), main_vision_runs(), tuning_study()
    known = recommender[0].metrics
    floor = {name: known[kind] for name, kind in _FLOOR.items()}
    data = "ml-100k"
    of_gate = pools(study)
    claims = [recommender_claims(recommender), vision_claims(vision), tuning_claims(of_gate, data)]
    return "\n\n".join(
        [
            _markdown(pd.concat(claims)),
            "MovieLens-100k, two tasks, 8 experts of 64, k = 2, 12 epochs. Without a network: the constant's loss and "
            "MSE, the AUC of popularity.",
            _markdown(
                scores(_order(recommender), _RECOMMENDER, one_expert=main_recommender_runs(n_experts=1), floor=floor)
            ),
            "MultiMNIST, 100,000 / 20,000 / 20,000 images, 16 CNN experts, k = 4, at most 15 epochs. `one_expert` and "
            "`expert_per_task`: no routing, networks of an expert's size.",
            _markdown(scores(_order(vision), _VISION)),
            f"Random search on MovieLens-100k, {study.config['n_trials']} trials per gate, 8 epochs each, best 5 % by "
            "validation loss, mean and standard error of their test loss.",
            _markdown(tuning_table(data, of_gate)),
            'Is it the search? The same trials of "+" once more, the permutation never learned: test loss, mean over '
            "trials.",
            _markdown(readable(compare(study, unlearned_control()))),
        ]
    )


if __name__ == "__main__":
    print(summary())
