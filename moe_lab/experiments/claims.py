"""What the COMET paper claims about recommenders and tuning, beside what our Results say; no number typed but theirs.

Only claims that could be read in the paper's abstract and introduction (arXiv 2306.02824): the cells of its tables are
not quoted. "Up to" is a maximum over data sets and gates, so a smaller effect does not contradict it; an effect of the
other sign, or none, does not support it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe_lab.experiments.compare import paired_difference
from moe_lab.results import Result
from moe_lab.tuning import Pool, budget_ratio

COLUMNS = ("paper claims", "we measured", "on what", "does it hold?")


class Claim(NamedTuple):
    """A claim of the paper: gate ``better`` against ``other``, at most ``up_to`` per cent, and where it says so."""

    better: str
    other: str
    up_to: float
    source: str


AUC_CLAIMS = (
    Claim("comet+", "hash", 13, "abstract"),
    Claim("comet+", "topk", 13, "abstract"),
    Claim("comet+", "dselect_k", 9, "abstract"),
)
BUDGET_CLAIMS = (Claim("hash+", "hash", 100, "abstract"), Claim("topk+", "topk", 100, "abstract"))

_VERDICTS = {1: "yes, in sign", 0: "inconclusive", -1: "no: the other way round"}


def _on_what(results: Sequence[Result]) -> str:
    config = results[0].config
    seeds = len({result.seed for result in results})
    return f"{config['dataset']}, {config['n_experts']} experts, k = {config['k']}, {seeds} seeds"


def recommender_claims(results: Sequence[Result]) -> pd.DataFrame:
    """The paper's claims on AUC and on collapse, judged by runs that differ in gate and seed only."""
    gates = {result.config["gate"] for result in results}
    rows = []
    for claim in AUC_CLAIMS:
        if not {claim.better, claim.other} <= gates:
            continue
        gap = paired_difference(results, "test_auc", claim.other, claim.better)
        base = np.mean([result.metrics["test_auc"] for result in results if result.config["gate"] == claim.other])
        rows.append(
            (
                f"{claim.better}: AUC up to {claim.up_to:g} % above {claim.other} ({claim.source})",
                f"{gap} = {100 * gap.mean / base:+.1f} %",
                _on_what(results),
                _VERDICTS[gap.sign],
            )
        )
    for gate, paper in (("dselect_k", "DSelect-k: experts collapse in some cases (introduction)"), ("comet", "")):
        used = [result.metrics["used_experts"] for result in results if result.config["gate"] == gate]
        if not used:
            continue
        n_experts = results[0].config["n_experts"]
        measured = f"{gate}: {min(used)} to {max(used)} of {n_experts} experts in use"
        collapsed = max(used) <= n_experts // 2
        verdict = "yes" if collapsed else "sometimes" if min(used) <= n_experts // 2 else "not here"
        rows.append((paper or "(says nothing of COMET's)", measured, _on_what(results), verdict))
    return pd.DataFrame(rows, columns=COLUMNS)


def tuning_claims(pools: dict[str, Pool], on_what: str) -> pd.DataFrame:
    """The paper's claim on tuning budgets: the ratio of budgets at the best loss that both reach, with its interval."""
    rows = []
    for claim in BUDGET_CLAIMS:
        if not {claim.better, claim.other} <= pools.keys():
            continue
        ratio = budget_ratio(pools[claim.other], pools[claim.better])
        largest = min(len(pools[name].test) for name in (claim.better, claim.other))
        sign = 1 if ratio.low > 1 else -1 if ratio.high < 1 else 0
        rows.append(
            (
                f"{claim.better}: up to {claim.up_to:g} times fewer trials than {claim.other} ({claim.source})",
                f"{ratio.value:.2g} times [{ratio.low:.2g}, {ratio.high:.2g}]",
                f"{on_what}, {largest} trials per gate",
                _VERDICTS[sign],
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)
