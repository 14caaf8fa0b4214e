"""What a two-task recommender run is told (COMET paper, section 5; sizes in 5.2, training in 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lab.experiments.settings import profile_settings
from moe_lab.gates.build import check_gate_name

TASKS = ("watch", "rating")

_SMALL = {"n_users": 300, "n_items": 200, "items_per_user": 40}  # of the planted data; 8 clusters of users

_PROFILES: dict[str, dict[str, Any]] = {
    # Embedded planted data, seconds per gate on one core: for tests, `make run` and the widgets.
    "quick": {},
    # MovieLens-100k, sizes of the pilot (half a minute per gate on one core).
    "standard": {
        "dataset": "ml-100k",
        "data_options": {},
        "embedding": 32,
        "hidden": 64,
        "head": 64,
        "batch_size": 1024,
        "learning_rate": 2e-3,
        "epochs": 12,
        "permutation_epochs": 4.0,
    },
    # The paper's sizes. One run is 3,076 steps an epoch: hours on a CPU, minutes on a GPU.
    "paper": {
        "dataset": "ml-1m",
        "data_options": {},
        "n_experts": 16,
        "embedding": 128,
        "hidden": 256,
        "head": 256,
        "batch_size": 512,
        "learning_rate": 2e-4,
        "epochs": 100,
        "patience": 25,
        "permutation_epochs": 4.0,
        "device": "auto",
    },
}


@dataclass(frozen=True)
class RecommenderConfig:
    """One run. Every field takes part in the run's fingerprint: change one, and it is another run.

    The defaults are those of profile "quick" (see `profile`).

    Attributes:
        gate: softmax, topk, hash, hash_balanced, dselect_k or comet; with a trailing "+" for local search.
        seed: of initial weights, order of batches, dropout, hash table. Not of the data.
        dataset: "planted-recommender" (embedded), "ml-100k", "ml-1m", "jester" or "books".
        data_seed: of negatives and split. Kept apart from ``seed`` so that runs differ in training alone and all
            gates see the same rows, as in the paper (one split for all).
        data_options: passed on to `datasets.load` (sizes of the planted data, thinning of the others).
        n_experts: E; 8 at the small sizes, 16 in the paper (9 for Books).
        k: trees, selectors or experts chosen; the paper has 2 (4 for Books).
        gamma: width of the smooth-step (COMET, DSelect-k); 1 is the middle of the paper's grid .01 .. 10. It acts as
            a learning-rate multiplier of the splits.
        entropy_weight: lambda, coefficient of the gates' entropy; 0.1: at the start it weighs 2 x 0.1 x 2 log 8 = 0.8
            against a loss of about 0.75, so it shapes the gate without drowning the tasks.
        load_balance_weight: coefficient of the balancing loss of top-k and softmax; 0 as in the paper.
        permutation_weight: coefficient of the search's regulariser (the paper's zeta).
        permutation_epochs: length of the local search ("+"); the paper draws 1 to 10 of 100.
        permutation_schedule: temperatures of the search, "default" or "official" (too cold for 16 experts).
        watch_weight: task weight of "watched"; the rating gets 1 - watch_weight. Paper: 0.9 and 0.1.
        embedding: width of the user and of the item embedding.
        hidden: width of an expert.
        head: hidden width of each task's head.
        dropout: behind the experts.
        learning_rate: of Adam, constant.
        batch_size: rows per step.
        epochs: most passes over the training rows.
        patience: epochs without a better validation loss before stopping; None never stops early. The best weights
            are restored in either case.
        official_batch: rows per batch in ``test_loss_official``, the authors' batch-weighted estimate (they evaluate
            with 128).
        device: "cpu" (the small runs are faster there), "cuda" or "auto".

    Raises:
        ValueError: a value that cannot be meant; the message says what would be.
    """

    gate: str = "comet"
    seed: int = 0
    dataset: str = "planted-recommender"
    data_seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=lambda: dict(_SMALL))
    n_experts: int = 8
    k: int = 2
    gamma: float = 1.0
    entropy_weight: float = 0.1
    load_balance_weight: float = 0.0
    permutation_weight: float = 1e-4
    permutation_epochs: float = 2.0
    permutation_schedule: str = "default"
    watch_weight: float = 0.9
    embedding: int = 16
    hidden: int = 32
    head: int = 32
    dropout: float = 0.5
    learning_rate: float = 2e-2
    batch_size: int = 512
    epochs: int = 10
    patience: int | None = None
    official_batch: int = 128
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_gate_name(self.gate)
        if not 0 <= self.watch_weight <= 1:
            raise ValueError(f"watch_weight is a share in [0, 1], got {self.watch_weight}; the paper has 0.9 and 0.1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("entropy_weight", "load_balance_weight", "permutation_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 switches the term off")
        for name in ("embedding", "hidden", "head", "batch_size", "epochs", "official_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gate.endswith("+") and not self.permutation_epochs > 0:
            raise ValueError(f"{self.gate!r} needs permutation_epochs > 0; without a search it is {self.gate[:-1]!r}")

    @classmethod
    def profile(cls, name: str, **changes: Any) -> RecommenderConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))

    @property
    def task_weights(self) -> dict[str, float]:
        """Weight of each task; they sum to 1."""
        return {"watch": self.watch_weight, "rating": 1.0 - self.watch_weight}

    def coefficients(self) -> dict[str, float]:
        """Coefficient of every term that this gate's loss has; 0 only logs a term."""
        base = self.gate.removesuffix("+")
        terms = dict(self.task_weights)
        if base in ("comet", "dselect_k"):
            terms["entropy"] = self.entropy_weight
        if base == "dselect_k" and self.n_experts & (self.n_experts - 1):
            terms["code_mass"] = 1.0  # per row; the authors' weight, which they apply to the sum over a batch
        if base in ("softmax", "topk"):
            terms |= {"load_balance": self.load_balance_weight, "z": 0.0}
        if self.gate.endswith("+"):
            terms["permutation"] = self.permutation_weight
        return terms
