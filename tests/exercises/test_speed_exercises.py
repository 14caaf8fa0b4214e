"""Checks of notebook 15 accept a right answer and say what is wrong with others."""

import math

import pytest

from moe_lab.exercises import speed


def bound(n, d, h, e, s, p, b):
    return max(2 * n * d * h / p, s * (n * d + e * d * h + n * h) / b)


def memory(t, e, k, h, s):
    return t * e * h * s, t * k * h * s


def padding(loads, c):
    kept = sum(min(load, c) for load in loads)
    return 1 - kept / sum(loads), 1 - kept / (len(loads) * c)


def largest(t, e):
    return t / e + math.sqrt(2 * t / e * math.log(e))


def break_even(shares, a, b, c):
    return c * len(shares) / (b * sum(1 - s for s in shares))


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (speed.check_bound, bound),
        (speed.check_memory, memory),
        (speed.check_padding, padding),
        (speed.check_largest_load, largest),
        (speed.check_largest_load, speed.largest_load),
        (speed.check_break_even, break_even),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(answer)
    assert capsys.readouterr().out.startswith("Right.")


CHECKS = [getattr(speed, name) for name in dir(speed) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_no_answer_is_no_mistake(check, capsys):
    assert not check(None)
    assert capsys.readouterr().out == "Not answered yet.\n"


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (speed.check_bound, lambda n, d, h, e, s, p, b: 2 * n * d * h / p + s * (n * (d + h) + e * d * h) / b, "sum"),
        (
            speed.check_bound,
            lambda n, d, h, e, s, p, b: min(2 * n * d * h / p, s * (n * (d + h) + e * d * h) / b),
            "both",
        ),
        (
            speed.check_bound,
            lambda n, d, h, e, s, p, b: max(n * d * h / p, s * (n * (d + h) + e * d * h) / b),
            "is two",
        ),
        (
            speed.check_bound,
            lambda n, d, h, e, s, p, b: max(2 * n * d * h / p, s * (n * (d + h) + d * h) / b),
            "of its own",
        ),
        (speed.check_bound, lambda n, d, h, e, s, p, b: 2 * n * d * h / p, "bytes take longer"),
        (speed.check_memory, lambda *a: memory(*a)[::-1], "the other way round"),
        (speed.check_memory, lambda t, e, k, h, s: (t * e * h, t * k * h), "numbers, not bytes"),
        (speed.check_memory, lambda t, e, k, h, s: (e * h * s, t * k * h * s), "every token has H numbers"),
        (speed.check_memory, lambda t, e, k, h, s: (t * e * h * s, t * h * s), "each of its K experts"),
        (speed.check_padding, lambda loads, c: (max(0, 1 - len(loads) * c / sum(loads)), 0.0), "of no use to a pair"),
        (speed.check_padding, lambda loads, c: (0.0, 1.0), "find one of"),
        (speed.check_largest_load, lambda t, e: t / e, "is the mean load"),
        (speed.check_largest_load, lambda t, e: t / e + math.sqrt(t / e), "one standard deviation"),
        (speed.check_largest_load, lambda t, e: 2 * t / e, "drawing gives"),
        (speed.check_break_even, lambda s, a, b, c: (a + c) * len(s) / (b * sum(1 - x for x in s)), "a cancels"),
        (speed.check_break_even, lambda s, a, b, c: c / (b * sum(1 - x for x in s)), "as many exits as blocks"),
        (speed.check_break_even, lambda s, a, b, c: c * len(s) / b / sum(s), "rows that are gone"),
        (speed.check_break_even, lambda s, a, b, c: 0.0, "you say 0.0"),
    ],
)
def test_a_wrong_answer_is_told_why(check, answer, says, capsys):
    assert not check(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not yet: ") and says in out


def test_a_single_expert_gets_everything():
    assert speed.largest_load(10, 1, repeats=3) == 10
