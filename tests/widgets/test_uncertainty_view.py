"""The views of notebook 14 show what the package computes, and redraw quickly."""

import io

import pandas as pd
import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.metrics.calibration import expected_calibration_error
from moe_lab.widgets.uncertainty import VERSIONS, AlphaView, ReliabilityView, ece_view

N, L, K = 3000, 3, 10
ROWS = [
    (method, cost, 0.02, 0.15, 0.55, 0.01)
    for method in ("jei_dnn", "geometric", "shared")
    for cost in (0.3, 0.5, 0.9)
]  # fmt: skip
POINTS = pd.DataFrame(ROWS, columns=["method", "cost", *VERSIONS.values()])


def sample(n, seed):
    """Logits (n, L, K) that lean to the label, labels, exits."""
    generator = torch.Generator().manual_seed(seed)
    labels, exits = (torch.randint(high, (n,), generator=generator) for high in (K, L))
    logits = torch.randn(n, L, K, generator=generator)
    return logits + 2 * torch.eye(K)[labels][:, None], labels, exits


@pytest.fixture
def alpha_view():
    logits, labels, exits = sample(N, 0)
    known, known_labels, known_exits = sample(800, 1)
    chosen = logits[torch.arange(N), exits].softmax(-1)
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    calibration = known.softmax(-1), known_labels, known_exits
    return AlphaView(images, torch.arange(6), chosen, labels, exits, calibration)


@pytest.fixture
def reliability_view():
    logits, labels, _ = sample(N, 0)
    return ReliabilityView(logits[:, 0], labels)


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_each_side_is_scored_as_chosen():
    alike = ece_view(POINTS)
    assert "ECE, points. Learned gates: whole test set. Thresholds: whole test set" in texts(alike)
    apart = ece_view(POINTS, "mean over batches of 64", "softmax twice")
    heights = [
        line.get_ydata().mean()
        for line in apart.axes[0].lines
        if len(line.get_xdata()) == 3 and line.get_marker() != "None"
    ]
    bottom, inch = 0.6, 2.5 / 70
    assert heights == pytest.approx([bottom + 15 * inch, bottom + 55 * inch, bottom + 55 * inch])
    assert png(alike) != png(apart)


def test_an_unknown_way_to_score_is_refused():
    with pytest.raises(ValueError, match="softmax twice"):
        ece_view(POINTS, thresholds="softmax twce")


def test_the_temperature_divides_the_logits(reliability_view):
    view = reliability_view
    sure = (view.logits / 2).softmax(-1).amax(-1)
    assert view.at(2.0) == pytest.approx(expected_calibration_error(sure, view.right))
    assert any(f"T = 2.00: ECE {100 * view.at(2.0):.1f} points" in text for text in texts(view.view(2.0)))
    assert png(view.view(2.0)) != png(view.view(0.5))
    with pytest.raises(ValueError, match="do not fit"):
        ReliabilityView(torch.zeros(3, K), torch.zeros(4).long())


def test_coverage_and_size_move_together(alpha_view):
    curve = alpha_view.curve("general")
    coverage, size = zip(*curve, strict=True)
    assert list(coverage) == sorted(coverage, reverse=True) and list(size) == sorted(size, reverse=True)
    assert alpha_view.curve("general") is curve  # computed once
    assert alpha_view.at(0.1, "general") == pytest.approx(curve[alpha_view.grid.index(0.1)])
    assert abs(alpha_view.at(0.1)[0] - 0.9) < 0.03  # exchangeable: the promise is kept


def test_the_view_frames_the_classes_of_each_set_and_says_who_leaves_where(alpha_view):
    figure = alpha_view.view(0.1, "general")
    coverage, size = alpha_view.at(0.1, "general")
    written = texts(figure)
    assert f"covered: {100 * coverage:.1f} % of all" in written and f"classes in a set, mean: {size:.2f}" in written
    assert sum(text.startswith("exit ") for text in written) == 6
    frames = max(figure.axes[0].lines, key=lambda line: line.get_zorder() == 3).get_xdata()
    assert len(frames) == 6 * int(alpha_view.sets(0.1, "general")[:6].sum())  # five corners and a break
    assert png(figure) != png(alpha_view.view(0.3, "general"))


def test_as_many_images_as_indices_are_needed(alpha_view):
    with pytest.raises(ValueError, match="2 images, but 3 indices"):
        AlphaView(torch.zeros(2, 1, 4, 4), torch.arange(3), *[torch.zeros(1)] * 3, alpha_view.calibration)


@pytest.mark.parametrize("which", ["ece", "temperature", "alpha"])
def test_views_are_quick_enough_for_a_slider(which, reliability_view, alpha_view):
    views = {
        "ece": lambda: ece_view(POINTS),
        "temperature": lambda: reliability_view.view(1.5),
        "alpha": lambda: alpha_view.view(0.07),
    }

    assert plain_figures(lambda: views[which]()) < IN_TIME
