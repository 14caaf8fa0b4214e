"""What the COMET paper claims of COMET-BERT, beside what Results of `comet_bert` say; no number typed but theirs.

The abstract: COMET-based distillation beats MoEBERT (random hash of the token id) on 5 of 7 GLUE tasks and on SQuAD.
The cells of its table could not be read. On one task a "yes" is what 5 of 7 tasks would show, and a "no" refutes
nothing by itself.

One teacher is a blind spot: students of one teacher share what it happens to have learnt, and an interval over their
seeds is for that teacher. With Results of several teachers each comparison has a row per teacher, and then one with
Student's interval over teachers: of each the mean difference over its seeds.

The last rows are no claims of the paper. They say what it takes to read the first ones: whether routing is worth
anything beside one small expert for all, and what the student costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lab.experiments.claims import COLUMNS, judge
from moe_lab.experiments.compare import Difference, over_seeds, paired_difference, student_interval
from moe_lab.results import Result

_BASE = "hash"
_PAPER = ("comet", "comet+")
_OURS = ("topk", "dselect_k", "hash+", "topk+")


def _by_teacher(results: Sequence[Result]) -> dict[int, list[Result]]:
    """teacher_seed -> its Results, in rising order."""
    groups: dict[int, list[Result]] = {}
    for result in results:
        groups.setdefault(result.config.get("teacher_seed", 0), []).append(result)
    return dict(sorted(groups.items()))


def _check(results: Sequence[Result]) -> None:
    """ValueError unless the Results differ in gate, seed and teacher only, each triple once."""
    if not results:
        raise ValueError("no Results to compare")
    for group in _by_teacher(results).values():
        over_seeds(group, ["test_score"])
    names = {name for result in results for name in result.config} - {"gate", "seed", "teacher_seed"}
    differing = sorted(n for n in names if any(r.config.get(n) != results[0].config.get(n) for r in results))
    if differing:
        raise ValueError(f"claims compare gates of one setting; these differ in {', '.join(differing)}: filter them")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def on_what(results: Sequence[Result], *gates: str, which: str = "") -> str:
    """``sst2, minilm, 4 experts, 6000 steps, 3 seeds``: seeds that all ``gates`` were run with.

    Args:
        results: of one teacher, or of several: then it says how many, not how many seeds.
        gates: names.
        which: of the teachers, put before the seeds.
    """
    config = results[0].config
    what = f"{config['task']}, {config['model']}, {config['n_experts']} experts, {config['steps']} steps"
    teachers = [
        group
        for group in _by_teacher(results).values()
        if all(any(r.config["gate"] == gate for r in group) for gate in gates)
    ]
    if len(teachers) > 1:
        return f"{what}, {_count(len(teachers), 'teacher')}"
    seeds = set.intersection(*({r.seed for r in results if r.config["gate"] == gate} for gate in gates))
    return f"{what}, {which}{_count(len(seeds), 'seed')}"


def _comparison(
    results: Sequence[Result], gate: str, base: str, text: str, each_teacher: bool
) -> list[tuple[str, str, str, str]]:
    """Rows of one comparison: for each teacher that has both gates for some seed, then over teachers if several do.

    Not ``each_teacher``: the last of these rows.
    """
    rows, gaps = [], []
    groups = _by_teacher(results)
    for teacher, group in groups.items():
        seeds = [{r.seed for r in group if r.config["gate"] == name} for name in (gate, base)]
        if not seeds[0] & seeds[1]:
            continue
        gap = paired_difference(group, "test_score", base, gate)
        which = f"teacher {teacher}, " if len(groups) > 1 else ""
        rows.append(
            (text, f"{gate} − {base} {gap} in score", on_what(group, gate, base, which=which), judge(gap)),
        )
        gaps.append(gap.mean)
    if len(gaps) > 1:
        gap = Difference(float(np.mean(gaps)), *student_interval(gaps), len(gaps))  # resampling three is too short
        verdict = judge(gap).replace("seeds", "teachers")
        where = f"{on_what(results, gate, base)}: Student's interval over teachers"
        rows.append((text, f"{gate} − {base} {gap} in score", where, verdict))
    return rows if each_teacher else rows[-1:]


def bert_claims(results: Sequence[Result], *, each_teacher: bool = True) -> pd.DataFrame:
    """Rows for each comparison that the gates among ``results`` allow; the score is the task's first metric.

    Args:
        results: of `comet_bert`, differing in gate, seed and teacher_seed only.
        each_teacher: also a row for each teacher where a comparison was made with several.

    Returns:
        Columns as in `claims`.

    Raises:
        ValueError: no Results, several settings, or two of one gate, seed and teacher.
    """
    _check(results)
    rows = []
    for gate in _PAPER:
        text = f"{gate} beats MoEBERT's hash gate on 5 of 7 GLUE tasks (abstract)"
        rows += _comparison(results, gate, _BASE, text, each_teacher)
    for gate in _OURS:
        rows += _comparison(results, gate, _BASE, f"(not in the abstract) {gate} beats hash", each_teacher)
    for gate in (_BASE, *_PAPER):
        text = f"(not in the paper) {gate} beats one expert for all of the same width"
        rows += _comparison(results, gate, "pruned", text, each_teacher)
    rows += _costs(results)
    return pd.DataFrame(rows, columns=COLUMNS)


def _costs(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """What the student has of the teacher's score and FLOPs (means over runs) and time (medians over those timed)."""
    rows = []
    for gate in (_BASE, *_PAPER):
        runs = [result.metrics for result in results if result.config["gate"] == gate]
        if not runs:
            continue
        score = np.mean([run["test_score"] - run["teacher_score"] for run in runs])
        flops = np.mean([run["flops_per_token"] / run["teacher_flops_per_token"] for run in runs])
        measured = f"score {score:+.4f}, {flops:.0%} of the FLOPs"
        timed = [run for run in runs if "speedup_1" in run]
        if timed:
            at_1, at_64 = (np.median([run[f"speedup_{size}"] for run in timed]) for size in (1, 64))
            measured += f", {at_1:.2f} times as fast at batch 1, {at_64:.2f} at 64"
        rows.append((f"(what {gate} costs, against its teacher)", measured, on_what(results, gate), "(measured)"))
    return rows
