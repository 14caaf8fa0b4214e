"""COMET-BERT's Results in tables: several teachers, differences pair by pair, costs counted and timed.

A pair of students is a gate and the gate it is compared with, of one teacher and one seed: same weights at the start,
same batches. Pairs of one teacher are no independent draws, so spreads are given twice: over the seeds of each teacher,
and over the teachers' means.

A time is a median over the runs, with the smallest and the largest: the same teacher, timed with each of its students,
shows how far a machine disagrees with itself.

Taught in notebook 07.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moe_lab.experiments.comet_bert import EXPERIMENT
from moe_lab.experiments.comet_bert_config import AUTHORS_SCRIPT, GATES, CometBertConfig
from moe_lab.experiments.comet_bert_measure import LATENCY_BATCHES
from moe_lab.experiments.compare import over_seeds, readable, student_interval
from moe_lab.experiments.evomoe_claims import same_setting
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results, to_frame

SCRIPT = "comet, authors' script"
"""Label of COMET with `AUTHORS_SCRIPT`."""
Groups = Mapping[str, Sequence[Result]]


def recorded_runs(root: Path | None = None) -> list[Result]:
    """Profile "standard": gates, seeds and teachers, in the order of `GATES`; [] if nothing was recorded."""
    runs = _recorded(CometBertConfig.profile("standard"), ("gate", "seed", "teacher_seed"), root)
    return sorted(runs, key=lambda r: (GATES.index(r.config["gate"]), r.config["teacher_seed"], r.seed))


def recorded_as_script(root: Path | None = None) -> list[Result]:
    """The same profile, COMET with the gamma and the entropy weight of the authors' example script."""
    script = CometBertConfig.profile("standard", gate="comet", **AUTHORS_SCRIPT)
    return _recorded(script, ("seed", "teacher_seed"), root)


def _recorded(config: CometBertConfig, free: Sequence[str], root: Path | None) -> list[Result]:
    root = recorded_dir() if root is None else root
    return same_setting(find_results(EXPERIMENT, root=root), config, free) if root.exists() else []


def gate_groups(runs: Sequence[Result], as_script: Sequence[Result] = ()) -> dict[str, list[Result]]:
    """gate -> its Results, in the order given; ``as_script`` last, as `SCRIPT`."""
    groups: dict[str, list[Result]] = {}
    for run in runs:
        groups.setdefault(run.config["gate"], []).append(run)
    return groups | ({SCRIPT: list(as_script)} if as_script else {})


def score_table(groups: Groups, metric: str = "test_score") -> pd.DataFrame:
    """A score, as text: mean ± standard deviation over the seeds of each teacher, then over the teachers' means.

    Args:
        groups: label -> Results of one setting.
        metric: of a Result.

    Returns:
        A row per label; columns "teacher 0", ... (empty where not run), "all teachers" (empty unless a group has all).
    """
    teachers = sorted({run.config["teacher_seed"] for runs in groups.values() for run in runs})
    rows = {}
    for label, runs in groups.items():
        table = over_seeds(runs, [metric], by=("teacher_seed",))
        text = readable(table)[metric]
        rows[label] = {f"teacher {teacher}": text.get(teacher, "") for teacher in teachers}
        if len(teachers) > 1:
            means = table[metric, "mean"]
            of_all = len(means) == len(teachers)
            rows[label]["all teachers"] = f"{means.mean():.3f} ± {means.std():.3f}" if of_all else ""
    return pd.DataFrame(rows).T.rename_axis("gate")


def busiest_share(run: Result) -> float:
    """Share of the test tokens on the busiest expert, mean over layers; 1 where there is one expert only.

    Whatever is said to tell a token's expert has to tell more than this.
    """
    largest: dict[int, float] = {}
    for row in run.curves.get("words", []):
        largest[row["layer"]] = max(row["share"], largest.get(row["layer"], 0.0))
    return float(np.mean(list(largest.values()))) if largest else 1.0


def sentence_shares(run: Result) -> pd.DataFrame:
    """Does a sentence stay together? Counted on the few sentences that were written down.

    Args:
        run: with the curve "sentences": only seed 0 keeps it when recorded.

    Returns:
        A row per layer: "sentence", the share of tokens that go where most tokens of their sentence go, and "anything",
        the share of the busiest expert on the same tokens.
    """
    sentences = run.curves["sentences"]
    rows = []
    for layer in range(len(sentences[0]["expert"])):
        counts = [Counter(sentence["expert"][layer]) for sentence in sentences]
        everywhere = sum(counts, Counter())
        together = sum(max(count.values()) for count in counts)
        rows.append(
            {"sentence": together / everywhere.total(), "anything": max(everywhere.values()) / everywhere.total()}
        )
    return pd.DataFrame(rows).rename_axis("layer")


