"""Tables of a tuning study, in the form in which one reads them: what was searched, what "+" changes, what chance does.

Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe_lab.experiments.comet_tuning import pools
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.summary import tuning_table
from moe_lab.results import Result
from moe_lab.tuning import Pool, difference_interval, expected_best, loss_behind, null_ratios, times_fewer_trials

PAIRS = (("hash", "hash+"), ("topk", "topk+"), ("comet", "comet+"))


def dataset_of(study: Result) -> str:
    """Name of the data set that a study of `comet_tuning` ran on."""
    return RecommenderConfig.profile(study.config["recommender"], **study.config["changes"]).dataset


def pairs_in(of_gate: Mapping[str, Pool]) -> list[tuple[str, str]]:
    """The gates that are there with and without "+"."""
    return [(gate, plus) for gate, plus in PAIRS if {gate, plus} <= of_gate.keys()]


def overview(study: Result) -> pd.DataFrame:
    """Per gate: search space, trials, loss of the best 5 % and after one trial, median seconds (of a busy machine)."""
    of_gate = pools(study)
    table = tuning_table(dataset_of(study), of_gate)
    table["loss after 1 trial"] = [f"{expected_best(pool, [1])[0]:.4f}" for pool in of_gate.values()]
    table["seconds per trial"] = pd.DataFrame(study.curves["trials"]).groupby("gate")["seconds"].median().round(1)
    return table


def comparison(of_gate: Mapping[str, Pool]) -> pd.DataFrame:
    """Per pair: difference of expected test losses after 1, 5 and all trials, with intervals; ratio of budgets."""
    rows = {}
    for gate, plus in pairs_in(of_gate):
        n = min(len(of_gate[gate].test), len(of_gate[plus].test))
        row = {}
        for budget in (1, 5, n):
            if budget <= n:
                gap = difference_interval(of_gate[gate], of_gate[plus], budget)
                row[f"after {budget}"] = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        row["times fewer trials"] = f"{times_fewer_trials(of_gate[gate], of_gate[plus]):.2g} (of {n})"
        rows[f"{plus} − {gate}"] = row
    return pd.DataFrame(rows).T.rename_axis("test loss")


def worth(of_gate: Mapping[str, Pool], ratios: Sequence[int] = (2, 5, 10)) -> pd.DataFrame:
    """Per gate: the difference of losses that would be seen as "r times fewer trials" (`loss_behind`)."""
    rows = {
        gate: {f"{r} times fewer": f"{loss_behind(pool, r):.4f}" for r in ratios if r <= len(pool.test)}
        for gate, pool in of_gate.items()
    }
    return pd.DataFrame(rows).T.rename_axis("difference of losses")


def stopped(of_gate: Mapping[str, Pool], counts: Sequence[int]) -> pd.DataFrame:
    """What the study would have said, had it been stopped after so many trials per gate."""
    rows: dict[str, dict[int, str]] = {}
    for gate, plus in pairs_in(of_gate):
        for count in counts:
            first, second = (Pool(*(losses[:count] for losses in of_gate[name])) for name in (gate, plus))
            gap = expected_best(second, [5])[0] - expected_best(first, [5])[0]
            rows.setdefault(f"{plus}: times fewer", {})[count] = f"{times_fewer_trials(first, second):.2g}"
            rows.setdefault(f"{plus}: difference after 5", {})[count] = f"{gap:+.4f}"
    return pd.DataFrame(rows).T.rename_axis(columns="trials so far")


class Chance(NamedTuple):
    """Ratios that chance shows, and those that were measured.

    Attributes:
        halves: gate -> `null_ratios` of its own two halves.
        heaps: gate+ -> `null_ratios` of the pair's shuffled trials.
        observed: gate+ -> `times_fewer_trials`.
    """

    halves: dict[str, np.ndarray]
    heaps: dict[str, np.ndarray]
    observed: dict[str, float]

    def either_way(self) -> pd.DataFrame:
        """How often two halves of one gate differ by a factor, whichever of them is ahead."""
        factors = {gate: np.maximum(null, 1 / null) for gate, null in self.halves.items()}
        rows = {f"{r} or more": {gate: f"{(f >= r).mean():.0%}" for gate, f in factors.items()} for r in (2, 3, 5, 10)}
        return pd.DataFrame(rows).T.rename_axis("ratio, one way or the other")

    def twofold(self) -> float:
        """Share of deals in which the halves differ by 2 or more: of the gate in which that is rarest."""
        return min(float((np.maximum(null, 1 / null) >= 2).mean()) for null in self.halves.values())


def chance(of_gate: Mapping[str, Pool], n_resamples: int = 1000, seed: int = 0) -> Chance:
    """Shuffle the trials of each gate, and of each pair."""
    fixed = {"n_resamples": n_resamples, "seed": seed}
    pairs = pairs_in(of_gate)
    return Chance(
        {gate: null_ratios(pool, **fixed) for gate, pool in of_gate.items()},
        {plus: null_ratios(of_gate[gate], of_gate[plus], **fixed) for gate, plus in pairs},
        {plus: times_fewer_trials(of_gate[gate], of_gate[plus]) for gate, plus in pairs},
    )
