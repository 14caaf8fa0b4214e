"""The benchmark of the MoE layer says what it measured: no timing is tested, only the counting and the frame."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_lab.bench.gpu_cases import (
    SHAPES,
    Problem,
    Shape,
    block_choices,
    error,
    loop_layer,
    main,
    measure,
    measure_stages,
    render,
    stages,
    steps,
    tune,
)
from moe_lab.experts import MLPExperts, kernels, run_everything

TINY = Shape(tokens=24, width=8, hidden=16, experts=4, k=2)
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")


def test_operations_are_two_products_forward_and_four_backward_two_for_each_multiply_add():
    assert Shape(3, 5, 7, 4, 2).flops == 6 * 2 * (3 * 2) * 5 * 7
    assert [shape.flops for shape in SHAPES] == [12 * 2**16 * 2**22, 12 * 2**18 * 2**21, 12 * 2**15 * 2**22]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_case_computes_the_same_layer(bias, activation):
    problem = Problem(TINY, "cpu", torch.float32, activation=activation, bias=bias)
    leaves = [problem.x, problem.values, *problem.parameters]
    expected = problem.step(lambda: loop_layer(problem), leaves)()
    cases = steps(problem, compiled=False)
    assert set(cases) >= {"dense", "plain", "ours", "ours, any pattern", "ours, recompute"}
    assert ("reference" in cases) == bias
    for name, prepare in cases.items():
        found = prepare()()
        if name != "dense":
            assert error(problem, found, expected) < 1e-5, name


def test_the_loop_is_the_package_s_oracle():
    problem = Problem(TINY, "cpu", torch.float32, bias=True)
    bank = MLPExperts(4, (8, 16, 8), "gelu", activate_last=False)
    for own, given in zip(bank.parameters(), (problem.w1, problem.w2, problem.b1, problem.b2), strict=True):
        own.data = given.detach()
    (expected,) = run_everything(bank, problem.x, [problem.weights])
    torch.testing.assert_close(loop_layer(problem), expected, rtol=1e-5, atol=1e-5)


def test_the_dense_layer_has_as_many_multiply_adds_as_the_active_experts():
    problem = Problem(TINY, "cpu")
    assert sum(w.numel() for w in problem.dense) * TINY.tokens * 6 == TINY.flops


def test_errors_are_relative_and_a_wrong_gradient_shows():
    problem = Problem(TINY, "cpu")
    right = [torch.ones(3), torch.full((2,), 2.0)]
    assert error(problem, right, right) == 0
    assert error(problem, [right[0], right[1] * 1.25], right) == pytest.approx(0.25)


def test_routing_is_distinct_per_token_and_skew_makes_it_uneven():
    shape = Shape(2000, 8, 16, 8, 2)
    loads = [torch.bincount(Problem(shape, "cpu", skew=skew).experts.flatten(), minlength=8) for skew in (0.0, 2.0)]
    assert all(load.sum() == 4000 for load in loads)
    assert loads[0].max() < 1.2 * 500 and loads[1].max() > 2 * 500
    experts = Problem(shape, "cpu").experts
    assert (experts[:, 0] != experts[:, 1]).all()
    assert Problem(dataclasses.replace(TINY, k=1), "cpu").values.max() < 1  # top-1: the probability, not the constant 1


def test_rows_name_their_case_and_a_case_that_fails_costs_only_itself(monkeypatch):
    import moe_lab.bench.gpu_cases as module

    def broken(problem, compiled):
        cases = steps(problem, compiled)
        return cases | {"ours": lambda: 1 / 0}

    monkeypatch.setattr(module, "steps", broken)
    rows = {row["case"]: row for row in measure(Problem(TINY, "cpu"), rounds=1, n_steps=2, compiled=False)}
    assert "ZeroDivisionError" in rows["ours"]["failed"] and "ms" not in rows["ours"]
    assert rows["dense"]["of_dense"] == 1 and rows["plain"]["error"] < 2e-2
    assert rows["plain"]["tflops"] == pytest.approx(TINY.flops / (rows["plain"]["ms"] / 1e3) / 1e12)
    assert "ours failed: ZeroDivisionError" in render(list(rows.values()))


def test_stages_add_up_to_the_operations_of_a_step():
    problem = Problem(TINY, "cpu")
    assert sum(flops for _, flops, _ in stages(problem).values()) == TINY.flops
    rows = measure_stages(problem, rounds=1, n_steps=2)
    assert len(rows) == 11 and all(row["ms"] > 0 for row in rows)


def test_block_shapes_to_try_are_powers_of_two_within_bounds():
    choices = list(block_choices())
    assert len(set(choices)) == 12
    for blocks in choices:
        assert blocks.rows * blocks.columns in (2048, 4096, 8192) and kernels.TILE % blocks.rows == 0
        assert all(size & (size - 1) == 0 for size in dataclasses.astuple(blocks))
    before = dict(kernels.BLOCKS)
    assert tune(Problem(TINY, "cpu")) == {} and before == kernels.BLOCKS  # without Triton there is nothing to tune


def test_the_command_prints_tables_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    sizes = ["--tokens", "24", "--width", "8", "--hidden", "16", "--experts", "4", "--k", "2"]
    frame = ["--device", "cpu", "--no-compile", "--rounds", "1", "--steps", "2"]
    main([*sizes, *frame, "--parts", "--cases", "dense", "ours", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["environment"]["torch"] == torch.__version__ and "gpu_cases --tokens 24" in report["command"]
    (table,) = report["tables"]
    assert [row["case"] for row in table["cases"]] == ["dense", "ours"] and len(table["stages"]) == 11
    printed = capsys.readouterr().out
    assert "of_dense" in printed and "dW1 = X^T dZ" in printed


def test_bad_sizes_are_refused(capsys):
    with pytest.raises(ValueError, match="k at most"):
        Shape(8, 8, 8, 2, 3)
    with pytest.raises(ValueError, match="16 bytes"):
        Problem(Shape(8, 12, 16, 2, 1), "cpu")
    with pytest.raises(SystemExit):
        main(["--tokens", "8"])
    assert "give all of --tokens" in capsys.readouterr().err
