"""What the COMET paper claims, what Results of the vision experiment say about it, and whether it holds there.

Only claims that we could verify are here: the abstract and the supplement's text were readable, the tables of image
test losses were not (the supplement prints "Tables ??"), so no number of the paper stands beside ours. The abstract's
percentages are maxima over data sets and of AUC; images have accuracy and cross entropy.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from moe_lab.results import Result


def select(results: Iterable[Result], gate: str, *, center_pixels: bool = False, **config: object) -> list[Result]:
    """Results of one gate, on raw pixels unless said otherwise, one per seed, sorted by seed.

    Where a gate was run with several settings (gamma, entropy weight) and ``config`` does not decide, the setting that
    most seeds share is taken; among equals the one with the lowest mean *validation* loss.
    """
    wanted = {"gate": gate, "center_pixels": center_pixels, **config}
    settings: dict[str, list[Result]] = {}
    for result in results:
        if all(result.config[name] == value for name, value in wanted.items()):
            setting = repr(sorted((name, repr(value)) for name, value in result.config.items() if name != "seed"))
            settings.setdefault(setting, []).append(result)
    if not settings:
        return []
    best = min(settings.values(), key=lambda runs: (-len(runs), mean(runs, "valid_loss")))
    return sorted(best, key=lambda result: result.seed or 0)


def mean(results: Sequence[Result], metric: str) -> float:
    """Mean of a metric."""
    return statistics.fmean(result.metrics[metric] for result in results)


def spread(results: Sequence[Result], metric: str) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(result.metrics[metric] for result in results) if len(results) > 1 else 0.0


def paired_difference(first: Sequence[Result], second: Sequence[Result], metric: str) -> tuple[float, float, int]:
    """Mean of first - second over the seeds that both have, its standard error, and their number.

    Raises:
        ValueError: no seed in common.
    """
    other = {result.seed: result.metrics[metric] for result in second}
    differences = [result.metrics[metric] - other[result.seed] for result in first if result.seed in other]
    if not differences:
        raise ValueError("no seed in common, nothing to pair")
    n = len(differences)
    error = statistics.stdev(differences) / n**0.5 if n > 1 else float("inf")
    return statistics.fmean(differences), error, n


def verdict(difference: float, error: float, n: int) -> str:
    """ "yes" or "no" where the mean is more than two standard errors from 0 (at least 3 seeds), else "open"."""
    if n < 3:
        return f"open ({n} seed{'s' if n > 1 else ''})"
    if abs(difference) <= 2 * error:
        return "open"
    return "yes" if difference > 0 else "no"


def claims(results: Sequence[Result]) -> list[dict[str, str]]:
    """Rows "paper claims | we measured | on what | does it hold?" of the gates that are there.

    Raises:
        ValueError: Results of several data sets.
    """
    data = {result.config["dataset"] for result in results}
    if len(data) != 1:
        raise ValueError(f"claims are about one data set, got {sorted(data) or 'none'}")
    where = data.pop()
    gates = {gate: select(results, gate) for gate in ("hash", "topk", "dselect_k", "comet", "comet+")}
    rows = []

    def add(claim: str, measured: str, n: int, holds: str) -> None:
        seeds = f"{n} seed{'s' if n > 1 else ''}"
        rows.append({"paper claims": claim, "we measured": measured, "on what": f"{where}, {seeds}", "holds?": holds})

    for gate, gain in (("hash", "13 %"), ("topk", "13 %"), ("dselect_k", "9 %")):
        if gates["comet+"] and gates[gate]:
            difference, error, n = paired_difference(gates["comet+"], gates[gate], "test_accuracy")
            measured = (
                f"accuracy {100 * difference:+.1f} ± {100 * error:.1f} points"
                if n > 1
                else (f"accuracy {100 * difference:+.1f} points")
            )
            claim = f"COMET+ beats {gate} (AUC, up to {gain}, over all data sets)"
            add(claim, measured, n, verdict(difference, error, n))
    for gate in ("comet", "comet+", "dselect_k"):
        if gates[gate]:
            runs = gates[gate]
            within = min(result.metrics["within_k"] for result in runs)
            measured = f"{100 * within:.1f} % of images (worst seed and task)"
            add(f"{gate}: at most k experts once trained", measured, len(runs), "yes" if within >= 0.99 else "no")
    if gates["dselect_k"]:
        runs = gates["dselect_k"]
        used, n_experts = mean(runs, "used_experts"), runs[0].config["n_experts"]
        measured = f"{used:.1f} of {n_experts} experts in use"
        add("DSelect-k: experts collapse in some cases", measured, len(runs), "yes" if used < n_experts / 2 else "no")
    if gates["comet"]:
        runs = gates["comet"]
        used, n_experts = mean(runs, "used_experts"), runs[0].config["n_experts"]
        measured = f"{used:.1f} of {n_experts} experts in use"
        add(
            "(COMET, which the paper sets against it)",
            measured,
            len(runs),
            "the same" if used < n_experts / 2 else "no",
        )
    return rows
