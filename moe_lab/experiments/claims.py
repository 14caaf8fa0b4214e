"""What the COMET paper claims, beside what our Results say; no number typed but theirs.

Only claims that could be read in the paper's abstract and introduction (arXiv 2306.02824): the cells of its tables are
not quoted. "Up to" is a maximum over data sets and gates, so a smaller effect does not contradict it; an effect of the
other sign, or none, does not support it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe_lab.experiments.compare import Difference, paired_difference
from moe_lab.results import Result
from moe_lab.tuning import Pool, budget_ratio, chance_of, null_ratios

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


def judge(gap: Difference) -> str:
    """Does a difference that the paper says is positive hold? Inconclusive with fewer than three seeds."""
    few = f" ({gap.seeds} seed{'s' if gap.seeds > 1 else ''})" if gap.seeds < 3 else ""
    return _VERDICTS[gap.sign] + few


def on_what(results: Sequence[Result]) -> str:
    """``ml-100k, 8 experts, k = 2, 5 seeds``."""
    config = results[0].config
    seeds = len({result.seed for result in results})
    return f"{config['dataset']}, {config['n_experts']} experts, k = {config['k']}, {seeds} seed{'s' * (seeds > 1)}"


def collapse_claims(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Rows on experts in use: what the paper says of DSelect-k, and COMET, which it sets against it."""
    rows = []
    for gate, paper in (("dselect_k", "DSelect-k: experts collapse in some cases (introduction)"), ("comet", "")):
        runs = [result for result in results if result.config["gate"] == gate]
        if not runs:
            continue
        used, n_experts = [result.metrics["used_experts"] for result in runs], runs[0].config["n_experts"]
        between = f"{min(used)} to {max(used)}" if min(used) < max(used) else f"{max(used)}"
        measured = f"{gate}: {between} of {n_experts} experts in use"
        collapsed = max(used) <= n_experts // 2
        verdict = "yes" if collapsed else "sometimes" if min(used) <= n_experts // 2 else "not here"
        rows.append((paper or "(says nothing of COMET's)", measured, on_what(runs), verdict))
    return rows


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
                on_what(results),
                judge(gap),
            )
        )
    return pd.DataFrame(rows + collapse_claims(results), columns=COLUMNS)


def tuning_claims(pools: dict[str, Pool], on_what: str) -> pd.DataFrame:
    """The paper's claim on tuning budgets: the ratio at the best loss that both reach, beside what chance does.

    The interval resamples the trials. The verdict is that of a permutation test (`null_ratios`): the ratio counts if
    shuffled trials show one as large in at most 2.5 % of deals.
    """
    rows = []
    for claim in BUDGET_CLAIMS:
        if not {claim.better, claim.other} <= pools.keys():
            continue
        gate, plus = pools[claim.other], pools[claim.better]
        ratio, null = budget_ratio(gate, plus), null_ratios(gate, plus)
        largest = min(len(gate.test), len(plus.test))
        chance, other_way = chance_of(ratio.value, null), chance_of(1 / ratio.value, 1 / null)
        sign = 1 if chance <= 0.025 else -1 if other_way <= 0.025 else 0
        at_least = "at least " if ratio.value >= largest else ""
        rows.append(
            (
                f"{claim.better}: up to {claim.up_to:g} times fewer trials than {claim.other} ({claim.source})",
                f"{at_least}{_times(ratio.value)} times [{_times(ratio.low)}, {_times(ratio.high)}]; "
                f"as many by chance: {percent(chance)}",
                f"{on_what}, {largest} trials per gate",
                _VERDICTS[sign],
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def percent(share: float) -> str:
    """``6.7 %``: two digits, three for 100."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
