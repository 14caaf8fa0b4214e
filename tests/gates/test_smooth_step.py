"""The cubic: its bounds, symmetry, limits, and why it is written with u."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.gates import smooth_step

gammas = st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 5.0, 10.0])
inputs = st.floats(-20, 20, allow_nan=False, width=32)


@given(t=inputs, gamma=gammas)
def test_stays_in_the_unit_interval_and_is_exact_outside_its_width(t, gamma):
    s = smooth_step(torch.tensor(t), gamma).item()
    assert 0 <= s <= 1
    if abs(t) >= gamma / 2 * (1 + 1e-6):
        assert s == (1.0 if t > 0 else 0.0)


@given(t=inputs, gamma=gammas)
def test_left_and_right_sum_to_one(t, gamma):
    t = torch.tensor(t)
    assert abs((smooth_step(t, gamma) + smooth_step(-t, gamma)).item() - 1) <= 2e-7


@given(t=inputs, gamma=gammas)
def test_width_only_rescales_the_input(t, gamma):
    t = torch.tensor(t, dtype=torch.float64)
    assert torch.allclose(smooth_step(t, gamma), smooth_step(t / gamma, 1.0), atol=1e-14)


def test_is_monotone():
    t = torch.linspace(-1, 1, 10_001)
    assert (smooth_step(t).diff() >= 0).all()


def test_values_derived_by_hand():
    # t = gamma/4: u = 3/4, S = 9/16 * (3 - 3/2) = 27/32
    assert smooth_step(torch.tensor([0.0, 0.25, -0.25, 0.5, -0.5])).tolist() == [0.5, 27 / 32, 5 / 32, 1.0, 0.0]


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_slope_is_three_halves_over_gamma_at_zero_and_zero_outside(gamma):
    t = torch.tensor([0.0, 0.6 * gamma, -0.6 * gamma], dtype=torch.float64, requires_grad=True)
    smooth_step(t, gamma).sum().backward()
    assert torch.allclose(t.grad, torch.tensor([1.5 / gamma, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.1, 10.0])
def test_the_expanded_cubic_goes_negative_in_float32_and_the_u_form_does_not(gamma):
    t = -gamma / 2 * (1 - torch.logspace(-6, -3, 100_001))  # strictly inside, close to the edge
    expanded = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    assert expanded.min() < 0
    assert smooth_step(t, gamma).min() >= 0


def test_small_probabilities_survive_on_the_mirrored_side():
    t = torch.tensor(0.5 - 1e-7)
    assert 1 - smooth_step(t).item() == 0
    assert 0 < smooth_step(-t).item() < 1e-12
