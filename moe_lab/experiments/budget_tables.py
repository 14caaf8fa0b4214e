"""Tables of a tuning study, in the form in which one reads them: what was searched, what "+" changes, what chance does.

Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe_lab.experiments.claims import percent
from moe_lab.experiments.comet_tuning import pools
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.recorded_studies import tuning_table
from moe_lab.results import Result
from moe_lab.tuning import (
    Interval,
    Pool,
    chance_of,
    difference_interval,
    expected_best,
    loss_behind,
    null_ratios,
    times_fewer_trials,
)

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


def _with_interval(gap: Interval) -> str:
    return f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"


def comparison(of_gate: Mapping[str, Pool]) -> pd.DataFrame:
    """Per pair: difference of expected test losses after 1, 5 and all trials, with intervals; ratio of budgets."""
    rows = {}
    for gate, plus in pairs_in(of_gate):
        n = min(len(of_gate[gate].test), len(of_gate[plus].test))
        row = {}
        for budget in (1, 5, n):
            if budget <= n:
                gap = difference_interval(of_gate[gate], of_gate[plus], budget)
                row[f"after {budget}"] = _with_interval(gap)
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


def first_trials(of_gate: Mapping[str, Pool], count: int) -> dict[str, Pool]:
    """The study as it was after ``count`` trials per gate."""
    return {gate: Pool(*(losses[:count] for losses in pool)) for gate, pool in of_gate.items()}


def stopped(of_gate: Mapping[str, Pool], counts: Sequence[int]) -> pd.DataFrame:
    """What the study would have said, had it been stopped after so many trials per gate."""
    rows: dict[str, dict[int, str]] = {}
    for gate, plus in pairs_in(of_gate):
        for count in counts:
            so_far = first_trials(of_gate, count)
            first, second = so_far[gate], so_far[plus]
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


def _told_apart(gap: Interval) -> str:
    return "lower" if gap.high < 0 else "higher" if gap.low > 0 else "no"


def verdicts(studies: Mapping[str, Mapping[str, Pool]], n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Can "+" be told from chance? By the loss at a fixed budget, and by the ratio of budgets.

    Args:
        studies: label -> gate -> trials.
        n_resamples: of the intervals, and shuffles behind the chances.
        seed: of both.

    Returns:
        A row per pair and study. ``trials`` of the smaller pool. Difference of expected test losses with a 95 %
        interval ``after 5`` trials (or all, if there are fewer) and ``after all``; ``loss told apart``: lower, higher
        or no, by the first of them. ``times fewer trials``; ``as many by chance``: share of shuffled deals with a ratio
        as large; ``ratio told apart``: fewer, more or no, if at most 2.5 % of deals are as far out on that side.
    """
    labels = {pair: [label for label in studies if pair in pairs_in(studies[label])] for pair in PAIRS}
    rows = {}
    for (gate, plus), label in ((pair, label) for pair in PAIRS for label in labels[pair]):
        first, second = studies[label][gate], studies[label][plus]
        n = min(len(first.test), len(second.test))
        early, last = (difference_interval(first, second, b, n_resamples, seed) for b in (min(5, n), n))
        ratio, null = times_fewer_trials(first, second), null_ratios(first, second, n_resamples=n_resamples, seed=seed)
        fewer, more = chance_of(ratio, null), chance_of(1 / ratio, 1 / null)
        rows[f"{plus} − {gate}, {label}"] = {
            "trials": n,
            "after 5": _with_interval(early),
            "loss told apart": _told_apart(early),
            "after all": _with_interval(last),
            "times fewer trials": f"{ratio:.2g}",
            "as many by chance": percent(fewer),
            "ratio told apart": "fewer" if fewer <= 0.025 else "more" if more <= 0.025 else "no",
        }
    return pd.DataFrame(rows).T.rename_axis("test loss")


def trained_again(first: Result, second: Result) -> pd.DataFrame:
    """What two studies say of the same points: same seeds and drawn values, other machine, so other rounding and masks.

    Args:
        first: a study.
        second: another one of the same search space and seed.

    Returns:
        A row per gate: ``pairs`` (trials that finished in both), ``second minus first`` (mean test loss and standard
        error over pairs), ``one trial moves by`` (standard deviation of the difference) and ``points differ by``
        (standard deviation of the test loss over points).

    Raises:
        ValueError: trials of the same number are different points.
    """
    before, after = (pd.DataFrame(study.curves["trials"]) for study in (first, second))
    both = before.merge(after, on=["gate", "trial"], suffixes=("", "_again"))
    if any(row.drawn != row.drawn_again for row in both.itertuples()):
        raise ValueError("trials of the same number are different points: the studies have different plans")
    both = both.dropna(subset=["test_loss", "test_loss_again"])
    both["moved"] = both["test_loss_again"] - both["test_loss"]
    rows = {
        gate: {
            "pairs": len(own),
            "second minus first": f"{own['moved'].mean():+.4f} ± {own['moved'].sem():.4f}",
            "one trial moves by": f"{own['moved'].std():.4f}",
            "points differ by": f"{own['test_loss'].std():.4f}",
        }
        for gate, own in both.groupby("gate", sort=False)
    }
    return pd.DataFrame(rows).T.rename_axis("gate")
