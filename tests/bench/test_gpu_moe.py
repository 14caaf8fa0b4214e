"""Every case of the MoE layer's benchmark computes the layer; its row says what was measured. No timing is tested."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_lab.bench.gpu_moe import Case, choose, measure, moe_cases
from moe_lab.bench.gpu_problem import Problem, Shape, error, expected
from moe_lab.bench.tables import render_all
from moe_lab.experts import kernels

TINY = Shape(tokens=24, width=8, hidden=16, experts=4, k=2)
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("k", [1, 2])
def test_every_case_computes_the_same_layer(bias, activation, k):
    problem = Problem(dataclasses.replace(TINY, k=k), "cpu", torch.float32, activation=activation, bias=bias)
    right = {variable: expected(problem, variable) for variable in (False, True)}
    cases = moe_cases(problem, compiled=False)
    assert set(cases) >= {"dense", "plain", "ours", "ours, any pattern", "ours, variable k", "ours, recompute"}
    assert ("reference" in cases) == bias
    for name, case in cases.items():
        found = case.prepare()()
        if name != "dense":
            assert error(problem, found, right[case.variable]) < 1e-5, name
            assert case.variable == ("variable" in name) and (name == "dense" or len(found) == 5 + 2 * bias)
    wrong = cases["ours, variable k"].prepare()()
    assert error(problem, wrong, right[False]) > 0.1  # the two routings do differ


def test_rows_name_their_case_and_a_case_that_fails_costs_only_itself():
    problem = Problem(TINY, "cpu")
    cases = choose(problem, compiled=False) | {"broken": Case(lambda: 1 / 0)}
    rows = {row["case"]: row for row in measure(problem, cases, rounds=1, n_steps=2)}
    assert "ZeroDivisionError" in rows["broken"]["failed"] and "ms" not in rows["broken"]
    assert rows["broken"]["of_dense"] is None
    assert rows["dense"]["of_dense"] == 1 and rows["plain"]["error"] < 2e-2
    assert rows["plain"]["tflops"] == pytest.approx(TINY.flops / (rows["plain"]["ms"] / 1e3) / 1e12)
    assert "broken failed: ZeroDivisionError" in render_all(list(rows.values()))


def test_a_variable_number_of_experts_is_counted_by_its_own_operations_beside_fixed_k():
    problem = Problem(TINY, "cpu")
    cases = choose(problem, only=["ours", "ours, variable k"])
    fixed, variable = measure(problem, cases, rounds=1, n_steps=2)
    assert fixed["pairs"] == 2 and fixed["of_fixed"] is None
    assert variable["pairs"] == pytest.approx(float((problem.variable != 0).sum()) / 24) != 2
    per_pair = [row["ms"] / row["pairs"] for row in (fixed, variable)]
    assert variable["of_fixed"] == pytest.approx(per_pair[0] / per_pair[1])
    assert fixed["of_dense"] is None and fixed["of_scattermoe"] is None


def test_cases_are_chosen_by_name():
    problem = Problem(TINY, "cpu")
    assert list(choose(problem, only=["ours", "dense"])) == ["dense", "ours"]
    assert "ours, compiled" in choose(problem) and "ours, compiled" not in choose(problem, compiled=False)
    with pytest.raises(ValueError, match="did you mean 'ours, recompute'"):
        choose(problem, only=["ours, recomputed"])


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_the_captured_layer_is_the_layer_and_peak_memory_has_no_expert_for_every_token():
    """Largest there may be in all: the N hidden rows that are kept and passing, not T x E of them."""
    shape = Shape(tokens=4096, width=128, hidden=512, experts=64, k=2)
    problem = Problem(shape, "cuda")
    rows = {row["case"]: row for row in measure(problem, choose(problem, compiled=False), rounds=1, n_steps=2)}
    assert rows["ours, CUDA graph"]["error"] < 1e-2
    every_expert = 2 * shape.tokens * shape.experts * shape.hidden / 2**20  # MiB of one (T, E, H) tensor in bfloat16
    for name in ("ours", "ours, variable k", "ours, recompute"):
        assert rows[name]["peak_mib"] < every_expert / 2
