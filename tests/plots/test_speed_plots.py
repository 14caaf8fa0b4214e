"""Figures of notebook 15 draw the numbers they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moe_lab.bench.roofline import Ceiling
from moe_lab.plots import speed
from moe_lab.plots.sheet import sheet


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_time_against_experts_has_a_line_for_each_way(ax):
    table = pd.DataFrame({"all experts, masked": [2.0, 16.0], "dispatched": [3.0, 4.0]}, index=[2, 16])
    speed.draw_growth(ax, table)
    assert list(lines(ax)["all experts, masked"].get_ydata()) == [2.0, 16.0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "16"]


def test_the_roof_bends_at_the_ridge(ax):
    points = pd.DataFrame({"intensity": [1.0, 40.0], "operations_per_s": [5e9, 90e9]}, index=[1, 64])
    speed.draw_roofline(ax, Ceiling(100e9, 10e9), points)
    x, y = lines(ax)["roofline"].get_data()
    assert max(y) == pytest.approx(100) and np.allclose(y[x < 10], 10 * x[x < 10])
    assert list(lines(ax)["measured"].get_ydata()) == [5, 90]
    assert {"1", "64", "ridge"} <= {text.get_text() for text in ax.texts}


def test_stages_are_bars_with_a_stroke_at_the_bound(ax):
    columns = ["calls", "ms", "bound_ms", "product"]
    table = pd.DataFrame([(1, 2.0, 1.5, True), (2, 1.0, 0.1, False)], columns=columns, index=["A W2", "sum_rows"])
    speed.draw_stages(ax, table)
    assert [bar.get_width() for bar in ax.patches] == [2.0, 1.0]
    assert [segment[0][0] for segment in ax.collections[0].get_segments()] == [1.5, 0.1]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["A W2", "sum_rows (× 2)"]


def test_cases_that_failed_leave_a_gap(ax):
    sizes = {"tokens": 32, "width": 8, "hidden": 16, "experts": 4, "k": 2}
    rows = [
        {**sizes, "case": "dense", "tflops": 600.0, "of_dense": 1.0},
        {**sizes, "case": "ours", "tflops": 300.0, "of_dense": 0.5},
        {**sizes, "case": "plain", "failed": "no memory"},
    ]
    speed.draw_cases(ax, rows)
    assert [bar.get_height() for bar in ax.patches] == [600, 300]
    assert [text.get_text() for text in ax.texts] == ["50%"]


def test_a_step_ends_with_the_slowest_expert(ax):
    speed.draw_loads(ax, {"alike": [1.0, 1.2], "uneven": [3.0, 0.5]})
    assert [line.get_ydata()[0] for line in ax.lines] == [1.2, 3.0]
    assert [bar.get_height() for bar in ax.patches] == [1.0, 1.2, 3.0, 0.5]


def test_shares_are_drawn_in_per_cent_and_exits_beside_the_count(ax):
    speed.draw_zeros(ax, pd.DataFrame({"zeros": [0, 0.5], "by_token": [0, 0.4], "by_block": [0, 0.1]}, index=[1, 10]))
    assert list(lines(ax)["weights that are exactly 0"].get_ydata()) == [0, 50]
    ax.clear()
    speed.draw_exits(ax, pd.DataFrame({"ratio": [2.0, 2.0], "plain": [0.9, 1.8]}, index=[1, 256]))
    assert list(lines(ax)["multiply-adds"].get_ydata()) == [2, 2] and list(lines(ax)["plain"].get_ydata()) == [0.9, 1.8]


def test_each_pair_is_a_line_in_its_experts_colour_and_lost_tokens_stand_out():
    _, ax = sheet(4, 4)
    row = np.array([[0, -1], [-1, 1], [-1, -1]])
    chosen = np.array([[True, False], [True, True], [True, False]])
    speed.draw_flow(ax, (0.5, 0.5, 3, 3), row, chosen)
    assert len(ax.collections[0].get_segments()) == 2
    marks = {(line.get_marker(), line.get_color()): len(line.get_xdata()) for line in ax.lines}
    assert marks == {("s", "#222222"): 1, ("s", speed.LOST): 1, ("x", speed.LOST): 1}


def test_rows_say_how_many_were_dropped_and_where_the_capacity_is():
    _, ax = sheet(4, 4)
    speed.draw_rows(ax, (0.5, 0.5, 3, 3), kept=[3, 1], asked=[5, 1], limit=3)
    written = [text.get_text() for text in ax.texts]
    assert "3 (2 dropped)" in written and "1" in written and "capacity 3" in written
    _, ax = sheet(4, 4)
    speed.draw_rows(ax, (0.5, 0.5, 3, 3), kept=[5, 1], asked=[5, 1], limit=None)
    assert "mean" in [text.get_text() for text in ax.texts]
