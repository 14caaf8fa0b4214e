"""The view of notebook 03 shows what the record says, follows its slider, and is quick."""

from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.recommender import LoadReplay


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def row(epoch, task, importance, experts_mean, **more):
    used = sum(weight >= 0.1 / len(importance) for weight in importance)
    return dict(
        epoch=epoch, task=task, importance=importance, load=importance, experts_mean=experts_mean, used=used, **more
    )


def result(gate, last_epoch=3, **more):
    """Weights move from the fair share to expert 1 (watch) and expert 2 (rating)."""
    rows = []
    for epoch in range(last_epoch + 1):
        part = epoch / last_epoch
        for task, expert in (("watch", 1), ("rating", 2)):
            weights = [(1 - part) / 4 + part * (e == expert) for e in range(4)]
            rows.append(row(epoch, task, weights, 4 - 3 * part, **more))
    return SimpleNamespace(config={"gate": gate}, curves={"routing": rows})


@pytest.fixture
def replay():
    return LoadReplay({"comet, λ = 0.1": result("comet", saturation=0.5), "hash": result("hash", 5)}, k=2)


def test_the_chosen_epoch_of_the_chosen_run_is_written_beside_each_task(replay):
    start = texts(replay.view("comet, λ = 0.1", 0))
    assert {"comet, λ = 0.1: watch", "comet, λ = 0.1: rating"} <= set(start)
    assert start.count("epoch 0: 4 of 4 in use, 50% of paths hard") == 2
    assert texts(replay.view("comet, λ = 0.1", 3)).count("epoch 3: 1 of 4 in use, 50% of paths hard") == 2


def test_a_gate_without_trees_has_no_share_of_hard_paths(replay):
    assert texts(replay.view("hash", 0)).count("epoch 0: 4 of 4 in use") == 2


def bars(replay, label, epoch):
    """Heights of what is filled in, in the order drawn: per task and expert the last epoch's bar, then this epoch's."""
    figure = replay.view(label, epoch)
    boxes = [collection.get_paths()[0].get_extents() for collection in figure.axes[0].collections]
    return [box.height for box in boxes]


def test_bars_are_as_high_as_the_weights_of_the_epoch_with_those_of_the_last_behind(replay):
    heights = bars(replay, "comet, λ = 0.1", 0)
    unit = 1.7  # inches for a weight of 1
    assert heights[1:8:2] == pytest.approx([unit / 4] * 4)
    assert heights[0:8:2] == pytest.approx([0, unit, 0, 0])
    assert heights[8:16:2] == pytest.approx([0, 0, unit, 0])  # rating


def test_only_epochs_that_all_runs_have_can_be_chosen_and_others_give_the_nearest(replay):
    assert replay.epochs == [0, 1, 2, 3]
    assert bars(replay, "comet, λ = 0.1", 9) == bars(replay, "comet, λ = 0.1", 3)
    assert bars(replay, "comet, λ = 0.1", 1) != bars(replay, "comet, λ = 0.1", 2)


def test_nothing_that_is_written_overlaps():
    """The longest line there is: it once ran into that of the next task."""
    longest = LoadReplay({"comet, λ = 0.001": result("comet", 10, saturation=1.0)}, k=2).view("comet, λ = 0.001", 10)
    renderer = FigureCanvasAgg(longest).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in longest.axes[0].texts if text.get_text()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_replay_is_quick_enough_for_a_slider():
    replay = LoadReplay({"comet": result("comet", 12, saturation=0.5)}, k=2)

    assert plain_figures(lambda: replay.view("comet", 7)) < IN_TIME
