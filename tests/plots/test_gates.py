"""Drawings of what gates do show what the numbers say."""

import numpy as np
import pytest

from moe_lab.plots.gates import draw_confusion, draw_cost, draw_per_seed
from moe_lab.plots.sheet import sheet
from moe_lab.plots.style import GATE_COLORS
from moe_lab.results import Result


@pytest.fixture
def ax():
    return sheet(3, 3)[0].add_subplot()


def test_confusion_is_a_share_of_each_clusters_tokens_and_survives_an_empty_cluster(ax):
    draw_confusion(ax, [[3, 1], [0, 0]], title="who gets whom")
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "planted cluster")


def test_the_first_gate_stands_on_top_also_when_two_axes_share_their_rows():
    axes = sheet(3, 3)[0].subplots(1, 2, sharey=True)
    for ax in axes:
        draw_per_seed(ax, {"comet": [1.0], "topk, noise": [2.0, 3.0]}, xlabel="share")
    bottom, top = axes[0].get_ylim()
    assert bottom > top and [label.get_text() for label in axes[0].get_yticklabels()] == ["comet", "topk, noise"]
    assert axes[1].lines[1].get_color() == GATE_COLORS["topk"]


def test_cost_has_a_mark_per_run_and_tells_variants_of_one_gate_apart(ax, tmp_path):
    runs = [Result("toy", {}, tmp_path / "x.json", metrics={"cost": c, "error": 1 / c}) for c in (1, 2)]
    draw_cost(ax, {"topk": runs, "topk, noise": runs, "comet": runs[:1]}, cost="cost", metric="error")
    assert [line.get_fillstyle() for line in ax.lines] == ["full", "none", "full"]
    assert np.array_equal(ax.lines[1].get_xydata(), [[1, 1], [2, 0.5]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["topk", "topk, noise", "comet"]
