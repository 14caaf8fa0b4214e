"""The schedule view of notebook 09 computes what the gate computes, on logits that were recorded."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.gates import DenseToSparseGate, TemperatureSchedule
from moe_lab.widgets.sparsity import HARD_AFTER, ScheduleReplay, passing, softmax

STEPS, TOKENS, EXPERTS = (0, 10, 20, 40, 60), 12, 8


def recorded(scale=2.0, layers=1):
    """Like a Result of a run that stayed dense: logits grow from 0 to ``scale``."""
    logits = np.random.default_rng(0).normal(size=(TOKENS, EXPERTS))
    rows = [
        {"layer": layer, "step": step, "weights": softmax(scale * step / STEPS[-1] * logits).tolist()}
        for step in STEPS
        for layer in range(layers)
    ]
    return SimpleNamespace(curves={"watched": rows}), logits - logits.mean(-1, keepdims=True)


@pytest.fixture(scope="module")
def replay():
    return ScheduleReplay(recorded()[0], [f"token {place}" for place in range(TOKENS)])


def png(replay, **settings):
    file = io.BytesIO()
    replay.view(**settings).savefig(file, format="png")
    return file.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_logits_are_those_of_the_run_up_to_a_constant_and_interpolated_in_between(replay):
    _, logits = recorded()
    np.testing.assert_allclose(replay.recorded_logits[-1], 2.0 * logits, atol=1e-6)
    at_30 = replay.logits[replay.step.tolist().index(30)]  # between the evaluations at 20 and 40
    np.testing.assert_allclose(at_30, (replay.recorded_logits[2] + replay.recorded_logits[3]) / 2, atol=1e-9)
    assert replay.sigma[0] == pytest.approx(0) and replay.sigma[-1] == pytest.approx(2 * logits.std(-1).mean())
    assert replay.step[0] == 0 and replay.step[-1] == replay.n_steps == 60


@pytest.mark.parametrize(("tau_end", "threshold"), [(0.3, 1e-3), (0.1, 0.02), (1.0, 0.2)])
def test_weights_are_those_of_the_gate_at_every_moment(replay, tau_end, threshold):
    played = replay.simulate(2.0, tau_end, 0.5, threshold, "cosine", hard=True)
    schedule = TemperatureSchedule(2.0, tau_end, 30, "cosine")
    gate = DenseToSparseGate(TOKENS, EXPERTS, schedule, threshold=threshold, noise="never", hard_after=36)
    for place, step in enumerate(played.step):
        while int(gate.step) < step:
            gate.advance()
        with torch.no_grad():
            gate.logits.weight.copy_(torch.tensor(replay.logits[place]).float().T)
            routing = gate(torch.eye(TOKENS))
        np.testing.assert_allclose(played.weights[place], routing.weights.numpy(), atol=1e-6)
        assert played.temperature[place] == pytest.approx(gate.temperature)
        assert played.quiet[place] == pytest.approx(float(routing.experts_per_token.float().mean()))
        assert bool(played.hard[place]) == (gate.phase == "hard")
    assert pytest.approx(1.2) == HARD_AFTER


def test_at_first_all_run_and_after_the_hard_switch_one(replay):
    played = replay.simulate(5.0, 0.3, 0.5, 1e-3, hard=True)
    assert played.experts[0] == played.quiet[0] == EXPERTS
    assert (played.experts[played.hard] == 1).all() and played.hard.sum() == (played.step >= 36).sum()
    free = replay.simulate(5.0, 0.3, 0.5, 1e-3, hard=False)
    assert not free.hard.any() and free.experts[-1] > 1
    assert not replay.simulate(soft_share=1.0).hard.any()  # 1.2 times the run is after the run


def test_noise_is_the_same_for_all_settings_so_a_larger_threshold_never_adds_experts(replay):
    few, many = (replay.simulate(threshold=c, hard=False).experts for c in (0.02, 1e-3))
    assert (few <= many).all() and (few < many).any()


def test_the_best_expert_always_passes_and_the_threshold_is_strict():
    q = np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    assert passing(q, 0.25).tolist() == [[True, False, False, False], [True, False, False, False]]
    assert passing(q, 0.2).sum() == 5
    assert passing(q, 0.9).sum(-1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"tau_start": 4.0},
        {"tau_end": 0.1},
        {"soft_share": 0.8},
        {"threshold": 0.05},
        {"kind": "cosine"},
        {"hard": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_control_changes_the_picture(replay, change):
    assert png(replay) == png(replay)
    assert png(replay, **change) != png(replay)


def test_the_figure_says_what_the_numbers_are(replay):
    played = replay.simulate()
    written = texts(replay.view())
    mean, end = played.experts.mean(), played.experts[-1]
    assert f"experts per token: {mean:.2f} over the run, {end:.2f} at the end" in written
    assert "temperature τ: 2 to 0.3" in written
    assert [text for text in written if text.startswith("token ")] == [f"token {place}" for place in replay.shown]


def test_tokens_and_layer_can_be_chosen():
    result, _ = recorded(layers=2)
    labels = [f"token {place}" for place in range(TOKENS)]
    replay = ScheduleReplay(result, labels, layer=1, shown=(3, 5))
    written = texts(replay.view())
    assert "token 3" in written and "token 5" in written and "token 4" not in written
    assert replay.recorded_steps.tolist() == list(STEPS)


def test_a_run_that_dropped_experts_or_watched_nothing_is_refused():
    labels = [f"token {place}" for place in range(TOKENS)]
    with pytest.raises(ValueError, match="watched_tokens > 0"):
        ScheduleReplay(SimpleNamespace(curves={}), labels)
    sparse, _ = recorded()
    sparse.curves["watched"][-1]["weights"][0][0] = 0.0
    with pytest.raises(ValueError, match="dropped experts"):
        ScheduleReplay(sparse, labels)
    with pytest.raises(ValueError, match="12 tokens were watched"):
        ScheduleReplay(recorded()[0], labels[:3])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"soft_share": 1.5}, "share"),
        ({"tau_end": 3.0}, "must not rise"),
        ({"kind": "quadratic"}, "unknown schedule"),
    ],
)
def test_settings_that_no_gate_would_take_are_refused(replay, settings, says):
    with pytest.raises(ValueError, match=says):
        replay.simulate(**settings)


def test_the_view_is_quick_enough_for_a_slider(replay):
    assert plain_figures(lambda: replay.view()) < IN_TIME
