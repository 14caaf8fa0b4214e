"""The benchmark of gates says what it measured: no timing is tested, only the counting and the frame."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_lab.bench import gpu_gates_parts
from moe_lab.bench.gpu_gates import GatesBench, gates_tables, main
from moe_lab.bench.gpu_gates_cases import cases, choose, measure
from moe_lab.bench.gpu_gates_parts import block_choices, measure_parts, tune
from moe_lab.bench.gpu_gates_problem import SHAPES, Problem, Shape, error
from moe_lab.experts import kernels
from moe_lab.gates import comet_kernels

TINY = Shape(tokens=24, width=8, experts=4, k=2)
needs_no_triton = pytest.mark.skipif(kernels.usable(torch.empty(1)), reason="Triton's interpreter is on")


def test_the_shapes_are_those_of_the_target_and_comet_has_a_logit_per_split_and_leaf_and_tree():
    assert [dataclasses.astuple(shape) for shape in SHAPES] == [(32768, 1024, 16, 2), (32768, 1024, 256, 4)]
    assert [shape.logits for shape in SHAPES] == [62, 2044]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_gives_weights_losses_and_all_gradients(dtype):
    problem = Problem(TINY, "cpu", dtype)
    for name, gate in problem.gates.items():
        weights, *rest = problem.step(gate)()
        torch.testing.assert_close(weights.sum(1), torch.ones(24))
        losses, grads = rest[: -len(list(gate.parameters())) - 1], rest[-len(list(gate.parameters())) - 1 :]
        assert len(losses) == (1 if "COMET" in name else 2) and grads[0].dtype == dtype
        assert [grad.shape for grad in grads] == [problem.x.shape, *(p.shape for p in gate.parameters())]
        assert all(bool(grad.any()) for grad in grads)


def test_both_top_k_gates_are_the_same_gate_in_float32_and_both_comets_have_the_same_parameters():
    problem = Problem(TINY, "cpu", torch.float32)
    other = problem.gates["top-k, x's dtype"]
    other.load_state_dict(
        {name.replace("logits.", "logits.affine."): t for name, t in problem.gates["top-k"].state_dict().items()}
    )
    for a, b in zip(problem.step(problem.gates["top-k"])(), problem.step(other)(), strict=True):
        torch.testing.assert_close(a, b)
    assert problem.gates["COMET"].backend == "reference" and problem.gates["COMET, kernels"].backend == "fast"
    for a, b in zip(problem.gates["COMET"].parameters(), problem.gates["COMET, kernels"].parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_a_compiled_gate_takes_the_same_step():
    problem = Problem(TINY, "cpu", torch.float32)
    gate = problem.gates["COMET"]
    found = problem.step(gate, torch.compile(gate, fullgraph=True, dynamic=False, backend="eager"))()
    assert error(found, problem.expected()) < 1e-5


def test_sharpness_decides_trees():
    soft, sharp = (Problem(TINY, "cpu", torch.float32, sharpness=s).gates["COMET"] for s in (1.0, 300.0))
    x = Problem(TINY, "cpu", torch.float32).x
    assert soft(x).experts_per_token.float().mean() == 4
    assert sharp(x).experts_per_token.float().mean() < 3


def test_errors_are_relative_and_a_wrong_gradient_shows():
    right = [torch.ones(3), torch.full((2,), 2.0), torch.zeros(2)]
    assert error(right, right) == 0
    assert error([right[0], right[1] * 1.25, right[2]], right) == pytest.approx(0.25)
    assert error([right[0], right[1], torch.tensor([3.0, 4.0])], right) == 5


@needs_no_triton
def test_rows_name_their_case_and_a_case_that_fails_costs_only_itself():
    problem = Problem(TINY, "cpu")
    prepared = choose(problem, compiled=False) | {"broken": lambda: 1 / 0}
    rows = {row["case"]: row for row in measure(problem, prepared, rounds=1, n_steps=2)}
    assert "ZeroDivisionError" in rows["broken"]["failed"] and "ms" not in rows["broken"]
    assert "Triton cannot run" in rows["COMET, kernels"]["failed"]
    assert rows["top-k"]["of_topk"] == 1 and rows["top-k"]["error"] is None
    assert rows["COMET"]["of_topk"] == pytest.approx(rows["COMET"]["ms"] / rows["top-k"]["ms"])
    assert rows["COMET"]["error"] < 2e-2


def test_cases_are_chosen_by_name():
    problem = Problem(TINY, "cpu")
    assert list(choose(problem, only=["COMET", "top-k"])) == ["top-k", "COMET"]
    assert "COMET, compiled" in choose(problem) and "COMET, compiled" not in choose(problem, compiled=False)
    assert set(choose(problem)) == set(cases(problem))
    with pytest.raises(ValueError, match="unknown case 'topk'; did you mean 'top-k'"):
        choose(problem, only=["topk"])


def test_block_shapes_to_try_are_distinct():
    for n_experts, expected in ((16, 6), (17, 12)):  # a tree of 16 leaves is one subtree whatever is tried
        choices = list(block_choices(n_experts))
        assert len(set(choices)) == len(choices) == expected
        assert all(blocks.tokens == 32 * blocks.warps for blocks in choices)


@needs_no_triton
def test_without_triton_there_is_nothing_to_tune_and_no_part_to_time():
    before = dict(comet_kernels.WHOLE_BLOCKS)
    assert tune(Problem(TINY, "cpu")) == {} and measure_parts(Problem(TINY, "cpu")) == []
    assert before == comet_kernels.WHOLE_BLOCKS


@pytest.mark.skipif(not kernels.usable(torch.empty(1)), reason="needs Triton and TRITON_INTERPRET=1")
def test_with_triton_the_kernels_are_right_timed_and_tuned(monkeypatch):
    monkeypatch.setattr(gpu_gates_parts, "block_choices", lambda n_experts: [comet_kernels.TreeBlocks(1, 2)])
    monkeypatch.setattr(comet_kernels, "WHOLE_BLOCKS", dict(comet_kernels.WHOLE_BLOCKS))
    others = dict(comet_kernels.BLOCKS)
    problem = Problem(TINY, "cpu")
    assert tune(problem, n_steps=2).keys() == {"forward", "backward"}
    assert comet_kernels.WHOLE_BLOCKS["forward"] == comet_kernels.TreeBlocks(1, 2) and others == comet_kernels.BLOCKS
    rows = measure(problem, choose(problem, only=["COMET, kernels"]), rounds=1, n_steps=2)
    assert rows[0]["error"] < 1e-2 and rows[0]["ms"] > 0
    assert len(measure_parts(problem, rounds=1, n_steps=2)) == 7


def test_the_command_prints_tables_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    sizes = ["--tokens", "24", "--width", "8", "--experts", "4", "--k", "2", "--sharpness", "1", "50"]
    frame = ["--device", "cpu", "--no-compile", "--rounds", "1", "--steps", "2"]
    main([*sizes, *frame, "--cases", "top-k", "COMET", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["environment"]["torch"] == torch.__version__ and "gpu_gates --tokens 24" in report["command"]
    assert [table["table"] for table in report["tables"]] == ["gates", "gates"]
    assert [[row["sharpness"] for row in table["rows"]] for table in report["tables"]] == [[1, 1], [50, 50]]
    assert [row["case"] for row in report["tables"][0]["rows"]] == ["top-k", "COMET"]
    assert "of_topk" in capsys.readouterr().out


@needs_no_triton
def test_tables_come_one_by_one_and_an_unknown_case_is_noticed_before_anything_is_tuned(monkeypatch):
    frame = {"compiled": False, "tune": True, "parts": True, "rounds": 1, "steps": 2}
    config = GatesBench(shapes=(TINY,), cases=("top-k",), parameters="float32", **frame)
    found = list(gates_tables(config, torch.device("cpu")))
    assert [name for name, _ in found] == ["gates_tuned", "gates", "gates_parts"] * 2
    assert found[0][1] == found[2][1] == [] and found[4][1][0]["sharpness"] == 100
    monkeypatch.setattr("moe_lab.bench.gpu_gates.tune", None)  # would raise if it were called
    with pytest.raises(ValueError, match="did you mean 'top-k'"):
        next(gates_tables(dataclasses.replace(config, cases=("topk",)), torch.device("cpu")))


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(ValueError, match="k from 2"):
        Shape(8, 8, 4, 1)
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        GatesBench(parameters="bfloat")
    for arguments, message in (
        (["--tokens", "8"], "give all of --tokens --width --experts --k"),
        (["--tokens", "8", "--width", "8", "--experts", "2", "--k", "3"], "k from 2"),
        (["--rounds", "1", "--steps", "1"], "two timed steps"),
    ):
        with pytest.raises(SystemExit):
            main(["--device", "cpu", *arguments])
        assert message in capsys.readouterr().err
