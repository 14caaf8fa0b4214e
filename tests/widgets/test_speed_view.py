"""The view of notebook 15 shows the package's gate, capacity and dispatch, and redraws quickly."""

import io

import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.speed import DispatchView


@pytest.fixture
def view():
    return DispatchView(n_tokens=30, n_experts=5)


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_are_sorted_by_expert_and_each_pair_has_one(view, k):
    flow = view.at(1.0, k)
    row = flow.order.row
    assert sorted(row[row >= 0].tolist()) == list(range(30 * k)) and torch.equal(row >= 0, flow.kept)
    for expert, (start, end) in enumerate(zip([0, *flow.order.ends.tolist()], flow.order.ends.tolist(), strict=False)):
        assert sorted(row[flow.kept[:, expert], expert].tolist()) == list(range(start, end))
    assert flow.dropped == 0 and flow.limit is None


def test_loads_become_uneven_with_the_slider(view):
    slowest = [view.at(unevenness).slowest for unevenness in (0.0, 1.0, 4.0)]
    assert slowest == sorted(slowest) and slowest[-1] > 1.5
    assert view.at(4.0).kept.sum(0).argmax() == 0


def test_capacity_drops_late_tokens_and_pads_early_ones(view):
    flow = view.at(4.0, 2, 1.0)
    assert flow.limit == 12 and int(flow.kept.sum(0).max()) <= 12
    assert flow.dropped == pytest.approx(1 - int(flow.kept.sum()) / 60)
    assert flow.padded == pytest.approx(1 - int(flow.kept.sum()) / 60)  # 5 experts of 12
    lost = (flow.chosen & ~flow.kept)[:, 0].nonzero()
    assert lost.min() > flow.kept[:, 0].nonzero().max()


def test_the_view_says_what_was_counted(view):
    flow, written = view.at(2.0, 2, 1.0), texts(view.view(2.0, 2, 1.0))
    assert f"{int(flow.kept.sum())} rows, by expert" in written and "capacity 12" in written
    assert any(f"dropped: {flow.dropped:.0%} of pairs" in text for text in written)
    assert "mean" in texts(view.view(2.0)) and png(view.view(2.0)) != png(view.view(0.0))


def test_sizes_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="most"):
        DispatchView(n_experts=2, most=3)


def test_the_view_is_quick_enough_for_a_slider():
    view = DispatchView()

    assert plain_figures(lambda: view.view(1.5, 3, 1.25)) < IN_TIME
