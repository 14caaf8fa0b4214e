"""What the JEI-DNN paper claims, beside what our Results say; no number typed but the authors'.

The body of the paper could not be read. Sources: the abstract (arXiv 2310.09163), the public reviews, and result files
that the authors once committed to their repository ("recorded files"; last read at revision 401b227), from which the
differences below were computed. Those files score the baselines on half of the test images, count one token per image,
and compute the calibration error per batch for one side and after a second softmax for the other.

A comparison is at equal cost: `jei_score.gain`, mean over the prices of a run, then over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.experiments.claims import COLUMNS, judge
from moe_lab.experiments.compare import Difference, mean_difference
from moe_lab.experiments.jei_score import gain
from moe_lab.results import Result

_FILES = "recorded files, CIFAR-10, T2T-ViT-7"
_GAINS = {
    "geometric": f"learned gates beat geometric thresholds at equal cost: -0.2 to +3.3 points ({_FILES})",
    "geometric_port": "... whose shares end before the last exit, as in those files",
    "constant": "... on modules trained at a constant rate (ours: on a mean over exits)",
    "boosted": f"... BoostedNet: +0.3 to +3.6 points ({_FILES})",
    "weighted": f"... L2W-DEN: +0.1 to +3.1 points ({_FILES})",
    "shared": "... and one threshold for all exits (not among its baselines)",
}
_FREE = ("seed", "data_seed")


def settings(results: Iterable[Result], free: Sequence[str] = _FREE) -> list[list[Result]]:
    """Results grouped by everything in their config but ``free``; groups in the order in which they first occur."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = repr(sorted((name, value) for name, value in result.config.items() if name not in free))
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def on_what(results: Sequence[Result]) -> str:
    """``CIFAR-10 (JPEG), t2t_7, 3 seeds``."""
    first, seeds = results[0], len({result.seed for result in results})
    title = first.metrics.get("title", first.config["dataset"])
    body = first.config.get("body", "vit") + (" (ImageNet weights)" if first.config.get("pretrained") else "")
    return f"{title}, {body}, {seeds} seed{'s' * (seeds > 1)}"


def points_of(result: Result) -> pd.DataFrame:
    """The curve ``points`` as a table."""
    return pd.DataFrame(result.curves["points"])


def difference(
    results: Sequence[Result], baseline: str, column: str, *, priced_only: bool = False, **options: Any
) -> Difference | None:
    """JEI-DNN minus a baseline in a column of ``points`` at equal cost, seed by seed; None where costs never meet.

    Args:
        results: of one setting.
        baseline, column, options: see `jei_score.gain`.
        priced_only: leave out lambda = 0, whose gates leave earlier than asked (notebook 12): a dearer point that is no
            more accurate than the next one.
    """
    tables = [points_of(result) for result in results]
    if priced_only:
        tables = [table[(table.method != "jei_dnn") | (table.setting > 0)] for table in tables]
    found = [gain(table, baseline, column, **options) for table in tables]
    known = [value for value in found if value is not None]
    return mean_difference(known) if known else None


def _points(gap: Difference) -> str:
    return f"{100 * gap.mean:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _opposite(gap: Difference) -> Difference:
    """For claims that something is smaller."""
    return Difference(-gap.mean, -gap.high, -gap.low, gap.seeds)


def accuracy_claims(results: Sequence[Result]) -> pd.DataFrame:
    """Rows on accuracy at equal cost, from runs of one setting."""
    rows = []
    for baseline, claim in _GAINS.items():
        gap = difference(results, baseline, "accuracy")
        if gap is not None:
            rows.append((claim, _points(gap), on_what(results), judge(gap)))
    gap = difference(results, "geometric", "accuracy", priced_only=True)
    if gap is not None:
        says = "... geometric thresholds again, without the price 0"
        rows.insert(1, (says, _points(gap), on_what(results), judge(gap)))
    gap = difference(results, "oracle_cheapest", "accuracy")
    if gap is not None:
        says = "how far from gates that know the labels (not in the paper)"
        rows.append((says, _points(gap), on_what(results), "a gap remains" if gap.sign < 0 else judge(gap)))
    return pd.DataFrame(rows, columns=COLUMNS)


