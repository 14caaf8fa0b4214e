"""Figures of notebook 12 draw the numbers they are given."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from moe_lab.experiments.jei_baselines import METHODS
from moe_lab.plots import exits
from moe_lab.plots.sheet import sheet


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_every_method_of_the_experiment_has_its_own_look():
    assert set(exits.METHOD_STYLES) <= set(METHODS)
    looks = [(style["color"], style["marker"]) for style in exits.METHOD_STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_a_distribution_is_bars_of_its_heights_and_the_exit_taken_stands_out():
    _, ax = sheet(3, 3)
    exits.draw_distribution(ax, (0.5, 0.5, 2, 2), [0.2, 0.3, 0.5], 1, title="direct")
    heights = [bar.get_paths()[0].get_extents().height for bar in ax.collections]
    assert heights == pytest.approx([0.4, 0.6, 1.0])  # in inches, 1 is 2 inches high
    assert [bar.get_hatch() for bar in ax.collections] == [None, "///", None]
    written = {text.get_text(): text for text in ax.texts}
    assert {"0.20", "0.30", "0.50", "direct"} <= set(written) and written["2"].get_fontweight() == "bold"


def test_points_are_sorted_by_cost_and_drawn_in_per_cent(ax):
    rows = [("shared", 0.8, 0.7), ("shared", 0.4, 0.6), ("jei_dnn", 0.5, 0.7)]
    exits.draw_tradeoff(ax, pd.DataFrame(rows, columns=["method", "cost", "accuracy"]))
    shared = lines(ax)[exits.METHOD_STYLES["shared"]["label"]]
    assert list(shared.get_xdata()) == [0.4, 0.8] and list(shared.get_ydata()) == pytest.approx([60, 70])
    assert len(ax.lines) == 2  # methods without points are not in the legend


def test_shares_stack_up_to_1_first_row_on_top(ax):
    exits.draw_shares(ax, {"easy": [0.7, 0.3], "hard": [0.01, 0.99]})
    assert [patch.get_width() for patch in ax.patches] == pytest.approx([0.7, 0.01, 0.3, 0.99])
    assert [text.get_text() for text in ax.texts] == ["1", "2", "2"]  # slivers get no number
    low, high = ax.get_ylim()
    assert low > high


def test_times_have_a_line_at_1_and_one_at_the_counted_ratio(ax):
    table = pd.DataFrame({"rows leave": [0.8, 2.0]}, index=[1, 64])
    exits.draw_times(ax, table, counted=2.5)
    assert list(lines(ax)["rows leave"].get_ydata()) == [0.8, 2.0]
    assert lines(ax)["multiply-adds"].get_ydata() == [2.5, 2.5]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "64"]


def test_gates_stand_at_their_exits_beside_the_targets(ax):
    exits.draw_readings(ax, [0.4, 0.6], [0.2, 0.5, 1.0], {"direct": [0.5, 1.0, 1.0]})
    assert list(lines(ax)["mean gate"].get_xdata()) == [1, 2]
    assert list(lines(ax)["have left: direct"].get_ydata()) == [0.5, 1.0, 1.0]
    assert list(lines(ax)["targets: best exit ≤ l"].get_ydata()) == [0.2, 0.5, 1.0]