def routing_table(groups: Groups) -> pd.DataFrame:
    """Where tokens go, and how often student and teacher agree: mean ± standard deviation over runs, as text.

    Returns:
        A row per label; columns teacher_agreement, experts_per_token, busiest_expert (`busiest_share`), decided_by_word
        (share of tokens that go where most tokens of their word go), runs.
    """
    rows = {}
    for label, runs in groups.items():
        columns = {name: [run.metrics[name] for run in runs] for name in ("teacher_agreement", "experts_per_token")}
        columns["busiest_expert"] = [busiest_share(run) for run in runs]
        columns["decided_by_word"] = [run.metrics["decided_by_word"] for run in runs]
        rows[label] = {name: _spread(values) for name, values in columns.items()} | {"runs": str(len(runs))}
    return pd.DataFrame(rows).T.rename_axis("gate")


def cost_table(groups: Groups) -> pd.DataFrame:
    """What a forward pass costs, as text: FLOPs and active parameters beside the teacher's, milliseconds, speed.

    Returns:
        A row per label; "FLOPs", "active parameters" in % of the teacher's, mean over runs; for each of
        `LATENCY_BATCHES` "ms, batch B" and "speed, batch B" (the teacher's time over the student's, timed in turns):
        median [smallest to largest] over runs. Without times in some run: no such columns. The row "teacher" has
        the times of the teacher beside each of its students, and no speed.
    """
    timed = all("latency_ms_1" in run.metrics for runs in groups.values() for run in runs)
    students = [run for runs in groups.values() for run in runs if run.config["gate"] != "teacher"]
    rows = {}
    for label, runs in groups.items():
        is_teacher = runs[0].config["gate"] == "teacher"
        shares = {
            "FLOPs": np.mean([run.metrics["flops_per_token"] / run.metrics["teacher_flops_per_token"] for run in runs]),
            "active parameters": np.mean(
                [run.metrics["active_parameters"] / run.metrics["teacher_active_parameters"] for run in runs]
            ),
        }
        rows[label] = {name: f"{100 * share:.0f} %" for name, share in shares.items()}
        for size in LATENCY_BATCHES if timed else ():
            clocked = students if is_teacher and students else runs
            name = f"teacher_latency_ms_{size}" if is_teacher else f"latency_ms_{size}"
            rows[label][f"ms, batch {size}"] = _range([run.metrics[name] for run in clocked], 1)
            speeds = [run.metrics[f"speedup_{size}"] for run in runs]
            rows[label][f"speed, batch {size}"] = "1" if is_teacher else _range(speeds, 2)
    return pd.DataFrame(rows).T.rename_axis("gate")


def relative_costs(groups: Groups) -> dict[str, pd.DataFrame]:
    """label -> a row per run: "FLOPs", and "time, batch B" where timed, as multiples of the teacher's."""
    tables = {}
    for label, runs in groups.items():
        rows = []
        for run in runs:
            metrics = run.metrics
            row = {"FLOPs": metrics["flops_per_token"] / metrics["teacher_flops_per_token"]}
            sizes = [size for size in LATENCY_BATCHES if f"speedup_{size}" in metrics]
            rows.append(row | {f"time, batch {size}": 1 / metrics[f"speedup_{size}"] for size in sizes})
        tables[label] = pd.DataFrame(rows)
    return tables


def pairs(runs: Sequence[Result], gate: str, base: str, metric: str = "test_score") -> pd.DataFrame:
    """``metric`` of ``gate`` minus that of ``base``: a row per teacher, a column per seed; nan where one is missing.

    Raises:
        ValueError: two Results of one gate, seed and teacher.
    """
    frame = to_frame(runs)
    index = ["teacher_seed", "seed"]
    values = [frame[frame.gate == name].set_index(index)[metric] for name in (gate, base)]
    if any(each.index.has_duplicates for each in values):
        raise ValueError(f"several Results per seed and teacher of {gate!r} or {base!r}: filter them")
    return (values[0] - values[1]).dropna().unstack("seed")


def pair_table(
    runs: Sequence[Result], comparisons: Sequence[tuple[str, str]], metric: str = "test_score"
) -> pd.DataFrame:
    """`pairs` in points (hundredths) as text, with a spread over seeds and one over teachers.

    Args:
        runs: of one setting, several teachers.
        comparisons: (gate, base).
        metric: a share.

    Returns:
        Rows "gate − base", each teacher, then "all" (its "seed" columns are empty); columns "seed 0", ..., "mean ± sd",
        and "95 %" in the rows "all": Student's interval for the mean over teachers.
    """
    rows = {}
    for gate, base in comparisons:
        table, name = 100 * pairs(runs, gate, base, metric), f"{gate} − {base}"
        for teacher, values in table.iterrows():
            cells = {f"seed {seed}": f"{value:+.2f}" for seed, value in values.dropna().items()}
            rows[name, f"teacher {teacher}"] = cells | {"mean ± sd": _spread(values.dropna(), 2, sign=True)}
        means = table.mean(axis=1)
        if len(means) > 1:
            low, high = student_interval(means)
            rows[name, "all"] = {"mean ± sd": _spread(means, 2, sign=True), "95 %": f"[{low:+.2f}, {high:+.2f}]"}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis(["difference, points", "of"])


def _spread(values: Sequence[float], digits: int = 3, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    text = f"{np.mean(values):{plus}.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def _range(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (np.min(values), np.median(values), np.max(values)))
    return f"{middle} [{low} to {high}]" if len(values) > 1 else middle
