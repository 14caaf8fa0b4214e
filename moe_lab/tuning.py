"""How good is a gate after b trials of random search? (COMET, KDD 2023, section 5: tuning budgets, top 5 %.)

Symbols: N trials in the pool with validation losses v and test losses t; (i) = i-th by validation loss; b budget.

Whoever tunes with a budget of b trials keeps the one with the least *validation* loss and reports its *test* loss. For
b draws from the pool with replacement the winner has rank i or worse if all b draws have:

    P(rank >= i) = ((N - i + 1) / N)^b,    so    P(rank = i) = ((N - i + 1) / N)^b - ((N - i) / N)^b
    E[test loss | b] = sum_i P(rank = i) t_(i)                                              (`expected_best`)

Without replacement C(N - i + 1, b) / C(N, b) stands in place of the power. The authors resample (neither code nor
number of resamples is published); 1,000 resamples estimate that same sum with noise (`bootstrap_best`). Either way
the curve is one of *this pool*: how far another pool of N trials would differ is what the intervals of `budget_ratio`
and `difference_interval` are about.

Trials are drawn by Optuna's RandomSampler (`draw_trials`). Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln

from moe_lab.search_spaces import Choice, Space


def draw_trials(space: Space, n_trials: int, seed: int) -> list[dict[str, Any]]:
    """``n_trials`` points of the space, independent of each other; the first n of a longer list are the same.

    Args:
        space: name -> `LogUniform` or `Choice`.
        n_trials: at least 1.
        seed: of the sampler.
    """
    import optuna

    if n_trials < 1:
        raise ValueError(f"n_trials must be at least 1, got {n_trials}")
    distributions = {
        name: optuna.distributions.CategoricalDistribution(values.values)
        if isinstance(values, Choice)
        else optuna.distributions.FloatDistribution(values.low, values.high, log=True)
        for name, values in space.items()
    }
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        return [dict(study.ask(distributions).params) for _ in range(n_trials)]
    finally:
        optuna.logging.set_verbosity(verbosity)


class Pool(NamedTuple):
    """Losses of N finished trials, (N,) each, same order."""

    valid: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, valid: Sequence[float], test: Sequence[float]) -> Pool:
        """From two sequences; a diverged trial (NaN) ranks last.

        Raises:
            ValueError: empty, unequal lengths, or a NaN test loss beside a finite validation loss.
        """
        valid, test = np.asarray(valid, float), np.asarray(test, float)
        if valid.shape != test.shape or valid.ndim != 1 or len(valid) == 0:
            raise ValueError(f"need two equally long lists of losses, got shapes {valid.shape} and {test.shape}")
        if np.isnan(test[~np.isnan(valid)]).any():
            raise ValueError("a trial has a validation loss but no test loss")
        return cls(np.where(np.isnan(valid), np.inf, valid), test)

    @property
    def ranked_test(self) -> np.ndarray:
        """Test losses in the order of validation losses; equal ones in order of the trials."""
        return self.test[np.argsort(self.valid, kind="stable")]

    def resample(self, rng: np.random.Generator) -> Pool:
        """As many trials, drawn with replacement: another pool that might have been."""
        index = rng.integers(len(self.valid), size=len(self.valid))
        return Pool(self.valid[index], self.test[index])


class TopShare(NamedTuple):
    """Mean and standard error (nan for one trial) of the test losses of the ``n`` best trials."""

    mean: float
    standard_error: float
    n: int


def top_share(pool: Pool, share: float = 0.05) -> TopShare:
    """The paper's table entry: the best 5 % by validation loss (25 of 500), mean and standard error of their test loss.

    At least one trial; 5 % of 30 trials is 2.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    n = max(1, round(share * len(pool.test)))
    best = pool.ranked_test[:n]
    error = float(best.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return TopShare(float(best.mean()), error, n)


def rank_probabilities(n: int, budget: int, replacement: bool = True) -> np.ndarray:
    """(n,) probability that the best of ``budget`` draws from n ranked trials has rank 1, 2, ... n; sums to 1."""
    if budget < 1 or (budget > n and not replacement):
        raise ValueError(f"budget must be at least 1, and at most {n} without replacement; got {budget}")
    left = np.arange(n, -1, -1, dtype=float)  # trials of rank i or worse, i = 1 .. n + 1
    if replacement:
        tail = (left / n) ** budget
    else:
        possible = left >= budget
        few = np.where(possible, left, budget)
        log_ratio = gammaln(few + 1) - gammaln(few - budget + 1) - gammaln(n + 1) + gammaln(n - budget + 1)
        tail = np.where(possible, np.exp(log_ratio), 0.0)
    return tail[:-1] - tail[1:]


def expected_best(pool: Pool, budgets: Sequence[int], replacement: bool = True) -> np.ndarray:
    """(len(budgets),) exact expected test loss of the trial chosen by validation loss among b draws."""
    ranked = pool.ranked_test
    curve = []
    for budget in budgets:
        probability = rank_probabilities(len(ranked), budget, replacement)
        curve.append(float(probability[probability > 0] @ ranked[probability > 0]))
    return np.array(curve)


def bootstrap_best(pool: Pool, budgets: Sequence[int], n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(n_resamples, len(budgets)) test losses of the winner among b trials drawn with replacement, by brute force."""
    rng = np.random.default_rng(seed)
    ranked = pool.ranked_test
    draws = [rng.integers(len(ranked), size=(n_resamples, budget)).min(1) for budget in budgets]
    return ranked[np.stack(draws, 1)]


def trials_needed(pool: Pool, target: float, largest: int) -> int | None:
    """Smallest budget up to ``largest`` whose expected test loss is at most ``target``; None if none is."""
    reached = np.flatnonzero(expected_best(pool, range(1, largest + 1)) <= target)
    return int(reached[0]) + 1 if len(reached) else None


def times_fewer_trials(gate: Pool, plus: Pool) -> float:
    """How many times fewer trials gate+ needs than the gate, at the best loss that both reach (below 1: more trials).

    Both get as many trials as the smaller pool holds, B. The target is the worse of the two expected losses at B; the
    ratio is budget of the gate over budget of gate+ at that target. It cannot exceed B: "100 times fewer" cannot be
    seen with fewer than 100 trials.
    """
    largest = min(len(gate.test), len(plus.test))
    target = max(float(expected_best(pool, [largest])[0]) for pool in (gate, plus))
    needed = [trials_needed(pool, target, largest) for pool in (gate, plus)]
    return needed[0] / needed[1]


class Interval(NamedTuple):
    """Estimate and the 2.5 % and 97.5 % quantiles over resampled pools."""

    value: float
    low: float
    high: float


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def budget_ratio(gate: Pool, plus: Pool, n_resamples: int = 300, seed: int = 0) -> Interval:
    """`times_fewer_trials` with an interval from resampling the trials of both pools."""
    rng = np.random.default_rng(seed)
    resampled = [times_fewer_trials(gate.resample(rng), plus.resample(rng)) for _ in range(n_resamples)]
    return _interval(times_fewer_trials(gate, plus), resampled)


def difference_interval(gate: Pool, plus: Pool, budget: int, n_resamples: int = 1000, seed: int = 0) -> Interval:
    """Expected test loss of gate+ minus that of the gate after ``budget`` trials each (negative: "+" is better)."""
    rng = np.random.default_rng(seed)

    def difference(a: Pool, b: Pool) -> float:
        return float(expected_best(b, [budget])[0] - expected_best(a, [budget])[0])

    resampled = [difference(gate.resample(rng), plus.resample(rng)) for _ in range(n_resamples)]
    return _interval(difference(gate, plus), resampled)
