"""The benchmark says what it measured: no timing is tested, only the counting and the frame."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_lab.bench.__main__ import main
from moe_lab.bench.cpu import TABLES, CpuBenchConfig, exits_table, language_table, run
from moe_lab.bench.exit_cases import ExitBench, ExitNetwork, PlantedExits
from moe_lab.bench.exit_training import ExitTrainingBench, training_rows
from moe_lab.bench.language_cases import DENSE, LanguageBench, LanguageStep, language_gates
from moe_lab.bench.recommender import BATCH, N_EXPERTS, GateStep, TrainingStep, gate_makers, gate_multiply_adds
from moe_lab.bench.timing import Timing, take_turns
from moe_lab.metrics.flops import language_flops, training_flops
from moe_lab.models.language import TransformerSize
from moe_lab.results import Result

SMALL = TransformerSize(19, 8, layers=2, width=8, heads=2, hidden=16, moe_every=1)
LANGUAGE = LanguageBench(SMALL, n_experts=4, batch=2, rounds=1, steps=2)
EXIT_TRAINING = ExitTrainingBench(layers=3, width=8, side=8, heads=2, prices=(0.1, 1.0), batch=8, images=80, rounds=1)
EXITS = ExitBench((ExitNetwork(4, 8, 8, rho=0.8, rounds=1, heads=2),), batches=(1, 8), images=4)


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
    config = CpuBenchConfig(
        ks=(2,), batch=16, rounds=1, steps=2, language=LANGUAGE, exits=EXITS, exit_training=EXIT_TRAINING
    )
    result = run(config, root=tmp_path, command="the command")
    printed = capsys.readouterr().out
    assert "the command" in printed
    assert "torch" in printed
    assert result.finished
    assert set(result.curves) == {"training", "gates", "experts", "language", "exits", "exit_training"} == set(TABLES)
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


def test_too_few_steps_for_quartiles_are_refused():
    with pytest.raises(ValueError, match="two timed steps"):
        CpuBenchConfig(rounds=1, steps=1)
    assert CpuBenchConfig().batch == BATCH


def test_one_table_can_run_alone_and_the_result_holds_no_other(tmp_path, capsys):
    config = CpuBenchConfig(exits=EXITS, tables=("exits",))
    result = run(config, root=tmp_path)
    printed = capsys.readouterr().out
    assert result.finished and set(result.curves) == {"exits"}
    assert set(result.metrics) == {f"reached/4 blocks, 5 tokens, width 8, batch {n}" for n in (1, 8)} | {"command"}
    assert "MovieLens" not in printed and "GPT" not in printed
    assert "at least 4 images per step, 1 x 2 steps" in printed
    assert Result.open("bench_cpu", CpuBenchConfig(exits=EXITS), root=tmp_path).path != result.path


@pytest.mark.parametrize("arguments", [["--tables", "exist"], ["--tables", "language", "exist"]])
def test_an_unknown_table_is_refused_with_the_nearest_name_before_anything_runs(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cpu", *arguments])
    assert stopped.value.code == 2
    assert "unknown table 'exist'; did you mean 'exits'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'training'"):
        CpuBenchConfig(tables=("trainin",))


def test_the_command_line_says_which_tables_there_are_and_hands_on_what_was_asked(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["cpu", "--help"])
    told = capsys.readouterr().out
    assert all(name in told and title in told for name, (title, *_) in TABLES.items())
    asked = {}
    monkeypatch.setattr("moe_lab.bench.cpu.run", lambda config, command: asked.update({command: config}))
    main(["cpu", "--tables", "exits", "language", "--threads", "1"])
    ((command, config),) = asked.items()
    assert config == CpuBenchConfig(tables=("exits", "language"), threads=1)
    assert command.startswith("python -m moe_lab.bench cpu --tables exits language --threads 1")


def test_planted_images_leave_in_the_wanted_shares_and_behind_closed_gates_nobody_leaves():
    planted = PlantedExits(EXITS.networks[0], 200)
    weights = [0.8**k for k in range(4)]
    counts = planted.exits.bincount(minlength=4).tolist()
    assert counts == pytest.approx([200 * weight / sum(weights) for weight in weights], abs=4)
    assert torch.equal(planted.network.predict(planted.images).exits, planted.exits)
    assert planted.closed.predict(planted.images).exits.tolist() == [3] * 200
    few = planted.network.predict(planted.mixture(20)).exits.bincount(minlength=4).tolist()
    assert few == pytest.approx([count / 10 for count in counts], abs=1)
    assert torch.equal(
        planted.mixture(200).flatten(1).sum(1).sort().values, planted.images.flatten(1).sum(1).sort().values
    )


def test_exit_cases_answer_all_images_in_batches_and_the_full_network_is_the_backbone():
    planted = PlantedExits(EXITS.networks[0], 10)
    found = {name: case() for name, case in planted.cases(planted.images, 4).items()}
    assert set(found) == {"plain", "full", "predict", "nobody"}
    assert all([len(getattr(y, "exits", y)) for y in answers] == [4, 4, 2] for answers in found.values())
    backbone, nobody = torch.cat(found["plain"]), torch.cat([y.probabilities for y in found["nobody"]])
    torch.testing.assert_close(backbone.softmax(-1), nobody)


def test_the_rows_of_exits_follow_from_the_times_and_the_costs():
    rows = exits_table(CpuBenchConfig(exits=EXITS))
    assert [row["batch"] for row in rows] == [1, 8]
    for row in rows:
        assert row["speed_up"] == pytest.approx(row["full_ms"] / row["predict_ms"])
        assert row["over_plain"] == pytest.approx(row["plain_ms"] / row["predict_ms"])
        assert row["reached"] == pytest.approx(row["speed_up"] / row["ratio"])
        assert 1 < row["ratio"] < 4 and row["nobody_ms"] > 0 and row["reached_cpu"] > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExitBench(batches=(0,)), "batches of at least 1"),
        (lambda: ExitBench(networks=()), "need a network"),
        (lambda: dataclasses.replace(EXITS, steps=1), "two timed steps"),
        (lambda: ExitNetwork(1, 8, 8, rho=0.8), "at least 2"),
        (lambda: ExitNetwork(4, 8, 8, rho=0.0), "rho must be positive"),
    ],
)
def test_sizes_of_exits_that_leave_nothing_to_time_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_training_of_exits_is_timed_on_whole_networks_and_on_cached_features():
    whole, one, grid = training_rows(EXIT_TRAINING)
    assert [row["case"] for row in (whole, one, grid)] == ["whole network", "cached features", "cached features"]
    assert (whole["prices"], one["prices"], grid["prices"]) == (1, 1, 2) and whole["cache_s"] == 0 < grid["cache_s"]
    assert whole["epoch_s"] == pytest.approx(10 * whole["ms"] / 2e3)  # a timed step is two steps
    assert grid["faster"] == pytest.approx(2 * whole["ms"] / grid["ms"])
    with pytest.raises(ValueError, match="at least 2 layers"):
        ExitTrainingBench(layers=1)
