"""The stages of the MoE layer add up, and tuning tries what can run. No timing is tested."""

from __future__ import annotations

import functools

import pytest

import moe_lab.bench.gpu_tuning as tuning
from moe_lab.bench.gpu_problem import Problem, Shape
from moe_lab.bench.gpu_stages import measure_stages, stages
from moe_lab.bench.gpu_tuning import TILES, block_choices, tune
from moe_lab.bench.timing import Timing
from moe_lab.experts import kernels

TINY = Shape(tokens=24, width=8, hidden=16, experts=4, k=2)
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")


def test_stages_add_up_to_the_operations_of_a_step():
    problem = Problem(TINY, "cpu")
    assert sum(flops for _, flops, _ in stages(problem).values()) == TINY.flops
    rows = measure_stages(problem, rounds=1, n_steps=2)
    assert len(rows) == 11 and all(row["ms"] > 0 for row in rows)


def test_block_shapes_to_try_are_powers_of_two_within_bounds():
    for name, blocks_now in kernels.BLOCKS.items():
        choices = list(block_choices(name))
        assert len(set(choices)) == len(choices) == (36 if name.startswith("activate") else 12)
        assert blocks_now in choices  # or tuning could only lose
        for blocks in choices:
            assert blocks.rows * blocks.columns in (2048, 4096, 8192) and kernels.tuning.TILE % blocks.rows == 0
            assert all(size & (size - 1) == 0 for size in (blocks.rows, blocks.columns, blocks.warps))
            assert blocks.stages in (1, 2, 3)
    before = dict(kernels.BLOCKS)
    assert tune(Problem(TINY, "cpu")) == {} and before == kernels.BLOCKS  # without Triton there is nothing to tune


def test_the_fastest_block_shape_stays_and_a_kernel_that_none_can_run_keeps_its_own(monkeypatch):
    """Four kernels on planted times: the fewer columns the faster, but 256 cannot run, and sum_rows not at all."""

    def launch(name):
        if kernels.BLOCKS[name].columns == 256 or name == "sum_rows":
            raise RuntimeError("out of shared memory")

    def planted(cases, device, rounds, n_steps):
        return {blocks: Timing(wall=[blocks.columns * 1e-6] * 3) for blocks in cases}

    parts = {name: (functools.partial(launch, name), 0, 0) for name in kernels.BLOCKS}
    monkeypatch.setattr(tuning, "stages", lambda problem: parts)
    monkeypatch.setattr(tuning, "device_turns", planted)
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    for name, blocks in dict(kernels.BLOCKS).items():
        monkeypatch.setitem(kernels.BLOCKS, name, blocks)  # and put back afterwards
    before = kernels.BLOCKS["sum_rows"]
    best = tune(Problem(TINY, "cpu"))
    assert kernels.BLOCKS["sum_rows"] == before and "sum_rows" not in best
    for name in kernels.BLOCKS.keys() - {"sum_rows"}:
        assert kernels.BLOCKS[name].columns == best[name]["columns"] == 512 and best[name]["ms"] == pytest.approx(0.512)
    assert len(best["failed"]) == 4 + 2 * 12 + 12 and "shared memory" in next(iter(best["failed"].values()))


def test_tiles_to_try_hold_the_one_that_is_used():
    assert set(kernels.PRODUCTS.values()) <= set(TILES)
