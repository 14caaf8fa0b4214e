"""Figures of notebook 08 draw the numbers they are given."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moe_lab.plots import evolution
from moe_lab.plots.sheet import sheet


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def run(gate, shift=0.0):
    distances = [
        {"layer": layer, "step": step, "parameter": shift + step / 100, "function": shift + layer}
        for step in (0, 10, 20)
        for layer in (0, 1)
    ]
    epochs = [{"step": s, "valid_matched": 3 - s / 10 + shift, "valid_loss": 4 - s / 10 + shift} for s in (10, 20)]
    return SimpleNamespace(config={"gate": gate}, curves={"distances": distances, "epochs": epochs})


def test_functions_have_expert_colours_and_their_mean_is_black(ax):
    evolution.draw_functions(ax, [0, 1], [[0, 2], [4, 2]], target=[1, 1])
    assert [line.get_color() for line in ax.lines[:2]] == ["#0072B2", "#E69F00"]
    assert lines(ax)["their mean"].get_ydata().tolist() == [2, 2]
    assert lines(ax)["target"].get_ydata().tolist() == [1, 1]


def test_tracks_are_lines_with_their_own_style_and_marks_are_named(ax):
    evolution.draw_tracks(ax, {"copies": ([0, 5], [0, 0.5]), "masks": ([0, 5], [1, 0.2])}, marks={"hard": 3})
    assert lines(ax)["masks"].get_ydata().tolist() == [1, 0.2]
    assert lines(ax)["masks"].get_color() != lines(ax)["copies"].get_color()
    assert [text.get_text() for text in ax.texts] == ["hard"]


@pytest.mark.parametrize("log", [True, False])
def test_states_start_at_the_step_that_is_said(ax, log):
    evolution.draw_states(ax, {"reset": [1.0, 0.5], "copy": [0.1, 0.1]}, formula=[0.2, 0.3], first=3, log=log)
    assert lines(ax)["reset"].get_xdata().tolist() == [3, 4]
    assert lines(ax)["equation (5)"].get_ydata().tolist() == [0.2, 0.3]
    assert ax.get_yscale() == ("log" if log else "linear")


def test_distances_are_averaged_over_layers_and_begin_at_the_spawn():
    assert evolution.over_layers(run("dts"), "function") == ([0, 10, 20], [0.5, 0.5, 0.5])
    runs = {"evomoe": [run("evomoe"), run("evomoe", 0.2)], "dts": [run("dts")]}
    left, middle, right = evolution.draw_runs(runs, spawn=10).axes
    evomoe, dts = (lines(left)[evolution.RUN_STYLES[gate]["label"]] for gate in runs)
    assert evomoe.get_xdata().tolist() == [10, 20]
    assert evomoe.get_ydata() == pytest.approx([0.2, 0.3])  # mean of the two seeds
    assert dts.get_xdata().tolist() == [0, 10, 20]
    assert lines(middle)[evolution.RUN_STYLES["dts"]["label"]].get_ydata() == pytest.approx([0.5] * 3)
    assert lines(right)[evolution.RUN_STYLES["evomoe"]["label"]].get_ydata() == pytest.approx([2.1, 1.1])


def test_differences_are_dots_with_a_bar_at_the_mean(ax):
    evolution.draw_differences(ax, {"ρ = 0": [-0.1, 0.3], "ρ = 0.5": [0.2]})
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [[-0.1, 0.3], [0.2]]
    assert ax.collections[0].get_segments()[0][0][0] == pytest.approx(0.1)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ρ = 0", "ρ = 0.5"]


def test_a_small_table_of_distances_has_numbers_except_on_the_diagonal():
    _, ax = sheet(3, 3)
    evolution.distance_table(ax, (0.5, 0.5, 2, 2), [[0, 0.4], [0.4, 0]], title="apart")
    written = [text.get_text() for text in ax.texts]
    assert written.count("0.4") == 2 and "0.0" not in written and "apart" in written
    _, ax = sheet(3, 3)
    evolution.distance_table(ax, (0.5, 0.5, 2, 2), np.full((16, 16), 0.4))
    assert "0.4" not in [text.get_text() for text in ax.texts]
