"""How good is a gate after b trials of random search? (COMET, KDD 2023, section 5: tuning budgets, top 5 %.)

Symbols: N trials in the pool with validation losses v and test losses t; (i) = i-th by validation loss; b budget.

Whoever tunes with a budget of b trials keeps the one with the least *validation* loss and reports its *test* loss. For
b draws from the pool with replacement the winner has rank i or worse if all b draws have:

    P(rank >= i) = ((N - i + 1) / N)^b,    so    P(rank = i) = ((N - i + 1) / N)^b - ((N - i) / N)^b
    E[test loss | b] = sum_i P(rank = i) t_(i)                                              (`expected_best`)

Without replacement C(N - i + 1, b) / C(N, b) stands in place of the power. The authors resample (neither code nor
number of resamples is published); 1,000 resamples estimate that same sum with noise (`bootstrap_best`). Either way
the curve is one of *this pool*: how far another pool of N trials would differ is what the intervals of `budget_ratio`
and `difference_interval` are about, and what two pools show when nothing differs is what `null_ratios` is about.

"Times fewer trials" (`times_fewer_trials`) divides the budgets at which two curves reach one loss. Two relatives say
what it is worth: `race_chance` (exact, for any distribution of losses) and `loss_behind` (ratio -> difference of
losses).

Trials are drawn by Optuna's RandomSampler (`draw_trials`). Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
        """From two sequences; a diverged trial (NaN) ranks last and counts as bad as the worst that finished.

        Any number instead of NaN is a choice. This one keeps expectations finite and flatters a gate that diverges.

        Raises:
            ValueError: empty, unequal lengths, a NaN test loss beside a finite validation loss, or nothing finished.
        """
        valid, test = np.asarray(valid, float), np.asarray(test, float)
        if valid.shape != test.shape or valid.ndim != 1 or len(valid) == 0:
            raise ValueError(f"need two equally long lists of losses, got shapes {valid.shape} and {test.shape}")
        if np.isnan(test[~np.isnan(valid)]).any():
            raise ValueError("a trial has a validation loss but no test loss")
        diverged = np.isnan(valid)
        if diverged.all():
            raise ValueError(
                "all trials diverged: there is nothing to choose from; look at the range of learning rates"
            )
        return cls(np.where(diverged, np.inf, valid), np.where(diverged, test[~diverged].max(), test))

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


def rank_probabilities(n: int, budget: float, replacement: bool = True) -> np.ndarray:
    """(n,) probability that the best of ``budget`` draws from n ranked trials has rank 1, 2, ... n; sums to 1.

    With replacement the budget need not be whole: the power interpolates.
    """
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


def expected_best(pool: Pool, budgets: Sequence[float], replacement: bool = True) -> np.ndarray:
    """(len(budgets),) exact expected test loss of the trial chosen by validation loss among b draws."""
    ranked = pool.ranked_test
    return np.array([float(rank_probabilities(len(ranked), b, replacement) @ ranked) for b in budgets])


@lru_cache(maxsize=64)
def _all_budgets(n: int, largest: int) -> np.ndarray:
    return np.stack([rank_probabilities(n, budget) for budget in range(1, largest + 1)])


def _curve(pool: Pool, largest: int) -> np.ndarray:
    """`expected_best` for budgets 1 .. largest, quickly: resampling asks for thousands of curves of one size."""
    return _all_budgets(len(pool.test), largest) @ pool.ranked_test


def selection_curves(pool: Pool, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three losses after 1 .. ``largest`` trials, (largest,) each: only the second is what was promised.

    Returns:
        Validation loss of the trial with the least validation loss (optimistic: it was chosen for that number), its
        test loss, and the least test loss (peeking: chosen *and* reported on the test rows).
    """
    finished = np.where(np.isfinite(pool.valid), pool.valid, pool.valid[np.isfinite(pool.valid)].max())
    chosen, honest, peeked = Pool(pool.valid, finished), pool, Pool(pool.test, pool.test)
    return _curve(chosen, largest), _curve(honest, largest), _curve(peeked, largest)


