"""Checks of notebook 13 accept a right answer and say what is wrong with others."""

import pytest

from moe_lab.exercises import jei


def first_exit(losses, costs):
    return max(0, *((losses[0] - e) / (c - costs[0]) for e, c in zip(losses[1:], costs[1:], strict=True)))


def best(losses, costs, price):
    values = [e + price * c for e, c in zip(losses, costs, strict=True)]
    return values.index(min(values))


def targets(losses, costs, price):
    return [float(level >= best(losses, costs, price)) for level in range(len(losses) - 1)]


def weights(best, n_gates):
    counts = [sum(b <= level for b in best) for level in range(1, n_gates + 1)]
    return [min(5, (len(best) - n) / max(n, 0.1)) for n in counts]


def per_layer(best, n_gates):
    counts = [best.count(level) for level in range(1, n_gates + 1)]
    return [min(5, (len(best) - n) / max(n, 0.1)) for n in counts]


def loss(losses, chances, detach, forget=False):
    expected = (chances * losses).sum(1)
    ratio = losses.sum(1) / expected
    if detach and not forget:
        ratio = ratio.detach()
    return (expected * ratio).mean() / losses.shape[1]


def schedule(batches, epochs, gates, modules, restart):
    places = [step % batches if restart else step for step in range(batches * epochs)]
    return sum(place % (gates + modules) >= gates for place in places)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (jei.check_first_exit, first_exit),
        (jei.check_targets, targets),
        (jei.check_weights, weights),
        (jei.check_classifier_loss, loss),
        (jei.check_schedule, schedule),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(answer)
    assert capsys.readouterr().out.startswith("Right.")


CHECKS = [getattr(jei, name) for name in dir(jei) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_no_answer_is_no_mistake(check, capsys):
    assert not check(None)
    assert capsys.readouterr().out == "Not answered yet.\n"


def crossing(losses, costs, level):
    return (losses[0] - losses[level]) / (costs[level] - costs[0])


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (jei.check_first_exit, lambda e, c: crossing(e, c, 1), "where exits 1 and 2 meet"),
        (jei.check_first_exit, lambda e, c: crossing(e, c, -1), "not only one of them"),
        (jei.check_first_exit, lambda e, c: max(crossing(e, c, k) for k in (1, 2)), "is never negative"),
        (jei.check_first_exit, lambda e, c: 7, "you say 7.000, it is 2.333"),
        (jei.check_targets, lambda e, c, p: [*targets(e, c, p), 1.0], "the last exit has none"),
        (jei.check_targets, lambda e, c, p: [float(k == best(e, c, p)) for k in range(len(e) - 1)], "late than never"),
        (jei.check_targets, lambda e, c, p: targets(e, c, 0), "lambda 1, best exit 2: you say (0, 0)"),
        (jei.check_weights, per_layer, "the targets are 1 from here on"),
        (jei.check_weights, lambda b, g: [2 * w for w in weights(b, g)], "no weight is above 5"),
        (jei.check_weights, lambda b, g: [1.0], "3 gates need 3 weights, you give 1"),
        (jei.check_weights, lambda b, g: [1.0] * g, "best exits (1, 2, 2, 3)"),
        (jei.check_classifier_loss, lambda e, p, d: loss(e, p, d, forget=True), "r carries a gradient"),
        (jei.check_classifier_loss, lambda e, p, d: loss(e, p, True), "as released r is not detached"),
        (jei.check_classifier_loss, lambda e, p, d: loss(e, p, d) * e.shape[1], "divide by N and by G"),
        (jei.check_classifier_loss, lambda e, p, d: (p * e).sum(1).mean(), "your loss is"),
        (jei.check_classifier_loss, lambda e, p, d: e, "must be one number"),
        (jei.check_classifier_loss, lambda e, p, d: 1.0, "must be one number"),
        (jei.check_schedule, lambda b, n, g, m, r: b * n - schedule(b, n, g, m, r), "yours are the gates' steps"),
        (jei.check_schedule, lambda b, n, g, m, r: schedule(b, n, g, m, True), "the other way to count"),
        (jei.check_schedule, lambda b, n, g, m, r: 1, "you say 1, the classifiers get 740"),
    ],
)
def test_a_wrong_answer_is_told_why(check, answer, says, capsys):
    assert not check(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not yet: ") and says in out
