"""What a local-search run on planted clusters is told, and the scenarios of the study (COMET, KDD 2023, the "+")."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

from moe_lab.gates.permutation import SCHEDULES

GATES = ("comet", "topk", "hash")
SEARCHES = ("none", *SCHEDULES, "one_shot", "shuffle")
STARTS = ("scrambled", "misplaced", "fresh")

_PROFILES: dict[str, dict[str, Any]] = {
    "quick": {},
    "standard": {"n_train": 4096, "epochs": 40, "search_epochs": 8, "learning_rate": 5e-3},
    "paper": {
        "n_train": 16384,
        "n_experts": 16,
        "n_features": 32,
        "epochs": 60,
        "search_epochs": 10,
        "learning_rate": 5e-3,
    },
}


def check_name(what: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise ValueError with the nearest valid name."""
    if value not in valid:
        near = difflib.get_close_matches(value, valid, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} {value!r}{hint} Valid: {', '.join(valid)}")


@dataclass(frozen=True)
class SearchConfig:
    """One run. The defaults are those of profile "quick".

    Attributes:
        gate: comet (one tree), topk (k = 2) or hash (one key per cluster, or sixteen if misplaced).
        search: "none", or the schedule of the permutation search: "default", "official". Two controls that do not
            search: "one_shot": before training, the best relabelling of the start (costs of all pairs of output and
            expert on the training rows, one Hungarian assignment), then fixed. "shuffle": a random one, fixed.
        start: how the gate begins. "scrambled": every cluster has an output of its own, but the experts behind the
            outputs are in the wrong order: *some* permutation is right. "misplaced": the wrong rows share an output
            (random hyperplanes; a random hash table over sixteen keys a cluster): no permutation is right. "fresh":
            the gate's ordinary initial weights.
        gate_trains: the gate learns (a hash gate has nothing to learn; saturated splits cannot, wherever they stand).
        identity: 1: each expert begins as the true function of one cluster; 0: as a random function, so that experts
            are exchangeable; between: a mixture.
        random_size: size of the random functions relative to the true ones.
        experts_train: the experts learn.
        n_experts: E, clusters and experts.
        n_features: D.
        n_train: training rows (validation and test have 1,000 each).
        epochs: training length. If nothing but the permutation learns, training ends with the search.
        search_epochs: length of the search (the paper: 1 to 10).
        batch_size: rows per step.
        learning_rate: Adam's, for everything that learns, the permutation's logits included.
        permutation_weight: coefficient of the permutation's entropy; 1e-4 everywhere in the paper.
        seed: of data, initial weights and order of batches; runs with one seed differ in nothing but their settings.
    """

    gate: str = "comet"
    search: str = "none"
    start: str = "scrambled"
    gate_trains: bool = False
    identity: float = 1.0
    random_size: float = 1.0
    experts_train: bool = False
    n_experts: int = 8
    n_features: int = 16
    n_train: int = 2048
    epochs: int = 12
    search_epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-2
    permutation_weight: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("gate", self.gate, GATES)
        check_name("search", self.search, SEARCHES)
        check_name("start", self.start, STARTS)
        if not 0 <= self.identity <= 1:
            raise ValueError(f"identity must be between 0 (random experts) and 1 (true functions), got {self.identity}")
        if not 1 <= self.search_epochs <= self.epochs:
            raise ValueError(f"search_epochs must be in 1 .. epochs = {self.epochs}, got {self.search_epochs}")
        if self.n_experts < 2:
            raise ValueError(f"a search needs at least 2 experts, got {self.n_experts}")
        if self.gate == "hash" and self.start == "fresh":
            raise ValueError("a hash gate has no weights to begin with: start 'scrambled' or 'misplaced'")

    @classmethod
    def profile(cls, name: str, **changes: Any) -> SearchConfig:
        """quick (half a second a run), standard (recorded), paper (16 experts); with changes."""
        check_name("profile", name, tuple(_PROFILES))
        return replace(cls(**_PROFILES[name]), **changes)

    @property
    def training_epochs(self) -> int:
        """``epochs``, or ``search_epochs`` if only the permutation learns."""
        gate_learns = self.gate_trains and self.gate != "hash"
        return self.epochs if gate_learns or self.experts_train else self.search_epochs


SCENARIOS: dict[str, dict[str, Any]] = {
    # experts with an identity, a gate that cannot move: a permutation is the only way out
    "hash, wrong table": {"gate": "hash"},
    "top-k, frozen": {"gate": "topk"},
    "COMET, saturated": {"gate": "comet"},
    # the same, but no permutation is right
    "hash, mixed table": {"gate": "hash", "start": "misplaced"},
    "COMET, misplaced splits": {"gate": "comet", "start": "misplaced"},
    # experts that learn behind a gate that cannot move: specialists who could re-train, or beginners
    "true experts learn": {"experts_train": True},
    "random experts learn": {"identity": 0.0, "experts_train": True},
    "small random experts learn": {"identity": 0.0, "random_size": 0.1, "experts_train": True},
    # a gate that learns
    "top-k learns, wrong order": {"gate": "topk", "gate_trains": True},
    "top-k learns": {"gate": "topk", "gate_trains": True, "start": "fresh"},
    "COMET learns": {"start": "fresh", "gate_trains": True},
    "COMET learns, 5 experts": {"start": "fresh", "gate_trains": True, "n_experts": 5},
    "all learn": {"start": "fresh", "gate_trains": True, "identity": 0.0, "random_size": 0.1, "experts_train": True},
}
"""Name -> settings; `search_study` varies the search and the seed of each."""
