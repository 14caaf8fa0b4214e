"""The benchmark says what it measured: no timing is tested, only the counting and the frame."""

from __future__ import annotations

import dataclasses

import pytest

from moe_lab.bench.cpu import CpuBenchConfig, language_table, render, run
from moe_lab.bench.language_cases import DENSE, LanguageBench, LanguageStep, language_gates
from moe_lab.bench.recommender import BATCH, N_EXPERTS, GateStep, TrainingStep, gate_makers, gate_multiply_adds
from moe_lab.bench.timing import Timing, take_turns
from moe_lab.metrics.flops import language_flops, training_flops
from moe_lab.models.language import TransformerSize

SMALL = TransformerSize(19, 8, layers=2, width=8, heads=2, hidden=16, moe_every=1)
LANGUAGE = LanguageBench(SMALL, n_experts=4, batch=2, rounds=1, steps=2)


def test_every_case_gets_every_turn():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = take_turns(cases, rounds=4, steps=2, warm_up=1)
    assert all(len(timing.wall) == len(timing.cpu) == 8 for timing in timings.values())
    assert all(calls.count(name) == 1 + 4 * (1 + 2) for name in cases)
    blocks = calls[3:]  # behind the warm-up: one call of warm-up and two timed ones for each turn
    assert all(len(set(blocks[i : i + 3])) == 1 for i in range(0, len(blocks), 3))
    assert all(set(blocks[i : i + 9]) == set(cases) for i in range(0, len(blocks), 9))


def test_rates_follow_from_the_median():
    row = Timing(wall=[0.1, 0.2, 0.4], cpu=[0.1, 0.1, 0.1]).row(examples=50)
    assert row["ms"] == pytest.approx(200)
    assert row["steps_per_s"] == pytest.approx(5)
    assert row["examples_per_s"] == pytest.approx(250)
    assert row["ms_best"] == pytest.approx(100)


def test_experts_per_example_are_what_the_bank_computed():
    """Hash: both tasks share one expert. Softmax: all 16. Converged COMET and top-k, two gates: between 2 and 4."""
    seen = {}
    for name, make in gate_makers(2).items():
        step = TrainingStep(make, embedding_updates="dense", batch=64)
        step()
        seen[name] = step.experts_per_example
    assert seen["hash"] == 1
    assert seen["softmax"] == seen["comet, at the start"] == seen["dselect_k, at the start"] == N_EXPERTS
    for name in ("topk", "comet, converged", "dselect_k, converged"):
        assert 2 <= seen[name] <= 4 + 0.05  # a split can land inside the soft interval by chance


def test_a_training_step_changes_embeddings_experts_heads_and_learnable_gates():
    for updates in ("dense", "lazy"):
        step = TrainingStep(gate_makers(2)["topk"], embedding_updates=updates, batch=64)
        before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
        step()
        assert all((p != before[name]).any() for name, p in step.model.named_parameters())


def test_gate_steps_leave_no_gradient_behind():
    for make in gate_makers(2).values():
        step = GateStep(make, batch=8)
        step()
        assert step.x.grad is None
        assert all(p.grad is None for p in step.gate.parameters())


def test_multiply_adds_are_those_of_the_specification():
    """(2n - 1) k d for COMET, (ceil(log2 n) + 1) k d for DSelect-k, n d for top-k; n = 16, d = 256."""
    assert gate_multiply_adds("comet, converged", 2) == 31 * 2 * 256
    assert gate_multiply_adds("dselect_k, at the start", 2) == 5 * 2 * 256
    assert gate_multiply_adds("topk", 2) == 16 * 256
    assert gate_multiply_adds("hash", 2) == 0


