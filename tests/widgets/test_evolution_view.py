"""The views of notebook 08 show what was spawned or written down, follow their sliders, and are quick."""

import io

import pytest
import torch
from matplotlib.figure import Figure
from slider_time import IN_TIME, plain_figures

from moe_lab.experts import MLPExperts
from moe_lab.widgets.evolution import DivergenceReplay, SpawnView

X = torch.linspace(-1, 1, 40)[:, None]
TARGET = X**2


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture
def spawn():
    generator = torch.Generator().manual_seed(0)
    return SpawnView(MLPExperts(1, (1, 32, 1), "tanh", activate_last=False, generator=generator), X, TARGET, 4)


def moment(step, phase, apart):
    weights = (
        torch.full((40, 3), 1 / 3) if phase == "soft" else torch.eye(3)[[0] * 40 if phase == "shared" else [2] * 40]
    )
    distances = {name: apart * (1 - torch.eye(3)) for name in ("function", "parameter")}
    outputs = torch.stack([X[:, 0], -X[:, 0], X[:, 0] ** 2])
    return {"step": step, "phase": phase, "outputs": outputs, "weights": weights, **distances}


ROWS = [moment(0, "shared", 1.0), moment(10, "soft", 0.3), moment(30, "hard", 0.9)]


@pytest.fixture
def replay():
    return DivergenceReplay(X, TARGET, ROWS)


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_copies_are_at_distance_zero_and_their_mean_has_the_old_error(spawn):
    written = texts(spawn.view(mask_ratio=0.0))
    error = f"{spawn.loss_before:.3f}"
    assert any(f"before {error}" in text and f"mean {error}, of one expert {error}" in text for text in written)
    assert any("in function 0.00, in parameters 0.00" in text for text in written)
    assert written.count("0.0") >= 12  # every pair


@pytest.mark.parametrize(
    "change", [{"mask_ratio": 0.3}, {"noise": 0.3}, {"neurons": 0.3}, {"seed": 1}, {"rescale": True}]
)
def test_every_slider_changes_what_is_spawned(spawn, change):
    base = {"mask_ratio": 0.2}
    assert png(spawn.view(**base)) == png(spawn.view(**base))
    assert png(spawn.view(**{**base, **change})) != png(spawn.view(**base))


def test_the_trained_expert_is_not_touched(spawn):
    before = spawn.expert.weights[0].detach().clone()
    spawn.view(mask_ratio=0.9, noise=1.0)
    assert torch.equal(spawn.expert.weights[0], before)


def test_before_the_spawn_there_is_one_expert(replay):
    assert "one expert so far" in texts(replay.view(0))
    assert "distance in function" not in texts(replay.view(0))


def test_phase_number_of_experts_error_and_distances_are_those_of_the_row(replay):
    soft, hard = texts(replay.view(1)), texts(replay.view(2))
    error = (X / 3 - X / 3 + X**2 / 3 - TARGET).square().mean()
    assert f"step 10, soft: 3.0 experts per x, squared error {error:.4f}" in soft
    assert "step 30, hard: 1.0 experts per x, squared error 0.0000" in hard
    assert soft.count("0.3") == 6 and hard.count("0.9") == 6


def test_the_thick_curve_is_that_of_the_expert_with_the_largest_weight(replay):
    thick = [line for line in replay.view(2).axes[0].lines if line.get_linewidth() == 4]
    (line,) = thick
    assert line.get_color() == "#009E73"  # expert 2


def test_a_moment_after_the_last_is_the_last_and_steps_are_found(replay):
    assert png(replay.view(9)) == png(replay.view(-1)) == png(replay.view(2))
    assert png(replay.view(1)) != png(replay.view(2))
    assert [replay.moment_of(step) for step in (-1, 0, 9, 10, 99)] == [0, 0, 0, 1, 2]


def test_nothing_to_replay_or_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        DivergenceReplay(X, TARGET, [])
    with pytest.raises(ValueError, match="shared, soft, hard; got dense"):
        DivergenceReplay(X, TARGET, [moment(0, "dense", 0.0)])


@pytest.mark.parametrize("which", ["spawn", "replay"])
def test_views_are_quick_enough_for_a_slider(which, spawn, replay):
    assert plain_figures(lambda: spawn.view(0.2, 0.1) if which == "spawn" else replay.view(1)) < IN_TIME
