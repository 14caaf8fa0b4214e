"""Figures of the dense-to-sparse gate show what the Results say, and ablations are told apart by what they changed."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from moe_lab.experiments.evomoe_language import LanguageConfig
from moe_lab.gates import TemperatureSchedule
from moe_lab.plots import sparsity as draw
from moe_lab.plots.sheet import sheet
from moe_lab.results.plain import to_plain

BASE = LanguageConfig.profile("quick", gate="dts")


def result(seed=0, test_loss=2.0, experts=3.0, **changes):
    rows = [
        {"step": step, "train_experts": k, "valid_loss": loss, "valid_matched": matched}
        for step, k, loss, matched in ((10, 8.0, 3.0, 2.9), (20, 4.0, 2.5, 2.4), (30, 1.0, 2.2, 2.2))
    ]
    config = to_plain(dataclasses.replace(BASE, seed=seed, **changes), "config")
    metrics = {"test_loss": test_loss, "experts_per_token": experts}
    return SimpleNamespace(seed=seed, config=config, metrics=metrics, curves={"epochs": rows})


@pytest.fixture
def ax():
    return sheet(3, 3)[0].add_subplot()


def test_temperatures_are_those_of_the_schedules(ax):
    schedule = TemperatureSchedule(2.0, 0.5, 10)
    draw.draw_temperatures(ax, {"linear": schedule}, 12, title="falling")
    assert ax.lines[0].get_ydata().tolist() == [schedule(step) for step in range(13)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "temperature τ")


def test_mean_experts_run_from_hot_at_the_left_to_cold_at_the_right(ax):
    draw.draw_mean_experts(ax, (2.0, 1.0, 0.1), {"σ = 1": [8, 6, 2], "σ = 3": [7, 4, 1]}, 8)
    left, right = ax.get_xlim()
    assert left > 2 > 0.1 > right
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[8, 6, 2], [7, 4, 1]]
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()  # colour alone carries no message


def test_experts_over_training_are_means_of_the_steps_before_each_evaluation(ax):
    draw.draw_experts_over_training(ax, {"a": result(steps=30, evaluate_every=10)})
    values, edges, _ = ax.patches[0].get_data()
    assert values.tolist() == [8, 4, 1] and edges.tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("changes", "soft", "hard"),
    [
        ({"gate": "dts"}, (0, 20), 25),
        ({"gate": "evomoe", "shared_share": 0.1}, (10, 30), 35),
        ({"gate": "dts", "hard_share": 1.0}, (0, 20), None),
    ],
)
def test_phases_are_marked_where_they_are(ax, changes, soft, hard):
    draw.mark_phases(ax, result(**{"steps": 100, "soft_share": 0.2, "hard_share": 0.25, **changes}).config)
    box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (round(box.x0), round(box.x1)) == soft
    assert [line.get_xdata()[0] for line in ax.lines] == ([] if hard is None else [hard])


def test_losses_of_both_rules_and_their_difference(ax):
    draw.draw_losses_by_rule(ax, {"a": result()})
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[3.0, 2.5, 2.2], [2.9, 2.4, 2.2]]
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    other = sheet(3, 3)[0].add_subplot()
    draw.draw_price_of_one(other, {"a": result()})
    np.testing.assert_allclose(other.lines[0].get_ydata(), [0.1, 0.1, 0.0], atol=1e-9)


def test_a_token_is_white_where_an_expert_does_not_run_and_blue_for_the_smallest_weight():
    _, ax = sheet(3, 3)
    draw.draw_token(ax, (0, 0, 2, 1), [[0.5, 0.0], [0.001, 0.999]], title="a token", switch=0.5)
    image = ax.images[0]
    shown = image.get_array()
    assert shown.shape == (2, 2)  # experts downwards, time to the right
    assert shown.mask.tolist() == [[False, False], [True, False]]
    red = image.cmap(image.norm(0.001))[0]
    assert red < 0.9
    assert "a token" in [text.get_text() for text in ax.texts]
    assert ax.lines[-1].get_xdata().tolist() == [1.0, 1.0]


def test_maps_of_tokens_stand_in_rows_of_four_with_titles_and_steps():
    weights = np.random.default_rng(0).dirichlet(np.ones(3), (5, 6))
    figure = draw.token_weights(weights, [0, 10, 20, 30, 40], list("abcdef"), switch=20)
    ax = figure.axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert len(ax.images) == 6 + 1  # and the scale
    assert set("abcdef") <= set(texts) and texts.count("step 0") == 6 and texts.count("40") == 6
    lefts = sorted({round(image.get_extent()[0], 2) for image in ax.images[:6]})
    assert len(lefts) == 4


def test_results_are_grouped_by_what_they_changed_and_others_left_out():
    results = [
        result(1, noise="always", weights_from="gumbel"),
        result(0, noise="always", weights_from="gumbel"),
        result(0, tau_end=1.0),
        result(0, tau_end=0.1),
        result(0, threshold=0.02),
        result(3),
        result(0, n_experts=4, threshold=0.02),
        result(0, gate="switch"),
        result(0, device="cpu", precision="bfloat16"),
        SimpleNamespace(seed=0, config={"gate": "dts"}),
    ]
    groups = draw.by_change(results, BASE)
    assert list(groups) == [
        "(base)",
        "noise = always, weights_from = gumbel",
        "threshold = 0.02",
        "tau_end = 0.1",
        "tau_end = 1",
    ]
    assert [r.seed for r in groups["noise = always, weights_from = gumbel"]] == [0, 1]
    assert draw.by_change([], BASE) == {}


def test_differences_are_taken_seed_by_seed_and_drawn():
    base = [result(0, 2.0), result(1, 1.5)]
    groups = {"(base)": base, "noise = always": [result(1, 1.75), result(2, 9.0), result(0, 2.125)]}
    assert draw.paired(groups, "test_loss") == {"(base)": [0.0, 0.0], "noise = always": [0.25, 0.125]}
    left, right = draw.ablations(groups).axes
    assert [text.get_text() for text in left.get_yticklabels()] == list(groups)
    assert left.lines[1].get_xdata().tolist() == [0.25, 0.125]
    assert left.get_xlabel() and right.get_xlabel()
    bars = [patch.get_width() for patch in left.patches]
    assert bars == [0.0, 0.1875]