def bootstrap_best(pool: Pool, budgets: Sequence[int], n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(n_resamples, len(budgets)) test losses of the winner among b trials drawn with replacement, by brute force."""
    rng = np.random.default_rng(seed)
    ranked = pool.ranked_test
    draws = [rng.integers(len(ranked), size=(n_resamples, budget)).min(1) for budget in budgets]
    return ranked[np.stack(draws, 1)]


def trials_needed(pool: Pool, target: float, largest: int) -> int | None:
    """Smallest budget up to ``largest`` whose expected test loss is at most ``target``; None if none is."""
    reached = np.flatnonzero(_curve(pool, largest) <= target)
    return int(reached[0]) + 1 if len(reached) else None


def times_fewer_trials(gate: Pool, plus: Pool) -> float:
    """How many times fewer trials gate+ needs than the gate, at the best loss that both reach (below 1: more trials).

    Both get as many trials as the smaller pool holds, B. The target is the worse of the two expected losses at B; the
    ratio is budget of the gate over budget of gate+ at that target. It cannot exceed B: "100 times fewer" cannot be
    seen with fewer than 100 trials.
    """
    largest = min(len(gate.test), len(plus.test))
    curves = [_curve(pool, largest) for pool in (gate, plus)]
    target = max(curve[-1] for curve in curves)
    needed = [np.argmax(curve <= target) + 1 for curve in curves]  # argmax: the first that is True
    return float(needed[0] / needed[1])


def loss_behind(gate: Pool, ratio: float) -> float:
    """The difference of losses that makes ``ratio`` times fewer trials: E[loss | N / ratio] - E[loss | N].

    Exact where the curve of gate+ is the gate's, moved down by a constant. What looks like a large ratio is a small
    difference wherever the curve is flat.

    Raises:
        ValueError: ratio below 1 or above N, where the pool knows nothing.
    """
    n = len(gate.test)
    if not 1 <= ratio <= n:
        raise ValueError(f"a pool of {n} trials knows ratios from 1 to {n}, got {ratio}")
    return float(np.diff(expected_best(gate, [n, n / ratio]))[0])


def race_chance(ratio: float, n: int) -> float:
    """P(gate+ meets the best loss of n trials of the gate after n / ratio trials or fewer) if nothing differs.

    The n trials of the gate and the first m = floor(n / ratio) of gate+ are n + m draws from one distribution, and the
    best of them is equally likely to be any of them: m / (n + m), about 1 / (1 + ratio). No assumption on the
    distribution of losses but that there are no ties.
    """
    if ratio <= 0:
        raise ValueError(f"ratio must be positive, got {ratio}")
    m = int(n / ratio + 1e-9)
    return m / (n + m)


def null_ratios(*pools: Pool, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(n_resamples,) values of `times_fewer_trials` when nothing differs: trials shuffled, dealt into two pools.

    One pool is dealt into two halves (of an odd number one trial is left out): what a gate has ahead of itself. Two
    pools go into one heap and are dealt into two of their sizes: the permutation distribution. If the names on the
    trials do not matter, each deal is as likely as the one that happened, see `chance_of`.
    """
    if not 1 <= len(pools) <= 2:
        raise ValueError(f"give one pool, to be halved, or the two that are compared; got {len(pools)}")
    heap = Pool(*(np.concatenate(column) for column in zip(*pools, strict=True)))
    first, second = (len(pool.test) for pool in pools) if len(pools) == 2 else [len(heap.test) // 2] * 2
    if min(first, second) < 1:
        raise ValueError("one trial cannot be dealt into two pools")
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(n_resamples):
        dealt = rng.permutation(len(heap.test))
        hands = dealt[:first], dealt[first : first + second]
        ratios.append(times_fewer_trials(*(Pool(heap.valid[hand], heap.test[hand]) for hand in hands)))
    return np.array(ratios)


def chance_of(ratio: float, null: np.ndarray) -> float:
    """Share of ``null`` that is at least ``ratio``, which counts as one of them: a p-value, never 0."""
    return float((1 + (null >= ratio).sum()) / (1 + len(null)))


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
