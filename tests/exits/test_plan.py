"""Rows are planned with room for chance, and never for more samples than there are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.exits.plan import plan_rows, shares_inside


def test_shares_count_those_who_leave_later_and_one_more():
    exits = torch.tensor([0, 0, 1, 3])
    assert shares_inside(exits, 4) == pytest.approx((1, 3 / 5, 2 / 5, 2 / 5))
    assert shares_inside(torch.tensor([0]), 2) == (1, 0.5)  # a single sample promises nothing


def test_room_is_the_mean_and_three_standard_deviations():
    assert plan_rows((1.0, 0.5), 100, 0.0) == (100, 50 + 3 * 5)
    assert plan_rows((1.0, 0.5), 100, 0.0, spread=0) == (100, 50)
    assert plan_rows((1.0, 0.2, 0.0), 25, 0.0) == (25, 5 + 3 * 2, 1)


def test_rows_are_carried_along_until_enough_have_left():
    shares = (1.0, 0.9, 0.6, 0.5)
    assert plan_rows(shares, 100, 0.3, spread=0) == (100, 100, 60, 60)
    assert plan_rows(shares, 100, 0.1, spread=0) == (100, 90, 60, 50)
    assert plan_rows(shares, 100, 1.0, spread=0) == (100,) * 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.integers(1, 5000), st.floats(0, 1), st.floats(0, 5))
def test_rows_never_rise_and_hold_everybody_who_is_expected(shares, n, compact_from, spread):
    shares = [1.0, *sorted(shares, reverse=True)]
    rows = plan_rows(shares, n, compact_from, spread)
    assert rows[0] == n and len(rows) == len(shares) and min(rows) >= 1
    for before, after, share in zip(rows, rows[1:], shares[1:], strict=False):
        assert after == before or after <= (1 - compact_from) * before
        assert after >= min(math.floor(n * share), before)


@pytest.mark.parametrize(
    "arguments",
    [
        ((1.0, 0.5), 0, 0.1),
        ((1.0, 0.5), 4, 1.5),
        ((1.0, 0.5), 4, 0.1, -1),
        ((0.5, 0.4), 4, 0.1),
        ((1.0, 0.2, 0.3), 4, 0.1),
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError):
        plan_rows(*arguments)
    with pytest.raises(ValueError, match="at least one sample"):
        shares_inside(torch.zeros(0, dtype=torch.int64), 2)
