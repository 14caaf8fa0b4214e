"""Temperature schedules: ends, monotony, clamping, and one value whether asked with a number or a tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.gates.schedules import KINDS, TemperatureSchedule

FALLING = [kind for kind in KINDS if kind != "constant"]


@pytest.mark.parametrize("kind", FALLING)
def test_it_starts_at_the_start_reaches_the_end_and_stays(kind):
    tau = TemperatureSchedule(2.0, 0.5, 100, kind)
    assert tau(0) == 2.0
    assert tau(100) == pytest.approx(0.5) and tau(10_000) == pytest.approx(0.5)


def test_half_way_by_hand():
    assert TemperatureSchedule(2.0, 0.5, 100, "linear")(50) == pytest.approx(1.25)
    assert TemperatureSchedule(2.0, 0.5, 100, "exponential")(50) == pytest.approx(1.0)  # sqrt(2 * 0.5)
    assert TemperatureSchedule(2.0, 0.5, 100, "cosine")(50) == pytest.approx(1.25)
    assert TemperatureSchedule(2.0, 0.5, 100, "cosine")(25) == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert TemperatureSchedule(2.0, 0.5, 100, "constant")(50) == 2.0


@given(
    kind=st.sampled_from(KINDS),
    end=st.floats(0.01, 2),
    more=st.floats(0, 5),
    steps=st.integers(1, 500),
    step=st.integers(0, 1000),
)
def test_it_never_rises_stays_between_its_ends_and_tensors_agree(kind, end, more, steps, step):
    tau = TemperatureSchedule(end + more, end, steps, kind)
    assert end - 1e-9 <= tau(step + 1) <= tau(step) + 1e-9 <= end + more + 2e-9
    assert float(tau(torch.tensor(step))) == pytest.approx(tau(step), rel=1e-5, abs=1e-6 * (end + more))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"end": 0.0}, "positive"),
        ({"end": -1.0}, "positive"),
        ({"start": 0.1, "end": 0.5}, "must not rise"),
        ({"steps": 0}, "at least 1"),
        ({"kind": "cosin"}, "cosine"),
    ],
)
def test_mistakes_are_explained(arguments, says):
    with pytest.raises(ValueError, match=says):
        TemperatureSchedule(**arguments)
