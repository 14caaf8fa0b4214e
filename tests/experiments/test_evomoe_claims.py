"""Claims of the EvoMoE papers are judged seed by seed, and a run that never arrives is named."""

import dataclasses
import math

import pytest

from moe_lab.experiments.claims import COLUMNS
from moe_lab.experiments.evomoe_claims import (
    describe,
    dropping_share,
    language_claims,
    log_speedup,
    masked_claims,
    one_machine,
    same_setting,
    side_by_side,
    speedup_table,
    speedups,
    translation_claims,
)
from moe_lab.experiments.evomoe_language import LanguageConfig
from moe_lab.results import Result

SLOW, FAST, NEVER = [3.0, 2.0, 1.0], [2.0, 1.0, 0.5], [3.0, 2.5, 2.0]  # FAST is there after 2 of SLOW's 3 evaluations


def run(gate, seed, losses, experts=1.0, seconds=1.0, **config):
    """A language model with these validation losses at steps 100, 200, ..."""
    config = LanguageConfig(gate=gate, seed=seed, steps=100 * len(losses), evaluate_every=100, **config)
    rows = [
        {"step": 100 * (i + 1), "valid_loss": loss, "train_experts": experts, "seconds": seconds}
        for i, loss in enumerate(losses)
    ]
    metrics = {"n_tokens": 45, "length": 48, "final_loss": losses[-1]}
    return Result(
        "evomoe_language", dataclasses.asdict(config), None, seed=seed, metrics=metrics, curves={"epochs": rows}
    )


def runs(gate, *losses, **options):
    return [run(gate, seed, one, **options) for seed, one in enumerate(losses)]


def rows(table):
    return {row[0]: row[1:] for row in table.itertuples(index=False)}


def one_row(table, *words):
    (found,) = (row for text, row in rows(table).items() if all(word in text for word in words))
    return found


def test_speedup_is_taken_seed_by_seed_at_the_final_loss_of_the_same_seed():
    results = runs("switch", SLOW, SLOW) + runs("dts", FAST, SLOW)
    assert speedups(results, "dts") == {0: 1.5, 1: 1.0}


def test_experts_and_seconds_make_the_other_axes():
    results = runs("switch", SLOW) + runs("dts", FAST, experts=8.0, seconds=3.0)
    dearer = speedups(results, "dts", x="flops")[0]
    assert dearer < 1 < speedups(results, "dts")[0]
    assert speedups(results, "dts", x="seconds")[0] == pytest.approx(0.5)


def test_a_seed_that_only_one_of_them_has_does_not_count():
    results = runs("switch", SLOW, SLOW) + runs("dts", FAST)
    assert list(speedups(results, "dts")) == [0]
    with pytest.raises(ValueError, match="no seed was run with both 'stable' and 'switch'"):
        speedups(results, "stable")


def test_ratios_are_averaged_as_logarithms():
    gap = log_speedup({0: 2.0, 1: 0.5})
    assert gap.mean == pytest.approx(0) and gap.seeds == 2
    assert describe({0: 2.0, 1: 0.5}) == "1.00 times [0.50, 2.00] (by seed: 2.00, 0.50)"


def test_never_is_shown_and_not_averaged_away():
    assert describe({0: 1.5, 1: 0.0, 2: 1.2}) == "by seed: 1.50, never, 1.20"
    gap = log_speedup({0: 1.5, 1: 0.0, 2: 1.2})
    assert gap.mean == gap.low == -math.inf and gap.sign == 0  # two seeds are sooner: undecided
    assert log_speedup({0: 0.9, 1: 0.0, 2: 0.8}).sign == -1
    assert log_speedup({0: 0.0, 1: 0.0, 2: 0.0}).sign == -1
    assert log_speedup({0: 0.0, 1: 0.0}).sign == 0  # two seeds decide nothing


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([FAST] * 3, "yes, in sign"),
        ([FAST, FAST, NEVER], "inconclusive"),
        ([NEVER] * 3, "no: the other way round"),
        ([FAST] * 2, "inconclusive (2 seeds)"),
    ],
)
def test_verdict_on_steps(losses, verdict):
    table = language_claims(runs("switch", *[SLOW] * len(losses)) + runs("dts", *losses))
    assert tuple(table.columns) == COLUMNS
    measured, on_what, found = one_row(table, "dts: 2.0 times fewer steps than switch ")
    assert found == verdict
    assert on_what == f"planted-text, 8 experts, 300 steps, {len(losses)} seeds"
    assert ("never" in measured) == (NEVER in losses)


def test_sooner_in_steps_may_be_later_in_flops():
    table = language_claims(runs("switch_capacity", *[SLOW] * 3) + runs("evomoe", *[FAST] * 3, experts=8.0))
    assert one_row(table, "steps than switch_capacity")[-1] == "yes, in sign"
    assert one_row(table, "1.42 times fewer FLOPs than switch_capacity")[-1] == "no: the other way round"
    assert one_row(table, "less time than switch_capacity")[-1] == "yes, in sign"


