"""What the COMET paper claims of COMET-BERT, beside what Results of `comet_bert` say; no number typed but theirs.

The abstract: COMET-based distillation beats MoEBERT (random hash of the token id) on 5 of 7 GLUE tasks and on SQuAD.
The cells of its table could not be read. On one task a "yes" is what 5 of 7 tasks would show, and a "no" refutes
nothing by itself.

The last rows are no claims of the paper. They say what it takes to read the first ones: whether routing is worth
anything beside one small expert for all, and what the student costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lab.experiments.claims import COLUMNS, judge
from moe_lab.experiments.compare import over_seeds, paired_difference
from moe_lab.results import Result

_BASE = "hash"
_PAPER = ("comet", "comet+")
_OURS = ("topk", "dselect_k", "hash+", "topk+")


def _check(results: Sequence[Result]) -> None:
    """ValueError unless the Results differ in gate and seed only, each pair once."""
    over_seeds(results, ["test_score"])
    names = {name for result in results for name in result.config} - {"gate", "seed"}
    differing = sorted(n for n in names if any(r.config.get(n) != results[0].config.get(n) for r in results))
    if differing:
        raise ValueError(f"claims compare gates of one setting; these differ in {', '.join(differing)}: filter them")


def on_what(results: Sequence[Result], *gates: str) -> str:
    """``sst2, minilm, 4 experts, 6000 steps, 3 seeds``: seeds that all ``gates`` were run with."""
    config = results[0].config
    seeds = len(set.intersection(*({r.seed for r in results if r.config["gate"] == gate} for gate in gates)))
    what = f"{config['task']}, {config['model']}, {config['n_experts']} experts, {config['steps']} steps"
    return f"{what}, {seeds} seed{'s' * (seeds > 1)}"


def bert_claims(results: Sequence[Result]) -> pd.DataFrame:
    """One row per comparison that the gates among ``results`` allow; the score is the task's first metric.

    Args:
        results: of `comet_bert`, differing in gate and seed only.

    Returns:
        Columns as in `claims`.

    Raises:
        ValueError: no Results, several settings, or two of one gate and seed.
    """
    _check(results)
    gates = {result.config["gate"] for result in results}
    rows = []

    def compare(gate: str, base: str, text: str) -> None:
        if {gate, base} <= gates:
            gap = paired_difference(results, "test_score", base, gate)
            measured = f"{gate} − {base} {gap} in score"
            rows.append((text, measured, on_what(results, gate, base), judge(gap)))

    for gate in _PAPER:
        compare(gate, _BASE, f"{gate} beats MoEBERT's hash gate on 5 of 7 GLUE tasks (abstract)")
    for gate in _OURS:
        compare(gate, _BASE, f"(not in the abstract) {gate} beats hash")
    for gate in (_BASE, *_PAPER):
        compare(gate, "pruned", f"(not in the paper) {gate} beats one expert for all of the same width")
    rows += _costs(results)
    return pd.DataFrame(rows, columns=COLUMNS)


def _costs(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """What the student has of the teacher's score, FLOPs and time: means over seeds, no verdict."""
    rows = []
    for gate in (_BASE, *_PAPER):
        runs = [result.metrics for result in results if result.config["gate"] == gate]
        if not runs:
            continue
        score = np.mean([run["test_score"] - run["teacher_score"] for run in runs])
        flops = np.mean([run["flops_per_token"] / run["teacher_flops_per_token"] for run in runs])
        times = [np.mean([run[f"speedup_{size}"] for run in runs]) for size in (1, 64)]
        measured = (
            f"score {score:+.4f}, {flops:.0%} of the FLOPs, {times[0]:.2f} times as fast at batch 1, "
            f"{times[1]:.2f} at 64"
        )
        rows.append((f"(what {gate} costs, against its teacher)", measured, on_what(results, gate), "(measured)"))
    return rows
