"""The view of notebook 13 shows what the package decides, and redraws quickly."""

import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.jei import ReplayView

COSTS = torch.tensor([0.3, 0.6, 1.0])
LOSSES = torch.tensor([[1.2, 0.5, 0.3], [0.1, 0.1, 0.1], [2.0, 1.0, 0.0], [0.5, 0.6, 0.7]])
RIGHT = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 0, 0]]).bool()
EXITS = torch.tensor([[1, 0, 2, 0], [0, 0, 0, 0]])


def make(**changes):
    parts = {"exits": EXITS, "pictures": torch.rand(2, 8, 8), "rows": [0, 2], **changes}
    return ReplayView(LOSSES, RIGHT, COSTS, [0.5, 3.0], **parts)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_best_exits_at_a_price_by_hand():
    asked = make().asked(1.0)  # 0.3: 1.5 1.1 1.3 | .4 | 2.3 1.6 1.0 | .8 -> exits 2, 1, 3, 1
    assert asked.shares == pytest.approx([0.5, 0.25, 0.25])
    assert asked.cost == pytest.approx((0.6 + 0.3 + 1.0 + 0.3) / 4)
    assert asked.accuracy == 1.0


def test_gates_of_the_nearest_trained_price_are_replayed():
    view = make()
    assert [view.nearest(price) for price in (0.0, 1.7, 1.8, 9.0)] == [0, 0, 1, 1]
    written = texts(view.view(0.2))
    assert "gates, trained for λ = 0.5\ncost 0.55, accuracy 100.0 %" in written
    assert "gates, trained for λ = 3\ncost 0.30, accuracy 50.0 %" in texts(view.view(3.0))


def test_targets_of_the_chosen_samples_move_with_the_price():
    view = make()
    assert [text for text in texts(view.view(0.0)) if text.startswith("t = ")] == ["t = 0 0", "t = 0 0"]
    assert [text for text in texts(view.view(1.0)) if text.startswith("t = ")] == ["t = 0 1", "t = 0 0"]
    assert [text for text in texts(view.view(4.0)) if text.startswith("t = ")] == ["t = 1 1", "t = 1 1"]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        ReplayView(LOSSES, RIGHT[:, :2], COSTS, [0.5], EXITS[:1], torch.rand(1, 8, 8), [0])
    with pytest.raises(ValueError, match=r"must be \(prices, samples\) = \(2, 4\)"):
        make(exits=EXITS[:1])
    with pytest.raises(ValueError, match="one picture for each"):
        make(rows=[0])
    with pytest.raises(ValueError, match="at least one"):
        make(rows=[], pictures=torch.rand(0, 8, 8))


def test_the_view_is_quick_enough_for_a_slider():
    draw = torch.Generator().manual_seed(0)
    losses, costs = torch.rand(2400, 5, generator=draw), torch.linspace(0.2, 1, 5)
    exits = torch.randint(5, (5, 2400), generator=draw)
    pictures = torch.rand(5, 16, 16, generator=draw)
    view = ReplayView(losses, losses < 0.5, costs, [0, 0.1, 0.3, 1, 2], exits, pictures, range(5))

    assert plain_figures(lambda: view.view(0.3)) < IN_TIME
