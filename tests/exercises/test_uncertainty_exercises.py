"""Checks of notebook 14 accept a right answer and say what is wrong with others."""

import math

import numpy as np
import pytest

from moe_lab.exercises import uncertainty

HALF_MISSED = ([0.1] * 188, [0.2] * 3 + [0.9] * 9)  # rank 191 of 200 is the third hard one


def quantile(scores, alpha):
    rank = math.ceil((len(scores) + 1) * (1 - alpha))
    return sorted(scores)[rank - 1] if rank <= len(scores) else math.inf


def clipped(scores, alpha):
    return sorted(scores)[min(len(scores), math.ceil((len(scores) + 1) * (1 - alpha))) - 1]


def too_early(scores, alpha):
    return sorted(scores)[math.ceil(len(scores) * (1 - alpha)) - 1]


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (uncertainty.check_quantile, quantile),
        (uncertainty.check_constant, lambda c, classes: abs(c - 1 / classes)),
        (uncertainty.check_smallest_alpha, lambda n: 1 / (n + 1)),
        (uncertainty.check_temperature, lambda p: (2 * p - 1) / math.log(p / (1 - p))),
        (uncertainty.check_conditional, HALF_MISSED),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (uncertainty.check_quantile, None, "Not answered yet"),
        (uncertainty.check_quantile, too_early, "you say 0.44, it is 0.71 (rank 8); yours has rank 7"),
        (
            uncertainty.check_quantile,
            clipped,
            "alpha = 0.0625: you say 0.93, it is inf (rank 10); there is no such score",
        ),
        (uncertainty.check_quantile, lambda s, alpha: float(np.quantile(s, 0.99 - alpha)), "do not interpolate"),
        (uncertainty.check_constant, None, "Not answered yet"),
        (uncertainty.check_constant, lambda c, classes: 1 - c, "how often is the answer right?"),
        (uncertainty.check_constant, lambda c, classes: c - 1 / classes, "an error has no sign"),
        (uncertainty.check_constant, lambda c, classes: 0.8, "K = 10: you say 0.8, it is 0; one bin holds everybody"),
        (uncertainty.check_smallest_alpha, None, "Not answered yet"),
        (
            uncertainty.check_smallest_alpha,
            lambda n: 1 / n,
            "n = 99: at alpha = 0.0101 the rank is 99 of 99: and a smaller",
        ),
        (uncertainty.check_smallest_alpha, lambda n: 0.5 / n, "the rank is 100 of 99: beyond the last score"),
        (uncertainty.check_smallest_alpha, lambda n: n, "between 0 and 1"),
        (uncertainty.check_temperature, None, "Not answered yet"),
        (uncertainty.check_temperature, lambda p: 1.0, "p = 0.9: T = 1 gives 0.690; that is too hot"),
        (uncertainty.check_temperature, lambda p: 0.1, "too cold"),
        (uncertainty.check_temperature, lambda p: math.log(1 - p), "is positive"),
        (uncertainty.check_conditional, None, "Not answered yet"),
        (uncertainty.check_conditional, ([0.1] * 199, [0.9]), "only 1 of 200 samples are hard"),
        (uncertainty.check_conditional, ([0.1] * 9, [0.9]), "10 samples are too few"),
        (uncertainty.check_conditional, ([0.1] * 80, [0.9] * 20), "100 % of the hard"),
        (uncertainty.check_conditional, ([0.1], [2.0]), "scores in [0, 1]"),
        (uncertainty.check_conditional, ([0.1], []), "neither empty"),
    ],
)
def test_other_answers_are_told_why(check, answer, says, capsys):
    assert not check(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not ") and says in out
