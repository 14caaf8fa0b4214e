"""Work of stages by formula is the benchmark's own; bounds follow from it, by hand."""

import dataclasses
import math

import pytest
import torch

from moe_lab.bench import roofline
from moe_lab.bench.gpu_problem import Problem, Shape
from moe_lab.bench.gpu_stages import measure_stages, stages
from moe_lab.bench.roofline import Ceiling, Work

SHAPE = Shape(tokens=12, width=8, hidden=16, experts=4, k=2)


def test_work_is_that_of_the_benchmark():
    work = roofline.layer_work(SHAPE, 4)
    counted = stages(Problem(SHAPE, "cpu", torch.float32))
    assert list(work) == list(counted)  # no products of our own on a CPU
    for name, (_, operations, size) in counted.items():
        assert work[name].operations == operations
        assert work[name].bytes == size or roofline.is_product(name)
    assert sum(w.operations for w in work.values()) == SHAPE.flops


def test_a_product_by_hand():
    # 6 rows (6, 2) x 3 matrices (2, 5): 120 operations; 12 + 30 + 30 numbers of 2 bytes
    work = roofline.product_work(6, 2, 5, 3, 2)
    assert work == Work(120, 144) and work.intensity == pytest.approx(120 / 144)


def test_the_longer_of_both_times_decides():
    machine = Ceiling(operations=100, bytes=10)
    assert machine.ridge == 10
    assert machine.seconds(Work(1000, 10)) == 10 and machine.seconds(Work(1000, 500)) == 50
    assert machine.attainable(2) == 20 and machine.attainable(50) == 100


@pytest.mark.parametrize(("inner", "outer", "size"), [(64, 128, 4), (1000, 100, 2)])
def test_rows_to_compute_is_where_the_intensity_is_the_ridge(inner, outer, size):
    machine = Ceiling(3e3, 1e3)
    rows = roofline.rows_to_compute(machine, inner, outer, size)
    assert roofline.product_work(rows, inner, outer, 1, size).intensity == pytest.approx(machine.ridge)


def test_matrices_that_are_too_small_never_compute_more_than_they_move():
    assert roofline.rows_to_compute(Ceiling(1e6, 1e3), 8, 8, 4) == math.inf


def test_stages_beside_their_bounds():
    rows = measure_stages(Problem(SHAPE, "cpu", torch.float32), rounds=1, n_steps=2)
    machine = Ceiling(1e9, 1e9)
    table = roofline.against_ceiling(rows, 4, machine)
    assert len(table) == 11 and table["product"].sum() == 6
    assert list(table.calls[table.calls == 2].index) == ["scatter_rows", "sum_rows"]
    once = next(row["ms"] for row in rows if row["stage"].startswith("scatter_rows"))
    assert table.ms["scatter_rows"] == pytest.approx(2 * once)
    # (1 + 2) * 12 * 8 numbers of 4 bytes, twice, at 1e9 bytes per second
    assert table.bound_ms["scatter_rows"] == pytest.approx(2 * 1152e-6)
    assert table.reached.to_numpy() == pytest.approx((table.bound_ms / table.ms).to_numpy())
    assert not table.own.any()


def test_a_product_of_our_own_takes_the_place_of_grouped_mm():
    sizes = dataclasses.asdict(SHAPE)
    ms = {"Z = X W1": 3.0, "dW1 = X^T dZ": 2.5, "product, for Z": 2.0}
    table = roofline.against_ceiling([{**sizes, "stage": name, "ms": ms[name]} for name in ms], 4, Ceiling(1e9, 1e9))
    assert table.ms.to_dict() == {"Z = X W1": 2.0, "dW1 = X^T dZ": 2.5} and table.own.tolist() == [True, False]
    assert table.reached["Z = X W1"] == pytest.approx(table.bound_ms["Z = X W1"] / 2)


def test_each_product_of_our_own_names_the_one_whose_place_it_takes():
    names = {"Z": "Z = X W1", "A W2": "A W2", "dA": "dA = G W2^T", "dX": "dX = dZ W1^T"}
    assert {short: roofline.grouped_stage(f"product, for {short}") for short in names} == names
    assert roofline.grouped_stage("outer, for dW1") == "dW1 = X^T dZ"
    with pytest.raises(ValueError, match="takes the place of no product"):
        roofline.grouped_stage("product, for Q")


def test_a_recorded_ceiling_is_the_best_of_each_kind():
    rows = [{"tflops": 2.0, "gb_per_s": None}, {"tflops": 3.0}, {"tflops": None, "gb_per_s": 5.0}]
    assert roofline.recorded_ceiling(rows) == Ceiling(3e12, 5e9)
    with pytest.raises(ValueError, match="--parts"):
        roofline.recorded_ceiling(rows[:2])


def test_this_cpu_has_a_ceiling_and_a_curve():
    machine = roofline.measured_ceiling(n=64, numbers=2**12, rounds=1)
    assert machine.operations > 0 and machine.bytes > 0
    curve = roofline.product_curve((1, 8), 16, 32, 3, rounds=1)
    work = roofline.product_work(24, 16, 32, 3, 4)
    assert curve.intensity[8] == pytest.approx(work.intensity)
    assert curve.operations_per_s[8] == pytest.approx(work.operations / (1e-3 * curve.ms[8]))