def control_claims(results: Sequence[Result]) -> pd.DataFrame:
    """A row on the control that the authors' gain was measured against, from runs with ``warmup_loss="sum"``."""
    gaps = [result.metrics["gain_over_constant"] for result in results]
    gaps = [gap for gap in gaps if gap is not None]
    if not gaps:
        return pd.DataFrame(columns=COLUMNS)
    gap = mean_difference(gaps)
    claim = f"... on modules that warm up to the end on a sum at a constant rate, as that control did ({_FILES})"
    return pd.DataFrame([(claim, _points(gap), on_what(results), judge(gap))], columns=COLUMNS)


def uncertainty_claims(results: Sequence[Result]) -> pd.DataFrame:
    """Rows on calibration and prediction sets, from runs of one setting."""
    rows, where = [], on_what(results)
    for column, claim in (
        ("ece", "better calibrated than thresholds (abstract; geometric shares, ECE of the whole test set)"),
        ("ece_artefact", "... computed as in the recorded files: per batch against softmax twice"),
    ):
        gap = _ece_gap(results) if column == "ece_artefact" else difference(results, "geometric", column)
        if gap is not None:
            rows.append((claim, f"ECE {_points(gap)}", where, judge(_opposite(gap))))
    gap = difference(results, "geometric", "set_size")
    if gap is not None:
        shown = f"{gap.mean:+.2f} classes [{gap.low:+.2f}, {gap.high:+.2f}]"
        rows.append(("smaller prediction sets (reviews; 95 %, geometric shares)", shown, where, judge(_opposite(gap))))
    alpha = results[0].config["alpha"]
    coverage = [
        float(points[points.method == "jei_dnn"].coverage.mean())
        for points in (points_of(result) for result in results)
    ]
    off = max(abs(value - (1 - alpha)) for value in coverage)
    shown = f"{100 * np.mean(coverage):.1f} % [{100 * min(coverage):.1f}, {100 * max(coverage):.1f}]"
    verdict = "yes" if off <= 0.015 else "no"
    rows.append(
        (f"sets cover {100 * (1 - alpha):g} % (conformal prediction; within 1.5 points)", shown, where, verdict)
    )
    return pd.DataFrame(rows, columns=COLUMNS)


def _ece_gap(results: Sequence[Result]) -> Difference | None:
    """ECE per batch of JEI-DNN minus ECE of the geometric thresholds' probabilities after a second softmax."""
    found = []
    for result in results:
        points = points_of(result)
        mine = points.method == "jei_dnn"
        points["mixed"] = np.where(mine, points.ece_per_batch, points.ece_double_softmax)
        value = gain(points, "geometric", "mixed")
        found += [] if value is None else [value]
    return mean_difference(found) if found else None


def joint_claims(results: Sequence[Result], modes: Sequence[str] = ("detached", "expected", "single")) -> pd.DataFrame:
    """Is it better to train classifiers on the samples that reach them? Other modes minus "released", seed by seed.

    Args:
        results: runs that differ in mode and seed only; "released" among them. A mode that was not run has no row.
        modes: whose classifiers do depend on the gates.
    """
    rows = []
    by_mode = {mode: {r.seed: r for r in results if r.config["mode"] == mode} for mode in ("released", *modes)}
    for mode in modes:
        gaps = []
        for seed in by_mode["released"].keys() & by_mode[mode].keys():
            # The separately trained modules are the same in both runs, so the difference is that of the modes.
            pair = [gain(points_of(by_mode[name][seed]), "shared") for name in (mode, "released")]
            gaps += [] if None in pair else [pair[0] - pair[1]]
        if gaps:
            gap = mean_difference(gaps)
            claim = f"classifiers trained for the samples that reach them are better (abstract); mode {mode}"
            where = on_what([by_mode[mode][seed] for seed in by_mode["released"].keys() & by_mode[mode].keys()])
            rows.append((claim, _points(gap), where, judge(gap)))
    return pd.DataFrame(rows, columns=COLUMNS)
