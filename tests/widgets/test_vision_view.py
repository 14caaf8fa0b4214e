"""The view of notebook 04 shows what the record says, follows its sliders, and is quick."""

import io
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.vision import RoutingReplay

TASKS = {"top_left": "top left", "bottom_right": "bottom right"}
IMAGES = torch.arange(2 * 25).reshape(2, 1, 5, 5)
LABELS = torch.tensor([[7, 1], [4, 0]])
SOFT, FIRST, LAST = [0.25] * 4, [1.0, 0, 0, 0], [0, 0, 0, 1.0]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def result(gate, n_epochs=2, **changes):
    """Before training all four experts; then image 0 goes to the first, image 1 to the last; two equal trees."""
    rows = []
    for epoch in range(n_epochs):
        weights = [SOFT, SOFT] if epoch == 0 else [FIRST, LAST]
        for task in TASKS:
            row = {"epoch": 5 * epoch, "final": False, "task": task, "weights": weights}
            if gate == "comet":
                row["leaves"] = [[[w, w] for w in image] for image in weights]
            rows.append(row)
    rows += [{**row, "final": True} for row in rows[-2:]]
    return SimpleNamespace(config={"gate": gate}, curves={"watched": rows, **changes})


@pytest.fixture
def replay():
    return RoutingReplay({"comet": result("comet"), "topk": result("topk")}, IMAGES, LABELS, TASKS)


def test_epochs_and_images_are_those_of_the_record_without_the_restored_model(replay):
    assert replay.epochs("comet") == [0, 5]
    assert replay.n_images == 2


def test_the_image_and_the_number_of_experts_that_it_uses_are_written(replay):
    before, after = texts(replay.view("comet", 1, 0)), texts(replay.view("comet", 1, 1))
    assert {"image 1: 4, 0", "comet\nafter epoch 0", "top left: 4 of 4 experts"} <= set(before)
    assert {"comet\nafter epoch 5", "top left: 1 of 4 experts", "bottom right: 1 of 4 experts"} <= set(after)
    figure = replay.view("comet", 1, 1)
    assert figure.axes[0].images[0].get_array().tolist() == IMAGES[1, 0].tolist()


def test_trees_are_drawn_for_comet_only(replay):
    assert texts(replay.view("comet", 0, 1)).count("tree 1") == 2
    assert "tree 0" not in texts(replay.view("topk", 0, 1))


def test_every_bar_has_the_number_of_its_expert(replay):
    written = texts(replay.view("topk", 0, 0))
    assert all(written.count(str(expert)) == 2 for expert in range(4))
    assert written.count("25%") == 8


def png(replay, **chosen):
    file = io.BytesIO()
    replay.view(**{"gate": "comet", "image": 0, "moment": 1, **chosen}).savefig(file, format="png")
    return file.getvalue()


@pytest.mark.parametrize("change", [{"gate": "topk"}, {"image": 1}, {"moment": 0}])
def test_every_slider_changes_the_picture(replay, change):
    assert png(replay) == png(replay)
    assert png(replay, **change) != png(replay)


def test_a_moment_after_the_last_is_the_last(replay):
    assert png(replay, moment=9) == png(replay, moment=-1) == png(replay, moment=1)


def test_a_run_that_watched_nothing_or_more_than_is_shown_is_refused():
    with pytest.raises(ValueError, match="watched_images > 0"):
        RoutingReplay({"comet": result("comet", watched=[])}, IMAGES, LABELS, TASKS)
    with pytest.raises(ValueError, match="watched 2 images, only 1"):
        RoutingReplay({"comet": result("comet")}, IMAGES[:1], LABELS[:1], TASKS)


def test_replay_is_quick_enough_for_a_slider(replay):
    assert plain_figures(lambda: replay.view("comet", 1, 1)) < IN_TIME
