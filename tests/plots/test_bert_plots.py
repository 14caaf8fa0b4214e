"""Figures of notebook 07 show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moe_lab.bench.timing import Timing
from moe_lab.plots import bert as draw
from moe_lab.results import Result


def run(gate, seed=0, *, metrics=None, curves=None):
    """A finished Result of nothing."""
    config = {"gate": gate, "seed": seed}
    return Result("toy", config, path=None, seed=seed, metrics=metrics or {}, curves=curves or {})


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_what_does_not_route_has_a_style_of_its_own():
    styles = [draw.bert_style(gate) for gate in ("teacher", "pruned", "all", "hash", "topk", "comet")]
    assert len({(style["color"], style["marker"]) for style in styles}) == 6
    assert draw.bert_style("comet+")["linestyle"] == "--"


def test_effects_stand_over_importance_with_the_lines_equal_and_half(ax):
    importance = [np.array([0.1, 0.01]), np.array([1.0, 0.5])]
    draw.draw_effects(ax, importance, [values / 2 for values in importance])
    first, second, equal, half = ax.lines
    assert first.get_ydata() == pytest.approx([0.05, 0.005]) and second.get_xdata() == pytest.approx([1.0, 0.5])
    assert equal.get_ydata() == pytest.approx([0.01, 1.0]) and half.get_ydata() == pytest.approx([0.005, 0.5])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["layer 0", "layer 1", "equal", "half"]


def test_kept_neurons_have_a_line_per_order_and_the_teacher_is_dotted(ax):
    draw.draw_kept(ax, {"best": {1: 0.8, 4: 0.9}, "random": {1: 0.7, 4: 0.85}}, whole=0.95)
    whole, best, random = ax.lines
    assert set(whole.get_ydata()) == {0.95} and whole.get_linestyle() == ":"
    assert best.get_ydata() == pytest.approx([0.8, 0.9]) and random.get_xdata() == pytest.approx([1, 4])
    assert best.get_marker() != random.get_marker()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4"]


def test_scores_have_a_mark_per_run_and_a_bar_per_mean(ax):
    groups = {
        "hash": [run("hash", s, metrics={"test_score": 0.8 + 0.1 * s}) for s in range(2)],
        "one": [run("pruned", metrics={"test_score": 0.7})],
    }
    draw.draw_scores(ax, groups, lines={"floor": 0.5}, title="t")
    marks = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert [line.get_ydata() for line in marks] == [pytest.approx([0.8, 0.9]), pytest.approx([0.7])]
    bars = [collection.get_segments()[0][0][1] for collection in ax.collections]
    assert bars == pytest.approx([0.85, 0.7])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["hash", "one"]
    assert [text.get_text() for text in ax.texts] == ["floor"] and ax.get_ylabel() == "accuracy"


def test_runs_of_several_teachers_stand_beside_each_other(ax):
    runs = [run("hash", metrics={"test_score": 0.5}) for _ in range(3)]
    for teacher, each in enumerate(runs):
        each.config["teacher_seed"] = teacher
    draw.draw_scores(ax, {"hash": runs})
    left, middle, right = ax.lines[0].get_xdata()
    assert left < middle == 0 < right < 0.5


def test_pairs_have_a_mark_each_and_a_bar_per_teacher(ax):
    table = pd.DataFrame([[1.0, 3.0], [-1.0, np.nan]], index=[0, 2])
    draw.draw_pairs(ax, {"a − b": table, "c − b": table.loc[[2]]}, title="t")
    marks = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert [list(line.get_ydata()) for line in marks] == [[1.0, 3.0], [-1.0], [-1.0]]
    assert marks[0].get_marker() != marks[1].get_marker() == marks[2].get_marker()
    assert [collection.get_segments()[0][0][1] for collection in ax.collections] == pytest.approx([2.0, -1.0, -1.0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["teacher 0", "teacher 2"]


def test_costs_are_medians_with_a_line_from_least_to_most(ax):
    timed = pd.DataFrame({"FLOPs": [0.5, 0.5, 0.5], "time, batch 1": [2.0, 3.0, 5.0]})
    draw.draw_costs(ax, {"hash": timed, "comet": timed[["FLOPs"]]})
    marks = [line for line in ax.lines if line.get_linestyle() == "None" or line.get_marker() not in ("None", "")]
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([0.5, 3.0, 0.5])
    (start, _), (end, _) = ax.collections[1].get_segments()[0]
    assert (start, end) == (2.0, 5.0)
    assert ax.get_xscale() == "log" and [label.get_text() for label in ax.get_yticklabels()] == ["hash", "comet"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["FLOPs", "time, batch 1"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top


def test_experts_are_means_over_layers_and_a_gate_is_named_once(ax):
    rows = [
        {"step": step, "layer": layer, "experts_mean": 4 - layer - step / 10} for step in (0, 10) for layer in (0, 1)
    ]
    draw.draw_experts(ax, [run("comet", s, curves={"routing": rows}) for s in range(2)])
    assert [line.get_ydata() for line in ax.lines] == [pytest.approx([3.5, 2.5])] * 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["comet"]


def test_latencies_are_medians_of_processor_time():
    timing = Timing(wall=[9.0, 9.0, 9.0], cpu=[0.001, 0.002, 0.006])
    figure = draw.draw_latencies({"batch 1": {"teacher": timing, "hash": timing}, "batch 64": {"teacher": timing}})
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == pytest.approx([2.0, 2.0]) and len(second.patches) == 1
    assert [label.get_text() for label in first.get_yticklabels()] == ["teacher", "hash"]
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the first on top
    assert (first.get_title() or first.get_title(loc="left")) == "batch 1"
    assert not plt.fignum_exists(figure.number)


def test_words_are_rows_with_one_heat_map_per_title():
    table = pd.DataFrame([[0.25, 0.75], [1.0, 0.0]], index=["noun", "verb"])
    figure = draw.draw_words({"hash": table, "comet": table.iloc[::-1]})
    (sheet,) = figure.axes
    found = [text.get_text() for text in sheet.texts]
    assert found[:2] == ["noun", "verb"] and {"hash", "comet"} <= set(found)
    assert found.count("0.75") == 2 and "0.00" not in found
    assert [image.get_array().tolist() for image in sheet.images] == [[[0.25, 0.75], [1.0, 0.0]]] * 2
