"""The views of notebook 12 show what the package decides, and redraw quickly."""

import io

import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.exits import ThresholdView, draw_gates, gates_view

COSTS = torch.tensor([0.25, 0.5, 1.0])
CONFIDENCES = torch.tensor([[0.9, 0.95, 0.9], [0.5, 0.8, 0.9], [0.3, 0.4, 0.5], [0.6, 0.6, 0.6]])
RIGHT = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]]).bool()


@pytest.fixture
def view():
    return ThresholdView(CONFIDENCES, RIGHT, COSTS, torch.tensor([0, 0, 1, 1]), learned=[(0.4, 0.75)])


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_three_gates_by_hand():
    written = texts(gates_view(0.2, 0.3, 0.4))
    # direct: 2 g + S = 0.4, 0.8, 1.3; the others ask for g of 0.5
    assert "direct: leaves at 3" in written and "2 g + S: 0.40, 0.80, 1.30; first ≥ 1" in written
    assert "stick_breaking: leaves at 4" in written and "cumulative: leaves at 4" in written
    for probability in ("0.20", "0.24", "0.22", "0.34"):  # 0.8 * 0.3, 0.8 * 0.7 * 0.4, the rest
        assert probability in written


def test_any_number_of_gates_can_be_drawn():
    assert "direct: leaves at 1" in texts(draw_gates([0.5]))
    assert png(draw_gates([0.1] * 6)) != png(draw_gates([0.2] * 6))


def test_everybody_leaves_at_the_first_exit_that_is_sure_enough(view):
    now = view.at(0.7)
    assert now.exits.tolist() == [0, 1, 2, 2] and now.shares == pytest.approx([0.25, 0.25, 0.5])
    assert now.cost == pytest.approx((0.25 + 0.5 + 1 + 1) / 4) and now.accuracy == pytest.approx(3 / 4)
    assert view.at(0.0).cost == pytest.approx(0.25) and view.at(1.0).cost == pytest.approx(1.0)


def test_the_view_says_cost_accuracy_and_mean_exit_by_difficulty(view):
    written = texts(view.view(0.7))
    assert "threshold 0.70: cost 0.69, accuracy 75.0 %" in written
    assert "mean exit by difficulty: 1.5, 3.0" in written
    assert png(view.view(0.7)) != png(view.view(0.2))


def test_difficulty_and_learned_points_may_be_missing():
    plain = ThresholdView(CONFIDENCES, RIGHT, COSTS)
    assert not any("difficulty" in text or "learned" in text for text in texts(plain.view(0.5)))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        ThresholdView(CONFIDENCES, RIGHT, COSTS[:2])


@pytest.mark.parametrize("which", ["gates", "threshold"])
def test_views_are_quick_enough_for_a_slider(which, view):
    assert plain_figures(lambda: gates_view(0.1, 0.2, 0.3) if which == "gates" else view.view(0.6)) < IN_TIME
