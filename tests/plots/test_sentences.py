"""Figures of notebook 11 show what the Results say."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moe_lab.plots import sentences as draw
from moe_lab.plots.language import language_style
from moe_lab.results import Result


def run(gate, seed=0, *, metrics=None, curves=None, **config):
    """A finished Result of nothing."""
    config = {"gate": gate, "seed": seed, **config}
    return Result("toy", config, path=None, seed=seed, metrics=metrics or {}, curves=curves or {})


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_loads_are_bars_with_the_numbers_of_large_shares():
    loads = {"hash": {"all tokens": [0.5, 0.3, 0.2], "chosen tokens": [0.9, 0.1, 0.0]}}
    (sheet,) = draw.draw_loads(loads).axes
    found = texts(sheet)
    assert {"hash", "all tokens", "chosen tokens", "0%", "100%"} <= set(found)
    assert [text for text in found if text.isdigit()] == ["0", "1", "2", "0"]
    assert len(sheet.collections) == 5  # a share of 0 is not drawn


def test_a_metric_has_a_dot_per_run_a_bar_per_mean_and_hollow_dots_without_pretraining(ax):
    runs = [run("dense", s, metrics={"a": 0.5 + 0.1 * s}, pretrain=True) for s in range(3)]
    runs += [run("evomoe", metrics={"a": 0.9}, pretrain=True), run("dense", metrics={"a": 0.4}, pretrain=False)]
    draw.draw_metric(ax, runs, "a", lines={"floor": 0.3}, title="score")
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert sorted(names) == ["dense", "dense, no pre-training", "evomoe"]
    dots = {names[int(line.get_xdata()[0])]: line for line in ax.lines if line.get_marker() == "o"}
    assert dots["dense"].get_ydata() == pytest.approx([0.5, 0.6, 0.7])
    assert dots["dense, no pre-training"].get_markerfacecolor() == "white"
    assert dots["evomoe"].get_color() == language_style("evomoe")["color"]
    bars = sorted(segment[0][1] for collection in ax.collections for segment in collection.get_segments())
    assert bars == pytest.approx([0.4, 0.6, 0.9])
    assert texts(ax) == ["floor"] and ax.get_title(loc="left") + ax.get_title() == "score"


def test_validation_curves_are_means_over_seeds_and_gates_without_the_curve_are_left_out(ax):
    rows = [[{"step": 10, "valid_loss": 2.0 + s}, {"step": 20, "valid_loss": 1.0 + s}] for s in range(2)]
    runs = [run("hash", s, curves={"pretraining": rows[s]}) for s in range(2)] + [run("dense", curves={"epochs": []})]
    draw.draw_validation(ax, runs, "pretraining")
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [10, 20] and line.get_ydata() == pytest.approx([2.5, 1.5])
    assert len(ax.collections) == 1 and ax.get_xlabel() == "optimiser step"


def test_domains_have_a_mark_per_run(ax):
    values = {"sums": 0.5, "brackets": 0.9}
    draw.draw_domains(ax, [run(gate, metrics={"accuracy_by_domain": values}) for gate in ("dense", "hash")])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["sums", "brackets"]
    marks = [line for line in ax.lines if line.get_marker() in "*x"]
    assert len(marks) == 2 and all(line.get_ydata() == pytest.approx([0.5, 0.9]) for line in marks)
    assert marks[0].get_xdata()[0] != marks[1].get_xdata()[0]  # beside each other


def test_sentences_over_tokens_stand_beside_the_power(ax):
    runs = [run("switch", s, metrics={"test_accuracy": 0.9 + 0.05 * s, "exact": 0.2 + 0.3 * s}) for s in range(2)]
    draw.draw_sentences(ax, runs, length=10)
    curve, points = ax.lines
    x, y = curve.get_xdata(), curve.get_ydata()
    assert np.allclose(y, x**10) and x[0] < 0.9 and x[-1] == 1
    assert points.get_xydata().tolist() == pytest.approx(np.array([[0.9, 0.2], [0.95, 0.5]]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["$p^n$, n = 10", "switch"]


def test_errors_have_a_bar_per_gate_and_kind(ax):
    shares = {"dense": {"noun": 0.2, "verb": 0.1}, "hash": {"noun": 0.05, "verb": 0.0}}
    draw.draw_errors(ax, shares, title="what is wrong")
    assert sorted(bar.get_width() for bar in ax.patches) == [0.0, 0.05, 0.1, 0.2]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["noun", "verb"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first kind on top
    middles = {round(bar.get_y() + bar.get_height() / 2, 3) for bar in ax.patches}
    assert middles == {-0.2, 0.2, 0.8, 1.2}


def test_panels_stand_side_by_side():
    panels = {"accuracy": ([run("dense", metrics={"a": 1.0})], "a"), "BLEU": ([run("hash", metrics={"b": 2.0})], "b")}
    figure = draw.metric_panels(panels)
    assert [ax.get_title() or ax.get_title(loc="left") for ax in figure.axes] == ["accuracy", "BLEU"]
    assert not plt.fignum_exists(figure.number)
