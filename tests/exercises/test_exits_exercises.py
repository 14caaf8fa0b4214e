"""Checks of notebook 12 accept a right answer and say what is wrong with others."""

import pytest

from moe_lab.exercises import exits


def distribution(gates):
    left, found = 1.0, []
    for gate in gates:
        found.append(min(gate, left))
        left -= found[-1]
    return [*found, left]


def broken_stick(gates):
    left, found = 1.0, []
    for gate in gates:
        found.append(gate * left)
        left -= found[-1]
    return [*found, left]


def block_cost(tokens, width):
    return 8 * tokens * width**2 + 2 * tokens**2 * width


def speed_up(rows, a, b):
    return len(rows) * (a + b * rows[0]) / sum(a + b * n for n in rows if n)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (exits.check_distribution, distribution),
        (exits.check_equal_gates, lambda m: max(1, m - 1)),
        (exits.check_block_cost, block_cost),
        (exits.check_neither, (0.4, 0.2, 0.25)),
        (exits.check_speed_up, speed_up),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(answer)
    assert capsys.readouterr().out.startswith("Right.")


CHECKS = [getattr(exits, name) for name in dir(exits) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_no_answer_is_no_mistake(check, capsys):
    assert not check(None)
    assert capsys.readouterr().out == "Not answered yet.\n"


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (exits.check_distribution, lambda g: list(g), "has no gate, but it has a probability"),
        (exits.check_distribution, lambda g: [*g, 1 - sum(g)], "has a negative entry"),
        (exits.check_distribution, lambda g: [*g, max(0, 1 - sum(g))], "sums to 1.30"),
        (exits.check_distribution, broken_stick, "multiplies by what is left"),
        (exits.check_distribution, lambda g: [0.0] * len(g) + [1.0], "direct is (0.20, 0.30, 0.40, 0.10)"),
        (exits.check_equal_gates, lambda m: m, "m = 5: at exit 5 the number 2 g + S is 1.20: 1 or more, but so"),
        (exits.check_equal_gates, lambda m: max(1, m // 2), "at exit 2 the number 2 g + S is 0.60: not yet 1"),
        (exits.check_block_cost, lambda t, d: 8 * d * d, "that is one token"),
        (exits.check_block_cost, lambda t, d: 8 * t * d * d, "have no weights"),
        (exits.check_block_cost, lambda t, d: 8 * t * d * d + t * t * d, "two products"),
        (exits.check_neither, (0.9, 0.9, 0.9), "no exit is more probable"),
        (exits.check_neither, (0.4, 0.3, 0.3), "that is the median"),
        (exits.check_neither, (0.4, 0.3), "three numbers"),
        (exits.check_speed_up, lambda r, a, b: len(r) * (a + b * r[0]) / sum(a + b * n for n in r), "is not called"),
        (exits.check_speed_up, lambda r, a, b: 1 / speed_up(r, a, b), "the other way round"),
        (exits.check_speed_up, lambda r, a, b: 2 * speed_up(r, a, b), "you say 4.00, it is 2.00"),
    ],
)
def test_a_wrong_answer_is_told_why(check, answer, says, capsys):
    assert not check(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not yet: ") and says in out