def test_final_losses_and_what_dropping_takes():
    capped = [[3.0, 2.0, 1.4]] * 3
    results = runs("switch", *[SLOW] * 3) + runs("switch_capacity", *capped) + runs("dts", *[FAST] * 3)
    table = language_claims(results)
    measured, _, verdict = one_row(table, "dts: lower final validation loss")
    assert measured.startswith("dts − switch -0.5000") and verdict == "yes, in sign"
    measured, _, verdict = one_row(table, "dropping tokens")
    assert verdict == "yes, in sign"
    assert measured.endswith("; 44% of dts's lead over it")  # 0.4 of 0.9 nats
    assert dropping_share(results) == pytest.approx(0.4 / 0.9)
    behind = runs("switch", *[SLOW] * 3) + runs("switch_capacity", *capped) + runs("dts", *[NEVER] * 3)
    assert math.isnan(dropping_share(behind))
    assert "no lead" in one_row(language_claims(behind), "dropping tokens")[0]
    assert math.isnan(dropping_share(runs("switch", SLOW)))


def test_the_table_of_speedups_has_a_row_per_gate_and_a_column_per_axis():
    table = speedup_table(runs("switch", SLOW, SLOW) + runs("dts", FAST, NEVER) + runs("dense", NEVER))
    assert list(table.index) == ["dts", "dense"] and list(table.columns) == ["steps", "FLOPs", "seconds"]
    assert table.loc["dts", "steps"] == "by seed: 1.50, never"


def test_seconds_of_different_machines_are_not_compared():
    slow, fast = runs("switch", SLOW), runs("dts", FAST)
    assert one_machine([*slow, *fast])
    before = len(language_claims([*slow, *fast]))
    for run_ in fast:
        run_.environment["device"] = "another"
    assert not one_machine([*slow, *fast]) and one_machine([*slow, *fast], "dts")
    assert speedup_table([*slow, *fast]).loc["dts", "seconds"] == "other machine"
    assert speedup_table([*slow, *fast]).loc["dts", "steps"] != "other machine"
    assert len(language_claims([*slow, *fast])) == before - 1


def test_sizes_stand_side_by_side_claim_by_claim():
    small = runs("switch", *[SLOW] * 3) + runs("dts", *[FAST] * 3) + runs("evomoe", *[FAST] * 3)
    large = runs("switch", SLOW, width=64) + runs("dts", NEVER, width=64)
    table = side_by_side({"small": small, "large": large, "none": []})
    assert list(table) == ["small", "small: holds?", "large", "large: holds?"]
    claim = next(text for text in table.index if text.startswith("dts: 2.0 times fewer steps"))
    assert table.loc[claim, "small: holds?"] == one_row(language_claims(small), claim)[2]
    assert table.loc[claim, "large"] == one_row(language_claims(large), claim)[0]
    only_small = next(text for text in table.index if text.startswith("evomoe: 2.0"))
    assert table.loc[only_small, "small"] and table.loc[only_small, "large"] == ""
    assert side_by_side({"none": []}).empty


def test_claims_are_about_one_setting_and_one_run_per_gate_and_seed():
    results = runs("switch", SLOW)
    with pytest.raises(ValueError, match="differ in n_experts, width"):
        language_claims(results + runs("dts", FAST, n_experts=4, width=64))
    with pytest.raises(ValueError, match="several Results per gate and seed"):
        language_claims(results + results)
    with pytest.raises(ValueError, match="no Results"):
        language_claims([])


def test_same_setting_leaves_gate_and_seed_free():
    results = runs("switch", SLOW, SLOW) + runs("dts", FAST) + runs("dts", FAST, n_experts=4)
    wanted = LanguageConfig(steps=300, evaluate_every=100)
    assert [(r.config["gate"], r.seed) for r in same_setting(results, wanted)] == [
        ("switch", 0),
        ("switch", 1),
        ("dts", 0),
    ]
    assert len(same_setting(results, wanted, free=("gate", "seed", "n_experts"))) == 4


def scored(gate, metric, *values):
    config = {"dataset": "toy", "n_experts": 16, "steps": 800, "gate": gate}
    return [
        Result("toy", {**config, "seed": seed}, None, seed=seed, metrics={metric: value})
        for seed, value in enumerate(values)
    ]


def test_masked_models_are_judged_by_accuracy():
    results = scored("evomoe", "test_accuracy", 0.82, 0.83, 0.84) + scored("switch", "test_accuracy", 0.80, 0.80, 0.80)
    results += scored("hash", "test_accuracy", 0.9, 0.9, 0.9) + scored("dense", "test_accuracy", 0.1, 0.1, 0.1)
    table = masked_claims(results)
    assert [row[-1] for row in table.itertuples(index=False)] == ["yes, in sign", "no: the other way round"]
    assert one_row(table, "outperforms switch")[0].startswith("test_accuracy +0.0300 [")
    assert one_row(table, "outperforms hash")[1] == "toy, 16 experts, 800 steps, 3 seeds"


def test_translation_is_judged_by_bleu():
    table = translation_claims(scored("evomoe", "bleu", 32.0) + scored("stable", "bleu", 31.5))
    measured, on_what, verdict = one_row(table, "evomoe outperforms stable")
    assert measured == "bleu +0.50 [+0.50, +0.50]" and verdict == "inconclusive (1 seed)"
    assert on_what.endswith("1 seed")
    assert translation_claims(scored("evomoe", "bleu", 32.0)).empty
