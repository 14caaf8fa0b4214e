"""Notebook 05's checks accept the right answer and say what is wrong with the wrong ones."""

import math

import pytest

from moe_lab.exercises import search as exercises
from moe_lab.gates.permutation import Schedule
from moe_lab.paths import recorded_dir
from moe_lab.results import find_results


def schedule(start, end, iterations=150):
    return Schedule(start, end, iterations, iterations, 0.0, "logits")


RIGHT = [
    lambda: exercises.check_temperature(0.06, 0.06 / (2 * math.log(99))),
    lambda: exercises.check_schedule(schedule(0.05, 0.003)),
    lambda: exercises.check_reordering(lambda bank, assignment: bank[assignment]),
    lambda: exercises.check_counterexample([-1, 1], [0, 0]),
]
WRONG = [
    (lambda: exercises.check_temperature(0.06, 0.01), "the diagonal is 0.95"),
    (lambda: exercises.check_temperature(0.06, -1.0), "positive"),
    (lambda: exercises.check_schedule(schedule(0.05, 0.0005)), "too cold for 150 iterations"),
    (lambda: exercises.check_schedule(schedule(0.3, 0.1)), "cool further"),
    (lambda: exercises.check_schedule(schedule(0.05, 0.003, 1000)), "at most 150"),
    (lambda: exercises.check_reordering(lambda bank, assignment: bank[assignment.argsort()]), "that is the inverse"),
    (lambda: exercises.check_reordering(lambda bank, assignment: bank[:3]), "had shape"),
    (lambda: exercises.check_reordering(lambda bank, assignment: bank), "output i must find"),
    (lambda: exercises.check_counterexample([-1, 1], [-1, 1]), "average of experts"),
    (lambda: exercises.check_counterexample([1], [1]), "two or more"),
]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_are_accepted(answer, capsys):
    assert answer()
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(("answer", "hint"), WRONG)
def test_wrong_answers_get_a_hint_that_fits(answer, hint, capsys):
    assert not answer()
    assert hint in capsys.readouterr().out


def test_reading_of_the_recorded_study_is_checked_against_the_record(capsys):
    (study,) = find_results("comet_search_study", root=recorded_dir())
    assert exercises.check_help(study, ["small random experts learn", "COMET learns"])
    assert not exercises.check_help(study, ["COMET, saturated"])
    assert "2 missing, 1 too many (look at 'COMET, saturated' again)" in capsys.readouterr().out
    assert not exercises.check_help(study, ["COMET lerns"])
    assert "no such scenario" in capsys.readouterr().out


def test_unanswered_exercises_are_no_errors(capsys):
    for check in (
        lambda: exercises.check_temperature(0.06, None),
        lambda: exercises.check_schedule(None),
        lambda: exercises.check_reordering(None),
        lambda: exercises.check_counterexample(None, None),
        lambda: exercises.check_help(None, None),
    ):
        assert not check()
        assert capsys.readouterr().out == "Not answered yet.\n"
