"""Tables of a recorded GPU benchmark: each figure by hand from the rows it is from."""

import dataclasses

import pytest

from moe_lab.bench.gpu_gates_problem import SHAPES as GATE_SHAPES
from moe_lab.bench.gpu_problem import SHAPES
from moe_lab.bench.roofline import Ceiling
from moe_lab.experiments import speed_tables as tables
from moe_lab.experiments.speed_claims import Recorded, recorded_curve
from moe_lab.results import Result

SIZES = ["T 32768, D 1024, H 4096, E 16, k 2", "T 32768, D 2048, H 1024, E 64, k 8"]


def moe_row(shape, case, **figures):
    return {"case": case, **dataclasses.asdict(shape), "ms": 1.0, "tflops": 500.0, "peak_mib": 100.0} | figures


def stage_row(shape, stage, ms):
    return {**dataclasses.asdict(shape), "stage": stage, "ms": ms, "tflops": 500.0, "gb_per_s": None}


def test_cases_of_the_layer_in_the_order_of_the_table():
    rows = [moe_row(SHAPES[0], "ours", of_dense=0.9), moe_row(SHAPES[0], "dense", of_dense=1.0)]
    table = tables.moe_table(rows)
    assert [case for _, case in table.index] == ["dense", "ours"] and table["of dense"].tolist() == [1.0, 0.9]
    assert tables.moe_table([]).empty


def test_a_gate_has_a_column_for_each_size_and_sharpness():
    row = {"case": "top-k", **dataclasses.asdict(GATE_SHAPES[0])}
    rows = [row | {"sharpness": 1.0, "ms": 2.0}, row | {"sharpness": 100.0, "ms": 3.0}]
    assert tables.gate_table(rows).loc["top-k"].tolist() == [2.0, 3.0]


def test_stages_of_each_size_beside_their_bounds(tmp_path):
    rows = [stage_row(shape, "A W2", 1.0) for shape in SHAPES[:2]]
    stages = Recorded("stages", rows, Result.open("bench_gpu", {"moe": {"dtype": "bfloat16"}}, tmp_path))
    found = tables.stage_tables(stages, Ceiling(1e15, 1e15))
    assert list(found) == SIZES
    t, d, h, _, k = dataclasses.astuple(SHAPES[0])
    assert found[SIZES[0]].bound_ms["A W2"] == pytest.approx(2 * t * k * d * h / 1e12)


def test_products_of_our_own_stand_beside_those_they_replace_and_are_added_up():
    ms = {"Z = X W1": 3.0, "dA = G W2^T": 4.0, "dW1 = X^T dZ": 9.0, "product, for Z": 2.0, "product, for dA": 3.0}
    table = tables.product_table([stage_row(SHAPES[0], name, ms[name]) for name in ms])
    assert list(table.index) == [(SIZES[0], name) for name in ("Z = X W1", "dA = G W2^T", "sum")]
    assert table.loc[(SIZES[0], "sum")].tolist() == [7.0, 5.0, 1.4]
    assert tables.product_table([stage_row(SHAPES[0], "A W2", 1.0)]).empty


def test_a_variable_number_of_experts_costs_so_much_more_at_as_many_pairs():
    rows = [
        moe_row(SHAPES[0], "ours", ms=8.0, tflops=400.0),
        moe_row(SHAPES[0], "ours, variable k", ms=12.0, tflops=320.0, ms_q1=11.0, ms_q3=14.0, peak_mib=7.0),
    ]
    table = tables.variable_table(rows)  # 12 ms for 1.2 times the pairs: 10 ms for as many
    assert table.loc[(SIZES[0], "ours, variable k")].tolist() == pytest.approx([0.8, 2.0, 3.0, 7.0])
    assert tables.variable_table(rows[1:]).empty


def test_power_of_a_layer_beside_dense_and_of_zeros_beside_none():
    def row(case, ms, watts, joules, rested=1.0):
        return {"case": case, **dataclasses.asdict(SHAPES[0]), "ms": ms, "rested_ms": rested, "mhz": 1500.0} | {
            "watts": watts, "joules": joules,
        }  # fmt: skip

    rows = [row("dense", 4.0, 500.0, 2.0), row("ours", 5.0, 500.0, 2.5), row("product", 1.0, 600.0, 0.6)]
    table = tables.power_table([*rows, row("product, all zeros", 0.8, 450.0, 0.36), row("plain", 8.0, None, None)])
    assert table.loc[(SIZES[0], "ours")].tolist() == [1.0, 5.0, 1500.0, 500.0, 2.5, 1.25, 1.25]
    zeros = table.loc[(SIZES[0], "product, all zeros")]
    assert (zeros["times the ms"], zeros["times the J"]) == (0.8, pytest.approx(0.6))
    assert table.loc[(SIZES[0], "plain"), "times the ms"] == 2 and table.isna().sum().sum() == 3
    assert tables.power_table([]).empty


def test_exits_cost_something_without_rows_taken_out_and_give_it_back_with():
    plans = [{"compact_from": 0.1, "ms": 5.0}, {"compact_from": 1.0, "ms": 9.0}]
    rows = [
        {"batch": 64, "case": "full, graph", "ms": 8.0, "speed_up": 1.0, "over_eager": 2.0, "reached": None},
        {"batch": 64, "case": "fast, graph", "ms": 5.5, "speed_up": 1.45, "reached": 0.7, "plan": plans[0]}
        | {"tried": plans},
        {"batch": 64, "case": "fast, compiled, graph", "ms": 5.0, "plan": plans[0], "tried": plans},
        {"batch": 64, "case": "plain", "failed": "no memory"},
    ]
    costs = tables.exit_costs(rows)  # the compiled network without exits was not timed
    assert list(costs.index) == [(64, "fast, graph")] and costs.iloc[0].tolist() == [8.0, 9.0, 5.0]
    table = tables.exit_table(rows)
    assert len(table) == 3 and table.loc[(64, "fast, graph"), "of the saved multiply-adds"] == 0.7


def test_every_table_can_be_made_of_what_is_recorded():
    found = {name: recorded_curve(name) for name in ("moe", "stages", "power", "gates", "exits")}
    assert all(found.values())
    assert tables.stage_tables(found["stages"], Ceiling(1e15, 1e12))
    for make, curve in (
        (tables.moe_table, "moe"),
        (tables.variable_table, "moe"),
        (tables.product_table, "stages"),
        (tables.power_table, "power"),
        (tables.gate_table, "gates"),
        (tables.exit_table, "exits"),
        (tables.exit_costs, "exits"),
    ):
        assert not make(found[curve].rows).empty
