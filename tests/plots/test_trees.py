"""Drawings of trees show what the gate's arrays say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from moe_lab.gates import CometGate
from moe_lab.plots.gates import draw_load, draw_per_seed, draw_used_experts, draw_weights, draw_weights_over_time
from moe_lab.plots.sheet import Chart, sheet
from moe_lab.plots.style import expert_colors
from moe_lab.plots.trees import (
    draw_partition,
    draw_shares,
    draw_tree,
    left_to_right_leaves,
    node_positions,
    node_reach,
    plane,
)

SQUARE = (0.0, 0.0, 2.0, 2.0)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_five_experts_are_nodes_7_8_4_5_6():
    assert left_to_right_leaves(5) == [7, 8, 4, 5, 6]


@given(st.integers(1, 33))
def test_leaves_stand_from_left_to_right_and_splits_between_their_children(n_experts):
    place = node_positions(n_experts)
    assert (np.diff(place[left_to_right_leaves(n_experts), 0]) > 0).all()
    for split in range(n_experts - 1):
        left, right = place[2 * split + 1], place[2 * split + 2]
        assert left[0] < place[split, 0] < right[0]
        assert place[split, 1] > left[1] == right[1]


@given(st.integers(1, 17), st.integers(1, 3))
def test_what_reaches_a_split_is_what_reaches_its_children(n_experts, k):
    gate = CometGate(2, n_experts, k, gamma=1.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)) * 100
    reach = node_reach(gate, x)
    assert torch.equal(reach[0], torch.ones(k, 5))
    for split in range(n_experts - 1):
        torch.testing.assert_close(reach[split], reach[2 * split + 1] + reach[2 * split + 2])
    leaves = reach[left_to_right_leaves(n_experts)].permute(2, 0, 1)
    assert torch.equal(leaves, gate(x).details["tree_probabilities"])


def test_the_area_of_a_node_grows_with_its_reach_and_leaves_have_expert_colours():
    _, ax = sheet(3, 3)
    draw_tree(ax, SQUARE, np.array([1.0, 0.75, 0.25]), title="a tree")  # two experts: root, leaf 0, leaf 1
    _, leaves = (c for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes()))
    assert leaves.get_sizes()[0] > leaves.get_sizes()[1]
    assert [tuple(color[:3]) for color in leaves.get_facecolors()] == [to_rgb(color) for color in expert_colors(2)]
    assert "a tree" in texts(ax)


def test_the_path_of_an_input_is_written_under_the_leaves_it_reaches_and_nowhere_else():
    _, ax = sheet(3, 3)
    draw_tree(ax, SQUARE, np.full(5, 0.5), path=np.array([1, 0.875, 0.125, 0, 0.875]))  # leaves 3, 4, 2
    assert texts(ax) == ["87.5%", "12.5%"]


def test_the_plane_starts_below_left_and_a_partition_shows_each_experts_own_colour_there():
    corners = plane(2)
    assert corners.tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    _, ax = sheet(3, 3)
    draw_partition(ax, SQUARE, torch.eye(4)[[0, 1, 2, 3]], point=(1.0, -1.0), title="four corners")
    image = ax.images[0]
    assert image.origin == "lower"
    shown = np.asarray(image.get_array())
    for expert, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        np.testing.assert_allclose(shown[row, column], to_rgb(expert_colors(4)[expert]))
    assert ax.lines[-1].get_xydata().tolist() == [[2.0, 0.0]]  # the marked input: right, below
    assert {"x₁", "x₂", "four corners"} <= set(texts(ax))


def test_weight_that_goes_nowhere_is_white():
    _, ax = sheet(3, 3)
    draw_partition(ax, SQUARE, torch.zeros(4, 3))
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), 1)


def test_shares_are_written_above_their_bars_and_zeros_are_not():
    _, ax = sheet(3, 3)
    draw_shares(ax, SQUARE, [0.75, 0.0, 0.25], title="weights")
    assert texts(ax) == ["75%", "25%", "weights"]


def test_a_chart_puts_data_where_its_box_says_and_cuts_off_the_rest():
    _, ax = sheet(4, 4)
    chart = Chart(ax, (1, 1, 2, 2), xlim=(0, 10), ylim=(0, 1), xticks=(0, 10), yticks=(0, 1), xlabel="step", title="p")
    assert chart.place(5, 0.5) == (2.0, 2.0)
    chart.line([0, 10], [1, 2])
    x, y = ax.lines[-1].get_data()
    assert (x[0], y[0]) == (1.0, 3.0) and np.isnan(y[1])
    assert {"step", "p", "0", "10", "1"} <= set(texts(ax))


def test_a_table_of_weights_writes_small_weights_and_leaves_exact_zeros_empty():
    ax = sheet(3, 3)[0].add_subplot()
    draw_weights(ax, torch.tensor([[1.0, 0.0], [0.001, 0.999]]), title="weights")
    assert texts(ax) == ["1.00", "0.00", "1.00"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "token")


@pytest.mark.parametrize("draw", [draw_weights_over_time, draw_load, draw_per_seed, draw_used_experts])
def test_axes_have_labels_and_titles(draw):
    ax = sheet(3, 3)[0].add_subplot()
    arguments = {
        draw_weights_over_time: ([[0.5, 0.5], [1.0, 0.0]],),
        draw_load: ([0.25, 0.75],),
        draw_per_seed: ({"comet": [1.0, 2.0], "hash": [0.5, 0.4]},),
        draw_used_experts: ({0.1: [1, 2], 10.0: [8, 8]}, 8),
    }[draw]
    draw(ax, *arguments, title="title", **({"xlabel": "share"} if draw is draw_per_seed else {}))
    assert ax.get_xlabel() and ax.get_title(loc="left") + ax.get_title() == "title"


def test_used_experts_show_a_dot_per_seed_and_a_line_through_the_means():
    ax = sheet(3, 3)[0].add_subplot()
    draw_used_experts(ax, {10.0: [8, 6], 0.1: [1, 3]}, 8)
    assert ax.lines[0].get_xydata().tolist() == [[0.1, 2.0], [10.0, 7.0]]
    assert [line.get_ydata().tolist() for line in ax.lines[1:3]] == [[1, 3], [8, 6]]
