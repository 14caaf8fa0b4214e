"""Several Results in one table: mean and spread over seeds, and differences between gates seed by seed.

Two gates of one seed share data, batches and all initial weights but their own, so their *difference*
spreads less than either. The interval resamples the seeds; with three of them it hardly says more than "smallest to
largest difference", so treat it as a warning against reading too much, not as a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe_lab.results import Result, to_frame


def over_seeds(results: Iterable[Result], metrics: Sequence[str], by: Sequence[str] = ("gate",)) -> pd.DataFrame:
    """Mean, standard deviation (nan for one seed) and number of seeds.

    Args:
        results: finished ones.
        metrics: names of metrics (dots into nested ones).
        by: config fields that make a row; rows keep the order in which they first occur.

    Returns:
        index ``by``, columns (metric, "mean" | "std" | "count").

    Raises:
        ValueError: no Result, or two with the same setting and seed, which would count one seed twice.
    """
    frame = to_frame(results)
    if frame.empty:
        raise ValueError("no Results to compare")
    if frame.duplicated([*by, "seed"]).any():
        raise ValueError(
            f"several Results per seed and {', '.join(by)}: filter them, or add the differing field to `by`"
        )
    return frame.groupby(list(by), sort=False)[list(metrics)].agg(["mean", "std", "count"])


def readable(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """`over_seeds` as text: ``0.441 ± 0.002``, and the number of seeds in a column of its own."""
    text = pd.DataFrame(index=table.index)
    metrics = list(dict.fromkeys(table.columns.get_level_values(0)))
    for metric in metrics:
        mean, spread = table[metric, "mean"], table[metric, "std"]
        text[metric] = [
            f"{m:.{digits}f}" + ("" if np.isnan(s) else f" ± {s:.{digits}f}") for m, s in zip(mean, spread, strict=True)
        ]
    text["seeds"] = table[metrics[0], "count"].astype(str)
    return text


def scores(
    results: Sequence[Result],
    metrics: Sequence[str],
    *,
    one_expert: Sequence[Result] = (),
    floor: Mapping[str, float] | None = None,
    digits: int = 3,
) -> pd.DataFrame:
    """The table that belongs under every comparison of gates: what needs no gate on top, then a row per gate, as text.

    Args:
        results: one per gate and seed.
        metrics: columns.
        one_expert: runs with a single expert and nothing to route.
        floor: metric -> what is reached without any network (a constant, a count); other cells of that row are empty.
        digits: after the point.
    """
    parts = []
    if floor:
        values = {name: f"{value:.{digits}f}" for name, value in floor.items()}
        parts.append(pd.DataFrame(values, index=["(no network)"]))
    if one_expert:
        parts.append(readable(over_seeds(one_expert, metrics), digits).set_axis(["(one expert)"]))
    parts.append(readable(over_seeds(results, metrics), digits))
    return pd.concat(parts)[[*metrics, "seeds"]].fillna("").rename_axis("gate")


class Difference(NamedTuple):
    """Mean over seeds of second minus first, and a 95 % interval: of resampled seeds, or of `student_interval`."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval leaves out 0 and there are at least three seeds, else 0: inconclusive."""
        return 0 if self.seeds < 3 or self.low <= 0 <= self.high else int(np.sign(self.mean))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_difference(values: Sequence[float], n_resamples: int = 2000) -> Difference:
    """Of differences, one per seed.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("no difference to average")
    found = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).choice(found, (n_resamples, len(found))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Difference(float(found.mean()), float(low), float(high), len(found))


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of Student for the mean of a few independent values.

    Resampling cannot leave the values that are there; of three it makes an interval that is too short. This one assumes
    a normal distribution instead: for three values it is the mean ± 4.3 standard errors.

    Raises:
        ValueError: fewer than two values.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        raise ValueError(f"one value has no spread; got {len(found)}")
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)


def paired_difference(
    results: Iterable[Result], metric: str, first: str, second: str, n_resamples: int = 2000
) -> Difference:
    """``metric`` of gate ``second`` minus that of gate ``first``, seed by seed.

    Raises:
        ValueError: no seed has both gates.
    """
    frame = to_frame(results)
    values = frame[frame.gate.isin([first, second])].pivot(index="seed", columns="gate", values=metric)
    if not {first, second} <= set(values.columns):
        raise ValueError(f"no Results of both {first!r} and {second!r}; there are {', '.join(sorted(set(frame.gate)))}")
    difference = (values[second] - values[first]).dropna().to_numpy()
    if len(difference) == 0:
        raise ValueError(f"no seed was run with both {first!r} and {second!r}")
    return mean_difference(difference, n_resamples)


def markdown(table: pd.DataFrame) -> str:
    """A table of Markdown; the index is its first column if it has a name, else left out."""
    header = [name for name in (table.index.name, *table.columns) if name]
    rows = table.reset_index().values if table.index.name else table.values
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
