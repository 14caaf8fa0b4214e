"""Figures of notebook 13 draw the numbers they are given."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from moe_lab.exits.losses import MODES
from moe_lab.plots import jei
from moe_lab.plots.style import expert_colors

POINTS = pd.DataFrame(
    [("shared", 0.8, 0.7), ("shared", 0.4, 0.6), ("jei_dnn", 0.5, 0.7), ("boosted", 0.5, 0.6)],
    columns=["method", "cost", "accuracy"],
)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_methods_and_modes_can_be_told_apart():
    looks = [(style["color"], style["marker"]) for style in jei.STYLES.values()]
    assert len(set(looks)) == len(looks) and {"boosted", "weighted", "target_accuracy", "jei_dnn"} <= set(jei.STYLES)
    assert set(jei.MODE_STYLES) == set(MODES) - {"uniform"}


def test_the_lowest_line_is_drawn_and_named_stair_by_stair(ax):
    jei.draw_prices(ax, (1.2, 0.5, 0.3), (0.3, 0.6, 1.0), 4.0)
    drawn = lines(ax)
    lowest = drawn["best exit"]
    assert lowest.get_ydata()[0] == pytest.approx(0.3) and lowest.get_ydata()[-1] == pytest.approx(1.2 + 4 * 0.3)
    assert texts(ax) == ["exit 3", "exit 2", "exit 1"]
    steps = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2]
    assert steps == pytest.approx([0.5, 7 / 3], abs=0.02)
    assert drawn["exit 1"].get_color() == expert_colors(1)[0]


def test_an_exit_that_is_never_best_has_no_stair(ax):
    jei.draw_prices(ax, (1.2, 1.1, 0.2), (0.3, 0.6, 1.0), 4.0)
    assert texts(ax) == ["exit 3", "exit 1"]


def test_only_the_methods_asked_for_are_drawn_sorted_by_cost_in_per_cent(ax):
    jei.draw_methods(ax, POINTS, ("shared", "jei_dnn", "weighted"))
    assert set(lines(ax)) == {jei.STYLES[name]["label"] for name in ("shared", "jei_dnn")}
    shared = lines(ax)[jei.STYLES["shared"]["label"]]
    assert list(shared.get_xdata()) == [0.4, 0.8] and list(shared.get_ydata()) == pytest.approx([60, 70])


def test_modes_are_points_beside_the_shared_threshold(ax):
    jei.draw_modes(ax, {"released": [(0.5, 0.6), (0.4, 0.7)], "single": [(0.6, 0.5)]}, POINTS)
    drawn = lines(ax)
    assert list(drawn["released"].get_ydata()) == pytest.approx([60, 70])
    assert drawn["released"].get_linestyle() == "None"
    assert list(drawn["one shared threshold"].get_xdata()) == [0.4, 0.8]
    assert ax.get_ylim() == pytest.approx((48, 72))  # of the modes, not of the line


def test_areas_are_shares_and_slivers_are_left_out(ax):
    rows = [
        {"exit": 0, "share": 0.75, "accuracy": 0.9},
        {"exit": 1, "share": 0.248, "accuracy": 0.5},
        {"exit": 2, "share": 0.002, "accuracy": 0.0},
    ]
    jei.draw_by_exit(ax, rows, [0.7, 0.8, 0.85])
    circles = [c for c in ax.collections if len(c.get_offsets())]
    assert [tuple(c.get_offsets()[0]) for c in circles] == [(1, 90), (2, 50)]
    areas = [float(c.get_sizes()[0]) - 6 for c in circles]
    assert areas[0] / areas[1] == pytest.approx(0.75 / 0.248)
    assert texts(ax) == ["75%", "25%"]
    assert list(lines(ax)["on all samples"].get_ydata()) == pytest.approx([70, 80, 85])


def test_phases_are_bars_of_their_lengths_first_row_on_top(ax):
    jei.draw_phases(ax, {"all": ["warmup"] * 2 + ["gates"] * 3 + ["modules"], "anew": ["gates"] * 6}, ends=2)
    assert [bar.get_width() for bar in ax.patches] == [2, 3, 1, 6]
    assert [bar.get_x() for bar in ax.patches] == [0, 2, 5, 0]
    assert ax.get_legend_handles_labels()[1] == ["warmup", "gates", "classifiers"]
    assert [line.get_xdata()[0] for line in ax.lines] == [2, 4]
    low, high = ax.get_ylim()
    assert low > high


def test_a_training_curve_leaves_out_what_is_missing(ax):
    rows = [{"step": 10, "now": 2.0}, {"step": 20, "now": 1.0, "gates": 0.5}, {"step": 30, "now": 1.5, "gates": None}]
    jei.draw_training(ax, rows, ["warmup"] * 10 + ["gates"] * 20, {"now": "now", "gates": "loss"}, ylabel="nats")
    assert list(lines(ax)["now"].get_xdata()) == [10, 20, 30] and list(lines(ax)["loss"].get_xdata()) == [20]
    assert len(ax.patches) == 2 and ax.get_xlim() == (0, 30)
