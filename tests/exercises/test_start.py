"""Notebook 00's checks accept a right answer and say what is wrong with others."""

import pytest

from moe_lab.exercises import start

PAIRS = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]] * 3
RIGHT = [
    lambda: start.check_balanced(PAIRS),
    lambda: start.check_entropy([0.77302, 0.11349, 0.11349]),
    lambda: start.check_disagreement([[0.1, 0.9, 0], [0.1, 0, 0.9], [0.1, 0.9, 0], [0.1, 0, 0.9]]),
    lambda: start.check_decided_and_fair([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
]
WRONG = [
    (lambda: start.check_balanced(PAIRS[:5]), "5 rows, 6"),
    (lambda: start.check_balanced([*PAIRS[:5], [0.25] * 4]), "token 5 uses 4 experts"),
    (lambda: start.check_balanced([*PAIRS[:5], [1, 0, 0, 0]]), "of the 11 pairs"),
    (lambda: start.check_balanced([*PAIRS[:5], [0.5, 0.4, 0, 0]]), "row 5 sums to 0.9"),
    (lambda: start.check_balanced([*PAIRS[:5], [1.5, -0.5, 0, 0]]), "row 5 has a negative"),
    (lambda: start.check_entropy([0.5, 0.5, 0]), "a weight is 0"),
    (lambda: start.check_entropy([0.5, 0.25, 0.25]), "the entropy is 1.0397"),
    (lambda: start.check_entropy([0.5, 0.5]), "row 0 has 2 weights"),
    (lambda: start.check_disagreement([[0.1, 0.9, 0]]), "must have the largest"),
    (lambda: start.check_disagreement([[0.6, 0.4, 0], [0.6, 0, 0.4]]), "must have the smallest"),
    (lambda: start.check_decided_and_fair([[1, 0, 0], [0, 1, 0], [0.5, 0, 0.5]]), "token 2 is undecided"),
    (lambda: start.check_decided_and_fair([[1, 0, 0], [0, 1, 0]]), "not all alike"),
    (lambda: start.check_decided_and_fair([]), "no rows"),
]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_are_accepted(answer, capsys):
    assert answer()
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(("answer", "said"), WRONG)
def test_wrong_answers_are_told_what_is_wrong(answer, said, capsys):
    assert not answer()
    text = capsys.readouterr().out
    assert text.startswith("Not yet: ") and said in text


@pytest.mark.parametrize(
    "check", [start.check_balanced, start.check_entropy, start.check_disagreement, start.check_decided_and_fair]
)
def test_no_answer_is_no_mistake(check, capsys):
    assert not check(None)
    assert capsys.readouterr().out == "Not answered yet.\n"
