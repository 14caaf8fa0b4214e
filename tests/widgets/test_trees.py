"""Views behind the sliders of notebook 02: fast, and true to the gate."""

import io

import numpy as np
import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.gates import CometGate, smooth_step
from moe_lab.widgets.trees import MAX_DEPTH, EntropyReplay, random_tree_gate, smooth_step_view, tree_view

GENERATOR = torch.Generator().manual_seed(0)


def recorded(n_snapshots=3, scale=1.0):
    rows = []
    for step in range(n_snapshots):
        gate = CometGate(2, 8, 2, gamma=1.0, generator=GENERATOR)
        torch.nn.init.normal_(gate.split.weight, std=scale * step, generator=GENERATOR)
        state = {name: value.tolist() for name, value in gate.state_dict().items()}
        rows.append({"step": 10 * step, "experts_per_token": 8.0 - step, "gate": state})
    return rows


@pytest.fixture(scope="module")
def replay():
    return EntropyReplay({0.0: recorded(), 0.3: recorded(scale=50.0)}, n_experts=8, k=2, gamma=1.0)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    "view", [lambda: smooth_step_view(0.5), lambda: tree_view(3, 2), lambda: tree_view(4, 1), "replay"]
)
def test_a_slider_is_answered_within_a_fifth_of_a_second(view, replay):
    view = (lambda: replay.view(0.3, 1)) if view == "replay" else view
    assert plain_figures(view) < IN_TIME


def test_the_smooth_step_is_drawn_with_its_band_of_width_gamma():
    axes = smooth_step_view(gamma=0.6).axes[0]
    curve = next(line for line in axes.lines if len(line.get_xdata()) == 601)
    t = torch.linspace(-1.5, 1.5, 601)
    bottom, height = 0.45, 1.8  # of the box; probabilities run from -0.05 to 1.05 in it
    expected = bottom + (smooth_step(t, 0.6).numpy() + 0.05) / 1.1 * height
    np.testing.assert_allclose(curve.get_ydata(), expected, atol=1e-6)
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.width == pytest.approx(0.6 / 3 * 3.0)  # 3 units of t on 3 inches


@pytest.mark.parametrize("depth", range(1, MAX_DEPTH + 1))
def test_every_region_of_a_hard_random_tree_has_its_share_of_the_square(depth):
    from moe_lab.plots.trees import plane

    load = random_tree_gate(depth, 1, gamma=1e-3)(plane(61)).load
    assert load.shape == (2**depth,)
    torch.testing.assert_close(load, torch.full((2**depth,), 2.0**-depth), atol=0.03, rtol=0)


def test_a_deeper_tree_refines_the_shallower_one():
    x = 2 * torch.rand(400, 2, generator=GENERATOR) - 1
    coarse, fine = (random_tree_gate(depth, 1, gamma=1e-3)(x).weights.argmax(-1) for depth in (2, 3))
    assert torch.equal(fine // 2, coarse)


def test_tree_view_shows_as_many_trees_and_maps_as_there_are_and_the_weights_of_the_input():
    figure = tree_view(depth=2, k=3, gamma=0.05, x1=0.3, x2=-0.4)
    assert len(figure.axes[0].images) == 3 + 1
    assert {"tree 0", "tree 1", "tree 2", "all trees together"} <= set(texts(figure))
    used = int(random_tree_gate(2, 3, 0.05)(torch.tensor([[0.3, -0.4]])).experts_per_token)
    assert f"this input: {used} of 4 experts" in texts(figure)


@pytest.mark.parametrize(
    "change", [{"depth": 3}, {"k": 1}, {"gamma": 5.0}, {"x1": -0.8, "x2": 0.8}], ids=["depth", "k", "gamma", "input"]
)
def test_every_slider_of_the_tree_changes_the_picture(change):
    def png(**values):
        file = io.BytesIO()
        tree_view(**values).savefig(file, format="png")
        return file.getvalue()

    assert png() == png()
    assert png(**change) != png()


@pytest.mark.parametrize("depth", [0, MAX_DEPTH + 1])
def test_a_depth_that_cannot_be_drawn_is_refused(depth):
    with pytest.raises(ValueError, match="depth must be 1"):
        tree_view(depth=depth)


def test_replay_shows_the_gate_of_the_chosen_snapshot(replay):
    state = replay.snapshots[0.3][2]["gate"]
    assert replay.gate(0.3, 2).split.weight.tolist() == state["split.weight"]
    assert replay.gate(0.3, -1).leaf.bias.tolist() == state["leaf.bias"]
    figure = replay.view(0.3, 1)
    assert {"step 10, λ = 0.3", "experts per token: 7.00", "step", "λ 0", "λ 0.3"} <= set(texts(figure))


@pytest.mark.parametrize("snapshots", [{}, {0.0: []}, {0.0: [1], 0.3: [1, 2]}])
def test_replay_wants_series_of_one_length(snapshots):
    with pytest.raises(ValueError, match="one length"):
        EntropyReplay(snapshots, n_experts=8, k=2, gamma=1.0)
