"""Figures of notebook 14 draw the numbers they are given."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moe_lab.metrics.conformal import STRATEGIES
from moe_lab.plots import uncertainty

METHODS = ("jei_dnn", "geometric", "shared", "boosted", "weighted")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_every_strategy_and_method_has_its_own_look():
    assert tuple(uncertainty.STRATEGY_STYLES) == STRATEGIES
    for looks in (uncertainty.STRATEGY_STYLES.values(), map(uncertainty.method_style, METHODS)):
        assert len({(look["color"], look["marker"]) for look in looks}) >= 4
    with pytest.raises(ValueError, match="geometric"):
        uncertainty.method_style("geometrical")


def test_sticks_reach_from_the_diagonal_to_the_accuracy(ax):
    table = pd.DataFrame({"share": [0.5, 0.5], "confidence": [0.6, 0.9], "accuracy": [0.4, 0.95]})
    uncertainty.draw_reliability(ax, table, color="#0072B2")
    sticks = [np.asarray(path.vertices) for path in ax.collections[0].get_paths()]
    assert np.allclose(sticks, [[[60, 60], [60, 40]], [[90, 90], [90, 95]]])
    assert list(ax.lines[1].get_ydata()) == pytest.approx([40, 95])


def test_the_bias_stands_beside_its_formula(ax):
    uncertainty.draw_bias(ax, [64, 1000], [0.15, 0.04], [0.152, 0.038])
    assert list(lines(ax)["measured"].get_ydata()) == [0.15, 0.04]
    assert list(lines(ax)["formula (2)"].get_ydata()) == [0.152, 0.038]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_a_column_is_sorted_by_cost_and_scaled_and_absent_methods_have_no_line(ax):
    rows = [("shared", 0.8, 0.02), ("shared", 0.4, 0.03), ("jei_dnn", 0.5, 0.01), ("static", 0.1, 0.5)]
    points = pd.DataFrame(rows, columns=["method", "cost", "ece"])
    uncertainty.draw_column(ax, points, "ece", methods=METHODS, scale=100)
    assert len(ax.lines) == 2
    shared = lines(ax)[uncertainty.method_style("shared")["label"]]
    assert list(shared.get_xdata()) == [0.4, 0.8] and list(shared.get_ydata()) == pytest.approx([3, 2])


def test_bars_of_an_exit_stand_side_by_side_and_an_empty_exit_has_none(ax):
    looks = {"all": {"color": "white"}, "leave": {"color": "black"}}
    uncertainty.draw_bars(ax, {"all": [1.0, 2.0], "leave": [3.0, math.nan]}, looks)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:3] == [1.0, 2.0, 3.0] and math.isnan(heights[3])
    first, other = ax.patches[0], ax.patches[2]
    assert first.get_x() + first.get_width() <= other.get_x() + 1e-9


def test_strategies_are_drawn_against_alpha_inside_the_band_of_chance(ax):
    rows = [("general", 0.1, -0.5), ("general", 0.05, 0.5), ("gated", 0.05, 0.0)]
    rows = pd.DataFrame(rows, columns=["strategy", "alpha", "short"])
    uncertainty.draw_alphas(ax, rows, "short", ylabel="points", chance=[1.0, 2.0])
    assert list(lines(ax)["general"].get_xdata()) == [0.05, 0.1]
    assert list(lines(ax)["general"].get_ydata()) == [0.5, -0.5]
    assert "gated_all" not in lines(ax)
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (-2, 2)


def test_coverage_of_groups_stands_around_the_line_of_the_promise(ax):
    coverages = {"general": [0.9, math.nan], "gated": [0.95, 0.94]}
    uncertainty.draw_conditional(ax, coverages, ["exit 1", "exit 2"], 0.95)
    assert ax.lines[0].get_ydata() == [95, 95]
    assert list(lines(ax)["gated"].get_ydata()) == pytest.approx([95, 94])
    assert (lines(ax)["general"].get_xdata() < lines(ax)["gated"].get_xdata()).all()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["exit 1", "exit 2"]
