"""Figures of notebook 06 draw the numbers of their pools."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moe_lab.plots.budget import draw_budget, draw_null, draw_selection, draw_soft_phase
from moe_lab.results import Result
from moe_lab.tuning import Pool, expected_best, selection_curves


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def pool(shift=0.0, n=20):
    return Pool.of(shift + np.arange(n), shift + np.arange(n))


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_budget_curves_are_the_exact_expectation(ax):
    draw_budget(ax, {"hash": pool(), "hash+": pool(-1)}, title="", controls={"hash+": pool(-2)})
    assert lines(ax)["hash"].get_ydata() == pytest.approx(expected_best(pool(), range(1, 21)))
    assert lines(ax)["hash+, nothing learned"].get_ydata()[0] == pytest.approx(9.5 - 2)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "5", "10", "20"]


def test_null_curves_end_where_chance_has_shown_nothing_and_markers_say_their_number(ax):
    draw_null(ax, {"topk+": np.array([0.5, 1.0, 2.0, 4.0])}, 20, title="", observed={"topk+": 6.7})
    curve = lines(ax)["topk+"]
    assert curve.get_xdata().max() <= 4
    assert curve.get_ydata()[0] == (1 + 3) / 5
    assert [text.get_text() for text in ax.texts] == ["topk+: 6.7"]
    marker = ax.lines[-1]
    assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (6.7, 1 / 5)


def test_a_ratio_below_one_stands_at_the_edge_with_its_number(ax):
    draw_null(ax, {"topk+": np.array([0.5, 1.0, 2.0])}, 20, title="", observed={"topk+": 0.4})
    assert ax.lines[-1].get_xdata()[0] == 1
    assert ax.texts[0].get_text() == "topk+: 0.4"


def test_selection_starts_at_zero(ax):
    draw_selection(ax, selection_curves(pool(), 10), title="")
    assert [line.get_ydata()[0] for line in ax.lines] == [0, 0, 0]


def test_soft_phase_shows_means_by_its_length_beside_the_bare_gate(ax):
    def rows(gate, losses):
        return [
            {"gate": gate, "test_loss": loss, "drawn": {"permutation_epochs": epochs}}
            for epochs, of in losses.items()
            for loss in of
        ]

    study = Result(
        "toy", {}, None, curves={"trials": rows("hash", {0: [5, 7]}) + rows("hash+", {1: [4, 6], 2: [3, 3]})}
    )
    control = Result("toy", {}, None, curves={"trials": rows("hash+", {1: [4, 4], 2: [2, 4]})})
    draw_soft_phase(ax, study, control, "hash", title="")
    means = [container[0].get_ydata().tolist() for container in ax.containers]
    assert means == [[6], [5, 3], [4, 3]]


def test_soft_phase_of_a_study_that_searches_for_a_fraction_of_the_epochs_it_draws(ax):
    rows = [{"gate": gate, "test_loss": 1.0, "drawn": {"permutation_epochs": 3}} for gate in ("hash", "hash+") * 2]
    study, control = (Result("toy", {"search_scale": 0.2}, None, curves={"trials": rows}) for _ in range(2))
    draw_soft_phase(ax, study, control, "hash", title="")
    x = [float(container[0].get_xdata()[0]) for container in ax.containers]
    assert x[0] == 0 and all(abs(at - 0.6) < 0.02 for at in x[1:])