def test_a_run_prints_its_circumstances_and_keeps_a_result(tmp_path, capsys):
    config = CpuBenchConfig(ks=(2,), batch=16, rounds=1, steps=2, language=LANGUAGE)
    result = run(config, root=tmp_path, command="the command")
    printed = capsys.readouterr().out
    assert "the command" in printed
    assert "torch" in printed
    assert result.finished
    assert set(result.curves) == {"training", "gates", "experts", "language"}
    assert {row["gate"] for row in result.curves["training"]} == set(gate_makers(2))
    assert result.environment["threads"] >= 1
    assert {row["gate"] for row in result.curves["language"]} == set(language_gates(LANGUAGE))
    assert all(name in printed for name in [*gate_makers(2), *language_gates(LANGUAGE)])
    assert result.metrics["tokens_per_s/switch"] > 0
    assert "2 of them with 4 experts, 2 x 8 tokens, 1 x 2 steps" in printed


def test_experts_per_token_are_what_the_banks_computed():
    """One expert: as dense. Two: top-2 and GShard. All: softmax, and dense to sparse while soft. Capacity: below 1."""
    seen = {}
    for name, make in language_gates(LANGUAGE).items():
        step = LanguageStep(make, LANGUAGE)
        step()
        assert step.tokens == LANGUAGE.tokens == 16
        seen[name] = step.experts_per_token
    dropped, soft = seen.pop("switch, capacity 1"), seen.pop("dense to sparse, at the start")
    assert 0.25 <= dropped < 1  # 4 places each: all tokens at one expert would leave 4 of 16
    assert 3.5 < soft <= 4  # a rare draw of the noise falls below the threshold
    expected = dict.fromkeys(language_gates(LANGUAGE).keys() & seen.keys(), 1) | {"topk, k = 2": 2, "gshard": 2}
    assert seen == expected | {"softmax": 4}


def test_a_language_step_counts_its_flops_and_changes_every_parameter_that_learns():
    dense = training_flops(language_flops(dataclasses.replace(SMALL, moe_every=0)))
    for name in (DENSE, "hash", "switch", "softmax"):
        step = LanguageStep(language_gates(LANGUAGE)[name], LANGUAGE)
        before = {key: p.detach().clone() for key, p in step.model.named_parameters()}
        step()
        assert all((p != before[key]).any() for key, p in step.model.named_parameters())
        extra = {DENSE: 0, "hash": 0, "switch": 2 * 2 * 8 * 4, "softmax": 2 * (2 * 8 * 4 + 3 * 4 * 8 * 16)}[name]
        assert step.flops == dense + 3 * extra


def test_gates_stay_in_the_phase_in_which_they_are_timed():
    gates = language_gates(LANGUAGE)
    for name, phase in (("dense to sparse, hard", "hard"), ("dense to sparse, at the start", "soft")):
        step = LanguageStep(gates[name], LANGUAGE)
        step()
        step()
        assert {mixture.moe.gate.phase for mixture in step.model.body.mixtures} == {phase}


def test_the_dense_model_is_the_unit_of_the_language_table():
    rows = {row["gate"]: row for row in language_table(CpuBenchConfig(language=LANGUAGE))}
    assert rows[DENSE]["relative_speed"] == rows[DENSE]["relative_flops"] == 1
    assert rows["hash"]["relative_flops"] == 1 < rows["switch"]["relative_flops"] < rows["gshard"]["relative_flops"]
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(16 / (1e-3 * row["ms"]))
        assert row["relative_speed"] == pytest.approx(rows[DENSE]["ms"] / row["ms"])


@pytest.mark.parametrize(
    "change",
    [{"size": dataclasses.replace(SMALL, moe_every=0)}, {"n_experts": 1}, {"rounds": 1, "steps": 1}],
)
def test_language_sizes_that_leave_nothing_to_time_are_refused(change):
    with pytest.raises(ValueError, match=r"no mixture|at least 2 experts|two timed steps"):
        dataclasses.replace(LANGUAGE, **change)


def test_tables_are_aligned():
    text = render([{"a": "x", "b": 1.0}, {"a": "long", "b": 1000.0}], [("a", "name", ""), ("b", "value", ",.1f")])
    assert text.splitlines() == ["name    value", "x         1.0", "long  1,000.0"]


def test_too_few_steps_for_quartiles_are_refused():
    with pytest.raises(ValueError, match="two timed steps"):
        CpuBenchConfig(rounds=1, steps=1)
    assert CpuBenchConfig().batch == BATCH
