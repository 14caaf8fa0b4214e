"""The README's table of what was measured, computed from the recorded Results; a test keeps the two equal.

python -m moe_lab.experiments.summary
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_lab.experiments.claims import recommender_claims
from moe_lab.experiments.compare import over_seeds, readable
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results

_RECOMMENDER = ("test_loss", "test_auc", "test_mse", "experts_per_example", "used_experts")
_VISION = ("test_loss", "test_accuracy", "experts_per_example", "used_experts")


def main_recommender_runs() -> list[Result]:
    """MovieLens-100k, task weights (0.9, 0.1), default gamma and entropy weight: one run per gate and seed."""
    return find_results(
        "comet_recommender", root=recorded_dir(), dataset="ml-100k", watch_weight=0.9, gamma=1.0, entropy_weight=0.1
    )


def main_vision_runs() -> list[Result]:
    """MultiMNIST with the default gamma: one run per gate or baseline and seed."""
    return find_results("comet_vision", root=recorded_dir(), dataset="multimnist", gamma=10.0)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _gates(results: Sequence[Result], metrics: Sequence[str]) -> str:
    table = readable(over_seeds(results, metrics)).sort_index()
    return _markdown(
        ["gate", *metrics, "seeds"], [[gate, *row] for gate, row in zip(table.index, table.values, strict=True)]
    )


def summary() -> str:
    """Three Markdown tables: claims, recommender, vision; mean ± standard deviation over seeds."""
    recommender, vision = main_recommender_runs(), main_vision_runs()
    claims = recommender_claims(recommender)
    known = recommender[0].metrics
    anchors = (
        f"Without any model: constant loss {known['constant_loss']:.3f}, popularity AUC {known['popularity_auc']:.3f}, "
        f"user and item bias MSE {known['bias_mse']:.3f}."
    )
    return "\n\n".join(
        [
            _markdown(claims.columns, claims.values),
            "MovieLens-100k, two tasks, 8 experts of 64, k = 2, 12 epochs. " + anchors,
            _gates(recommender, _RECOMMENDER),
            "MultiMNIST, 100,000 / 20,000 / 20,000 images, 16 CNN experts, k = 4, up to 20 epochs.",
            _gates(vision, _VISION),
        ]
    )


if __name__ == "__main__":
    print(summary())
