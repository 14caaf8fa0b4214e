"""Colours: fixed per expert and gate, apart from each other for colour-blind readers, and in grey."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from moe_lab.plots import GATE_COLORS, expert_colors, gate_color, gate_style, use_style

# Linear RGB as seen with full deuteranopia and protanopia (Machado, Oliveira and Fernandes 2009, table 1).
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def cielab(colors, vision=None):
    srgb = np.array([to_rgb(color) for color in colors])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    if vision is not None:
        linear = np.clip(linear @ np.array(vision).T, 0, 1)
    xyz = linear @ (SRGB_TO_XYZ / SRGB_TO_XYZ.sum(1, keepdims=True)).T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def smallest_distance(lab):
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))


def test_an_expert_keeps_its_colour_for_any_number_of_experts():
    assert all(expert_colors(n) == expert_colors(32)[:n] for n in range(1, 33))
    assert len(set(expert_colors(32))) == 32


@pytest.mark.parametrize("n_experts", [0, 33])
def test_experts_without_a_colour_are_refused(n_experts):
    with pytest.raises(ValueError, match="1 to 32"):
        expert_colors(n_experts)


@pytest.mark.parametrize("vision", [None, DEUTERANOPIA, PROTANOPIA], ids=["normal", "deuteranopia", "protanopia"])
def test_experts_can_be_told_apart_in_every_colour_vision(vision):
    # 2.3 is a just noticeable difference in CIELAB.
    assert smallest_distance(cielab(expert_colors(8), vision)) > 15
    assert smallest_distance(cielab(expert_colors(32), vision)) > 9


def test_neighbouring_experts_differ_in_grey():
    lightness = cielab(expert_colors(32))[:, 0]
    assert np.abs(np.diff(lightness)).min() > 10


def test_a_plus_gate_has_the_colour_of_its_gate_and_a_dashed_line():
    for name in GATE_COLORS:
        assert gate_color(name + "+") == gate_color(name)
        assert gate_style(name + "+")["linestyle"] == "--"
    assert len(set(GATE_COLORS.values())) == len(GATE_COLORS)
    assert len({gate_style(name)["marker"] for name in GATE_COLORS}) == len(GATE_COLORS)


def test_a_misspelt_gate_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'commet'.*Did you mean 'comet'"):
        gate_color("commet")


def test_style_keeps_figures_small_enough_to_store():
    with mpl.rc_context():
        use_style()
        assert mpl.rcParams["figure.dpi"] <= 100
