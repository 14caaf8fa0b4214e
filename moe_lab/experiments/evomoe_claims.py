"""What the EvoMoE papers claim, beside what Results of our three experiments say; no number typed but theirs.

Only abstracts of arXiv 2112.14397 could be read: v1 (the dense-to-sparse gate, GPT) states 2.0 and 1.42 times against
Switch, v2 (experts that are spawned, RoBERTa, translation) that EvoMoE beats Switch, BASE, Hash and StableMoE. No cell
of their tables is quoted. Our runs are small, so a verdict is about the *sign*; the number stands beside it.

Speed-ups, seed by seed: L* = final validation loss of the base gate's run of the same seed, n_X the first step (FLOP,
second) at which run X is down to it,

    s = n_base / n_X        0 if X never comes down to L*: "never"

Ratios are averaged as logarithms. A run that never arrives has no ratio: it is named and no mean is given; for the
verdict it counts as infinitely slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.experiments.claims import COLUMNS, judge
from moe_lab.experiments.compare import Difference, paired_difference
from moe_lab.experiments.evomoe_language import training_curve
from moe_lab.metrics.flops import speedup
from moe_lab.results import Result
from moe_lab.results.plain import to_plain

AXES = {"step": "steps", "flops": "FLOPs", "seconds": "seconds"}
"""Columns of `training_curve` that a run can be short of."""
BASES = {"switch": "no token dropped", "switch_capacity": "tokens dropped"}
OURS = ("evomoe", "dts")
BASELINES = ("switch", "switch_capacity", "base", "hash", "stable")
"""What the abstract of v2 says EvoMoE beats, Switch both ways."""

_SOURCE = "abstract; 1.5B GPT-MoE, OpenWebText"
_SAYS = {
    "step": f"2.0 times fewer steps than {{base}} to its final validation loss ({_SOURCE})",
    "flops": f"1.42 times fewer FLOPs than {{base}} to its final validation loss ({_SOURCE})",
    "seconds": "less time than {base} to its final validation loss (not in the abstracts)",
}


def same_setting(results: Iterable[Result], config: Any, free: Sequence[str] = ("gate", "seed")) -> list[Result]:
    """Those Results whose config is ``config`` but for the fields ``free``; order as given.

    Args:
        results: of any settings.
        config: a config (dataclass) or a Result's mapping.
        free: fields that may differ.
    """
    wanted = to_plain(config, "config")
    return [r for r in results if all(r.config.get(name) == wanted[name] for name in wanted if name not in free)]


def _check_one_setting(results: Sequence[Result]) -> None:
    """ValueError unless the Results differ in gate and seed only, each pair once."""
    if not results:
        raise ValueError("no Results to judge by")
    names = {name for result in results for name in result.config} - {"gate", "seed"}
    differing = sorted(n for n in names if any(r.config.get(n) != results[0].config.get(n) for r in results))
    if differing:
        raise ValueError(f"claims compare gates of one setting; these differ in {', '.join(differing)}: filter them")
    pairs = [(result.config["gate"], result.seed) for result in results]
    if len(set(pairs)) < len(pairs):
        raise ValueError("several Results per gate and seed")


def _by_seed(results: Iterable[Result], gate: str) -> dict[int | None, Result]:
    return {result.seed: result for result in results if result.config["gate"] == gate}


def on_what(results: Sequence[Result], *gates: str) -> str:
    """``tiny-shakespeare, 16 experts, 1500 steps, 3 seeds``: seeds that all ``gates`` were run with."""
    config = results[0].config
    seeds = len(set.intersection(*(set(_by_seed(results, gate)) for gate in gates)))
    what = f"{config['dataset']}, {config['n_experts']} experts, {config['steps']} steps"
    return f"{what}, {seeds} seed{'s' * (seeds > 1)}"


def speedups(results: Sequence[Result], gate: str, base: str = "switch", x: str = "step") -> dict[int | None, float]:
    """Seed -> how many times less a gate needs than ``base`` of the same seed to base's final validation loss.

    Args:
        results: of `evomoe_language`, one per gate and seed.
        gate, base: gates; seeds that only one of them was run with are left out.
        x: "step", "flops" or "seconds" (which include evaluations; the recorded runs of "dts" and "evomoe" were
            evaluated twice throughout, now only the soft phase is).

    Returns:
        s > 0, above 1 if ``gate`` is faster; 0.0: never.

    Raises:
        ValueError: no seed with both gates.
    """
    own, other = _by_seed(results, gate), _by_seed(results, base)
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        raise ValueError(f"no seed was run with both {gate!r} and {base!r}")
    ratios = {}
    for seed in sorted(seeds, key=lambda seed: -1 if seed is None else seed):
        slow, fast = training_curve(other[seed]), training_curve(own[seed])
        ratios[seed] = speedup(slow[x], slow["valid_loss"].to_list(), fast[x], fast["valid_loss"])
    return ratios


def machine(result: Result) -> tuple[str | None, str | None]:
    """What seconds depend on: device and version of PyTorch."""
    return result.environment.get("device"), result.environment.get("torch")


def one_machine(results: Iterable[Result], *gates: str) -> bool:
    """All runs (of these gates, or of all) were made on machines of one kind: seconds may be compared."""
    return len({machine(r) for r in results if not gates or r.config["gate"] in gates}) <= 1


def log_speedup(ratios: Mapping[int | None, float], n_resamples: int = 2000) -> Difference:
    """Mean logarithm of the ratios and its interval over resampled seeds; -inf where a seed "never" arrives."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(list(ratios.values()), dtype=float))
    draws = np.random.default_rng(0).choice(logs, (n_resamples, len(logs))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")  # a drawn value: -inf is not interpolated
    return Difference(float(logs.mean()), float(low), float(high), len(logs))


def times(ratio: float) -> str:
    """``1.17``, or ``never``."""
    return f"{ratio:.2f}" if ratio > 0 else "never"


def describe(ratios: Mapping[int | None, float]) -> str:
    """``1.06 times [0.97, 1.17] (by seed: 1.17, 0.97, 1.06)``; no mean where a seed never arrives."""
    one_by_one = f"by seed: {', '.join(map(times, ratios.values()))}"
    if min(ratios.values()) <= 0:
        return one_by_one
    gap = log_speedup(ratios)
    return f"{math.exp(gap.mean):.2f} times [{math.exp(gap.low):.2f}, {math.exp(gap.high):.2f}] ({one_by_one})"


def speedup_table(results: Sequence[Result], base: str = "switch") -> pd.DataFrame:
    """Per gate: `describe` for steps, FLOPs and seconds against ``base`` (which has 1 in all seeds: left out).

    Seconds of runs that were made on another kind of machine than those of ``base`` are not compared.
    """
    seeds = set(_by_seed(results, base))
    gates = [gate for gate in dict.fromkeys(r.config["gate"] for r in results) if gate != base]

    def cell(gate: str, x: str) -> str:
        if x == "seconds" and not one_machine(results, gate, base):
            return "other machine"
        return describe(speedups(results, gate, base, x))

    rows = {
        gate: {title: cell(gate, x) for x, title in AXES.items()}
        for gate in gates
        if seeds & set(_by_seed(results, gate))
    }
    return pd.DataFrame(rows, index=list(AXES.values())).T.rename_axis(f"against {base}")


def lead(results: Sequence[Result], metric: str, base: str, gate: str) -> Difference:
    """How much *lower* ``metric`` of ``gate`` is than that of ``base``, seed by seed; positive: gate is better."""
    return paired_difference(results, metric, gate, base)


def _times_rows(results: Sequence[Result], gates: set[str]) -> list[tuple[str, str, str, str]]:
    rows = []
    for x, says in _SAYS.items():
        for base in BASES:
            for gate in OURS:
                if {gate, base} <= gates and (x != "seconds" or one_machine(results, gate, base)):
                    ratios = speedups(results, gate, base, x)
                    text = f"{gate}: {says.format(base=base)}"
                    rows.append((text, describe(ratios), on_what(results, gate, base), judge(log_speedup(ratios))))
    return rows


def _loss_rows(results: Sequence[Result], gates: set[str]) -> list[tuple[str, str, str, str]]:
    rows = []
    for gate in OURS:
        if {gate, "switch"} <= gates:
            gap = paired_difference(results, "final_loss", "switch", gate)
            verdict = judge(lead(results, "final_loss", "switch", gate))
            text = f"{gate}: lower final validation loss than switch (follows, if it is sooner there)"
            rows.append((text, f"{gate} − switch {gap} nats", on_what(results, gate, "switch"), verdict))
    return rows


def dropping_share(results: Sequence[Result], gate: str = "dts") -> float:
    """Share of the lead of ``gate`` over Switch with capacity that Switch without capacity has, too.

    Means over the seeds that all three were run with. Above 1: ``gate`` is worse than Switch without capacity.

    Returns:
        The share; nan if ``gate`` has no lead, so that there is nothing to divide.
    """
    runs = {name: _by_seed(results, name) for name in ("switch", "switch_capacity", gate)}
    seeds = set.intersection(*(set(found) for found in runs.values()))
    if not seeds:
        return math.nan
    loss = {name: np.mean([found[seed].metrics["final_loss"] for seed in seeds]) for name, found in runs.items()}
    whole = loss["switch_capacity"] - loss[gate]
    return float((loss["switch_capacity"] - loss["switch"]) / whole) if whole > 0 else math.nan


def _dropping_row(results: Sequence[Result], gates: set[str]) -> list[tuple[str, str, str, str]]:
    if not set(BASES) <= gates:
        return []
    gap = paired_difference(results, "final_loss", "switch", "switch_capacity")
    measured = f"switch_capacity − switch {gap} nats"
    if "dts" in gates:
        share = dropping_share(results)
        part = "dts has no lead over switch_capacity" if math.isnan(share) else f"{share:.0%} of dts's lead over it"
        measured += f"; {part}"
    text = "(not in the abstracts) dropping tokens costs Switch loss"
    return [(text, measured, on_what(results, *BASES), judge(gap))]


def language_claims(results: Sequence[Result]) -> pd.DataFrame:
    """Claims on steps, FLOPs and final loss that the gates among ``results`` can say something about.

    Args:
        results: of `evomoe_language`, differing in gate and seed only.

    Returns:
        One row per claim, columns as in `claims`.

    Raises:
        ValueError: no Results, several settings, or two of one gate and seed.
    """
    _check_one_setting(results)
    gates = {result.config["gate"] for result in results}
    rows = _times_rows(results, gates) + _loss_rows(results, gates) + _dropping_row(results, gates)
    return pd.DataFrame(rows, columns=COLUMNS)


def side_by_side(studies: Mapping[str, Sequence[Result]]) -> pd.DataFrame:
    """`language_claims` of models of several sizes, a row per claim.

    Args:
        studies: label -> Results of one setting each; empty ones are left out.

    Returns:
        Index ``paper claims``; for each label the columns ``label`` (what was measured) and ``label: holds?``. A claim
        that a study says nothing about has empty cells.
    """
    columns = []
    for label, results in studies.items():
        if results:
            table = language_claims(results).set_index(COLUMNS[0])
            names = {COLUMNS[1]: label, COLUMNS[3]: f"{label}: holds?"}
            columns.append(table[list(names)].rename(columns=names))
    return pd.concat(columns, axis=1).fillna("") if columns else pd.DataFrame()


def _outperforms(results: Sequence[Result], metric: str, what: str, digits: str) -> pd.DataFrame:
    _check_one_setting(results)
    gates = {result.config["gate"] for result in results}
    rows = []
    for base in BASELINES:
        if {"evomoe", base} <= gates:
            gap = paired_difference(results, metric, base, "evomoe")
            text = f"evomoe outperforms {base} (abstract of v2; {what})"
            measured = f"{metric} {gap.mean:+{digits}} [{gap.low:+{digits}}, {gap.high:+{digits}}]"
            rows.append((text, measured, on_what(results, "evomoe", base), judge(gap)))
    return pd.DataFrame(rows, columns=COLUMNS)


def masked_claims(results: Sequence[Result]) -> pd.DataFrame:
    """Test accuracy of "evomoe" against the abstract's baselines; Results of `evomoe_masked`, pre-trained ones.

    Raises:
        ValueError: as `language_claims`.
    """
    return _outperforms(results, "test_accuracy", "masked language model, GLUE", ".4f")


def translation_claims(results: Sequence[Result]) -> pd.DataFrame:
    """BLEU of "evomoe" against the abstract's baselines; Results of `evomoe_translation`.

    Raises:
        ValueError: as `language_claims`.
    """
    return _outperforms(results, "bleu", "translation", ".2f")
