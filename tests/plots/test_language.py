"""Figures of notebook 10 show what the Results say."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moe_lab.experiments.compare import Difference
from moe_lab.experiments.evomoe_language import LanguageConfig, training_curve
from moe_lab.experiments.mixture_config import GATES
from moe_lab.plots import language as draw
from moe_lab.results import Result


def run(gate, seed=0, losses=(3.0, 2.0, 1.0), n_mixtures=2, **config):
    """Evaluated every 10 steps; loads and changes are told apart by mixture: 1 + layer, and 0.1 x (1 + layer)."""
    steps = 10 * len(losses)
    config = LanguageConfig(gate=gate, seed=seed, steps=steps, evaluate_every=10, **config)
    epochs = [
        {"step": 10 * (i + 1), "valid_loss": loss, "train_experts": 1.0, "seconds": 2.0}
        for i, loss in enumerate(losses)
    ]
    routing = [
        {"step": step, "layer": layer, "max_over_mean": 1.0 + layer, "changed": 0.1 * (1 + layer) if step else None}
        for step in range(0, steps + 1, 10)
        for layer in range(n_mixtures)
    ]
    curves = {"epochs": epochs} if gate == "dense" else {"epochs": epochs, "routing": routing}
    metrics = {"n_tokens": 45, "length": 48, "final_loss": losses[-1]}
    return Result("evomoe_language", dataclasses.asdict(config), None, seed=seed, metrics=metrics, curves=curves)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_every_gate_has_a_look_of_its_own_and_those_that_look_ahead_a_star():
    looks = {gate: draw.language_style(gate) for gate in GATES}
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(GATES)
    assert len({look["color"] for look in looks.values()}) == len(GATES)
    assert [look["label"] for look in looks.values() if "*" in look["label"]] == ["expert_choice *"]


def test_gates_are_grouped_in_their_order_and_runs_by_seed():
    groups = draw.by_gate([run("dts", 1), run("evomoe"), run("dts", 0), run("switch")])
    assert list(groups) == ["switch", "dts", "evomoe"]
    assert [r.seed for r in groups["dts"]] == [0, 1]


@pytest.mark.parametrize(
    ("flops", "expected"),
    [(2.5e12, (1e12, "TFLOP")), (9e8, (1e6, "MFLOP")), (1e9, (1e9, "GFLOP")), (3.0, (1.0, "FLOP"))],
)
def test_flops_get_a_readable_unit(flops, expected):
    assert draw.flop_unit(flops) == expected


def test_the_line_is_the_mean_over_seeds_and_the_band_their_range(ax):
    draw.draw_loss(ax, [run("dts", 0), run("dts", 1, (3.0, 3.0, 2.0))], target=1.2)
    line, target = ax.lines
    assert line.get_xdata().tolist() == [10, 20, 30] and line.get_ydata().tolist() == [3.0, 2.5, 1.5]
    assert list(target.get_ydata()) == [1.2, 1.2]
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 3.0)


def test_one_seed_has_no_band(ax):
    draw.draw_loss(ax, [run("dts")], "seconds")
    assert not ax.collections
    assert ax.lines[0].get_xdata().tolist() == [2.0, 4.0, 6.0]


def test_flops_are_those_of_the_training_curve(ax):
    draw.draw_loss(ax, [run("switch")], "flops")
    flops = training_curve(run("switch"))["flops"]
    unit, name = draw.flop_unit(flops.iloc[-1])
    assert name in ax.get_xlabel()
    assert np.allclose(ax.lines[0].get_xdata() * unit, flops)


def test_three_panels_share_one_scale_around_the_target():
    figure = draw.loss_panels([run("switch"), run("expert_choice")], target=1.5, around=(0.1, 0.4))
    assert [ax.get_xlabel().split()[0] for ax in figure.axes] == ["step", "training", "seconds"]
    assert figure.axes[2].get_ylim() == pytest.approx((1.4, 1.9))
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "* looks ahead"
    assert draw.loss_panels([run("switch")]).legends[0].get_title().get_text() == ""
    two = draw.loss_panels([run("switch")], target=1.5, against=("flops", "step"))
    assert [ax.get_xlabel().split()[0] for ax in two.axes] == ["training", "step"]
    assert two.axes[0].get_ylabel().startswith("validation loss")


def test_final_losses_are_sorted_and_hollow_if_the_gate_looks_ahead(ax):
    results = [run("switch", losses=(2.0, 1.5)), run("expert_choice", losses=(2.0, 1.0)), run("switch", 1, (2.0, 1.7))]
    draw.draw_final_losses(ax, results, lines={"table": 1.9})
    assert [label.get_text() for label in ax.get_xticklabels()] == ["expert_choice *", "switch"]
    ahead, switch = ax.lines[0], ax.lines[1]
    assert (ahead.get_markerfacecolor(), switch.get_markerfacecolor()) == ("white", switch.get_color())
    assert list(switch.get_ydata()) == [1.5, 1.7]
    assert [text.get_text() for text in ax.texts] == ["table"]


def test_phases_are_named_and_the_temperature_belongs_to_the_soft_one():
    config = LanguageConfig(gate="evomoe", steps=100, shared_share=0.1, soft_share=0.1, hard_share=0.2)
    experts = [1.0] * 10 + [8.0] * 20 + [1.0] * 70
    top, below = draw.phase_panels({"evomoe": experts}, config, until=60).axes
    assert [text.get_text() for text in top.texts] == ["shared", "soft", "hard"]
    assert top.lines[0].get_xdata()[[0, -1]].tolist() == [1, 100]
    tau = below.lines[0]
    assert (tau.get_xdata()[0], tau.get_ydata()[0]) == (10, config.tau_start)
    assert (tau.get_xdata()[-1], tau.get_ydata()[-1]) == (29, pytest.approx(config.tau_end))
    assert below.get_xlim() == (0, 60)


def test_a_gate_without_temperature_has_one_panel():
    figure = draw.phase_panels({"a": [1.0] * 5, "b": [2.0] * 5}, LanguageConfig(gate="switch", steps=5))
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_balance_and_changes_are_means_over_mixtures():
    load, changed = draw.routing_panels([run("switch"), run("dense")]).axes
    assert load.lines[0].get_xdata().tolist() == [0, 10, 20, 30]
    assert np.allclose(load.lines[0].get_ydata(), 1.5)
    (line,) = changed.lines  # a dense model has no gate
    assert line.get_xdata().tolist() == [10, 20, 30]
    assert np.allclose(line.get_ydata(), 0.15)


def test_the_shared_phase_is_not_drawn_nor_the_comparison_with_it():
    load, changed = draw.routing_panels([run("evomoe", shared_share=0.5)]).axes  # 15 of 30 steps
    assert load.lines[0].get_xdata().tolist() == [20, 30]
    assert changed.lines[0].get_xdata().tolist() == [30]


def test_leads_stand_at_their_number_of_experts(ax):
    leads = {"dts": {4: Difference(-0.1, -0.2, 0.1, 3), 16: Difference(0.0, -0.1, 0.1, 3)}}
    draw.draw_leads(ax, leads, base="Switch")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16"]
    line = ax.containers[0].lines[0]
    assert line.get_xdata().tolist() == [0, 1] and line.get_ydata().tolist() == [-0.1, 0.0]
    assert "Switch's" in ax.get_ylabel()
