"""What random search may choose, per data set and gate (COMET, KDD 2023, supplement), as data.

A range is `LogUniform`, a grid is `Choice`; what is not named keeps the experiment's default. Softmax, top-k and hash
have a learning rate to tune and nothing else, COMET and DSelect-k also gamma and lambda: equal numbers of trials
search spaces of unequal size, so `size` belongs beside any claim about budgets.

Where we differ: MovieLens-100k and the planted data are not in the paper; their learning rates are ten times and more
higher, because their epochs are ten times and more shorter. The paper fixes gamma for COMET+ and draws 1 to 10 search
epochs out of 100; runs here have a dozen epochs, so the search gets 1 to 4.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from moe_lab.gates.build import check_gate_name


@dataclass(frozen=True)
class LogUniform:
    """The logarithm is uniform in [log low, log high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"a log-uniform range needs 0 < low < high, got {self.low}, {self.high}")


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely as the others."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values) or not self.values:
            raise ValueError(f"a choice needs different values, at least one; got {self.values}")


Space = Mapping[str, LogUniform | Choice]


@dataclass(frozen=True)
class _Study:
    """A row of the table: learning rate, gamma of DSelect-k and COMET, gamma of COMET+, lambda, search epochs."""

    learning_rate: tuple[float, float]
    gamma: tuple[float, ...]
    gamma_plus: tuple[float, ...]
    entropy: tuple[float, ...]
    search_epochs: tuple[float, ...] = tuple(range(1, 11))


STUDIES: dict[str, _Study] = {
    # The paper's.
    "ml-1m": _Study((5e-5, 5e-4), (0.01, 0.1, 1, 5, 10), (10,), (0.05, 0.1, 0.5, 1, 5, 10)),
    "books": _Study((5e-5, 5e-4), (0.1, 0.5, 1, 5, 10), (0.5,), (1, 5, 10, 50, 100)),
    "jester": _Study((5e-5, 5e-4), (0.001, 0.02, 0.1, 1, 5, 10), (0.01,), (0.05, 0.1, 0.5, 1, 5, 10)),
    "digits-mixture": _Study((1e-5, 5e-4), (0.001, 0.01, 0.1, 1), (0.001,), (0.001, 0.005, 0.01, 0.05, 0.1, 0.5)),
    "multimnist": _Study((1e-4, 1e-3), (0.001, 0.01, 0.1, 1, 5, 10), (0.01,), (1e-4, 1e-3, 0.01, 0.1, 1, 5, 10)),
    "multifashion": _Study((1e-4, 1e-3), (0.001, 0.01, 0.1, 1, 5), (0.01,), (0.001, 0.01, 0.1, 1, 5)),
    # Ours: the gamma and lambda of MovieLens, learning rates for short epochs.
    "ml-100k": _Study((5e-4, 5e-3), (0.01, 0.1, 1, 5, 10), (10,), (0.05, 0.1, 0.5, 1, 5, 10), (1, 2, 3, 4)),
    "planted-recommender": _Study((2e-3, 5e-2), (0.01, 0.1, 1, 5, 10), (10,), (0.05, 0.1, 0.5, 1, 5, 10), (1, 2, 3, 4)),
}


def search_space(dataset: str, gate: str) -> dict[str, LogUniform | Choice]:
    """What is tuned for this gate on this data set; keys are fields of the experiment's config.

    Raises:
        ValueError: unknown name, with the nearest valid one.
    """
    check_gate_name(gate)
    if dataset not in STUDIES:
        near = difflib.get_close_matches(dataset, STUDIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no search space for data set {dataset!r}{hint} Valid: {', '.join(STUDIES)}")
    study = STUDIES[dataset]
    space: dict[str, LogUniform | Choice] = {"learning_rate": LogUniform(*study.learning_rate)}
    base, plus = gate.removesuffix("+"), gate.endswith("+")
    if base in ("comet", "dselect_k"):
        space["gamma"] = Choice(study.gamma_plus if plus else study.gamma)
        space["entropy_weight"] = Choice(study.entropy)
    if plus:
        space["permutation_epochs"] = Choice(study.search_epochs)
    return space


def size(space: Space) -> tuple[int, int]:
    """(number of grid combinations, number of continuous ranges)."""
    combinations = 1
    for values in space.values():
        combinations *= len(values.values) if isinstance(values, Choice) else 1
    return combinations, sum(isinstance(values, LogUniform) for values in space.values())


def describe(space: Space) -> str:
    """``30 x a range``: the size in words, for tables."""
    combinations, ranges = size(space)
    return f"{combinations} x a range" if ranges == 1 else f"{combinations} x {ranges} ranges"
