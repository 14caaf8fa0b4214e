"""What the COMET paper claims, judged by Results of the vision experiment; and how to choose among settings.

The tables of image test losses could not be read (the supplement prints "Tables ??"), so no number of the paper stands
beside ours. The abstract's percentages are maxima over data sets and of AUC; images have accuracy and cross entropy.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import pandas as pd

from moe_lab.experiments.claims import AUC_CLAIMS, COLUMNS, collapse_claims, judge, on_what
from moe_lab.experiments.compare import paired_difference
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


def vision_claims(results: Sequence[Result]) -> pd.DataFrame:
    """The paper's claims that the gates among ``results`` can say something about; columns as in `claims`.

    Raises:
        ValueError: Results of several data sets.
    """
    data = {result.config["dataset"] for result in results}
    if len(data) != 1:
        raise ValueError(f"claims are about one data set, got {sorted(data) or 'none'}")
    gates = {gate: select(results, gate) for gate in ("hash", "topk", "dselect_k", "comet", "comet+")}
    rows = []
    for claim in AUC_CLAIMS:
        pair = [*gates[claim.other], *gates[claim.better]]
        if gates[claim.other] and gates[claim.better]:
            gap = paired_difference(pair, "test_accuracy", claim.other, claim.better)
            text = f"{claim.better} beats {claim.other} (AUC, up to {claim.up_to:g} %; {claim.source})"
            rows.append((text, f"accuracy {gap}", on_what(pair), judge(gap)))
    for gate in ("comet", "comet+", "dselect_k"):
        if gates[gate]:
            within = min(result.metrics["within_k"] for result in gates[gate])
            measured = f"{100 * within:.1f} % of images (worst seed and task)"
            text = f"{gate}: at most k experts once trained"
            rows.append((text, measured, on_what(gates[gate]), "yes" if within >= 0.99 else "no"))
    rows += collapse_claims([*gates["dselect_k"], *gates["comet"]])
    return pd.DataFrame(rows, columns=COLUMNS)
