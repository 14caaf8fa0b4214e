"""Checks of notebook 10 accept a right answer and say what is wrong with others."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from moe_lab.exercises import language
from moe_lab.experiments.evomoe_language import LanguageConfig
from moe_lab.metrics.flops import language_flops
from moe_lab.results import Result

DTS = LanguageConfig(gate="dts", steps=200)


def run(gate, seed, *losses):
    config = LanguageConfig(gate=gate, seed=seed, steps=100 * len(losses), evaluate_every=100)
    rows = [{"step": 100 * (i + 1), "valid_loss": loss, "seconds": 1.0} for i, loss in enumerate(losses)]
    metrics = {"n_tokens": 45, "length": 48}
    return Result(
        "evomoe_language", dataclasses.asdict(config), None, seed=seed, metrics=metrics, curves={"epochs": rows}
    )


RUNS = [
    run("switch", 0, 3, 1),
    run("switch", 1, 3, 1),
    run("dts", 0, 3, 2),
    run("dts", 1, 3, 0.5),
    run("dense", 0, 3, 2),
]
RUNS += [run("hash", 0, 2, 0.5), run("base", 7, 3, 2)]


def implied(size, n_experts):
    at = [language_flops(size, n_experts=n_experts, experts_per_token=k) for k in (1, 2)]
    return 1 + (2.0 / 1.42 - 1) * at[0] / (at[1] - at[0])


def dropped(experts, n_experts, factor):
    places = max(1, math.floor(factor * math.ceil(len(experts) / n_experts)))
    return sum(max(0, experts.count(expert) - places) for expert in range(n_experts)) / len(experts)


def rounded_up(experts, n_experts, factor):
    places = math.ceil(factor * len(experts) / n_experts)
    return sum(max(0, experts.count(expert) - places) for expert in range(n_experts)) / len(experts)


def rounded_down(experts, n_experts, factor):
    places = math.floor(factor * (len(experts) / n_experts))
    return sum(max(0, experts.count(expert) - places) for expert in range(n_experts)) / len(experts)


def short(soft=0.005, hard=0.01, **changes):
    return dataclasses.replace(DTS, soft_share=soft, hard_share=hard, **changes)


def trained(config):
    """Instead of a training run: the FLOPs of (2) with all experts until the gate is hard."""
    extra = config.hard_after * 7 * 0.25 / config.steps if config.gate == "dts" else 0
    return SimpleNamespace(metrics={"training_flops": 1 + extra})


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (language.check_never, ({"dts": {0}, "dense": {0}}, RUNS)),
        (language.check_never, ({"dts": [0], "dense": [0], "hash": []}, RUNS)),
        (language.check_implied, (implied,)),
        (language.check_dropped, (dropped,)),
        (language.check_short_phase, (short(), DTS, trained)),
        (language.check_counterexample, ([3.0, 1.0, 2.0, 1.0], [3.0, 2.0, 1.5, 0.5])),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (language.check_never, (None, RUNS), "Not answered yet"),
        (language.check_never, ({"dts": {0}}, RUNS), "dense: you name seeds [], 1 of its seeds never arrive"),
        (language.check_never, ({"dts": {0, 1}, "dense": {0}}, RUNS), "dts: you name seeds [0, 1], 1 of its seeds"),
        (language.check_never, ({"dts": {0, 5}, "dense": {0}}, RUNS), "dts was not run with seeds [5]"),
        (language.check_implied, (None,), "Not answered yet"),
        (language.check_implied, (lambda size, n: 2.0 / 1.42,), "Which share of a Switch step is one expert?"),
        (
            language.check_implied,
            (lambda size, n: language.implied_mean(size, n, 1.42, 2.0),),
            "does a step of DTS cost more or less",
        ),
        (language.check_implied, (lambda size, n: 7.0,), "F is affine in k"),
        (language.check_dropped, (None,), "Not answered yet"),
        (language.check_dropped, (lambda *_: 0.0,), "all to expert 0 of four: an expert has 2 places, so 0.750"),
        (language.check_dropped, (rounded_up,), "rounded down"),
        (language.check_dropped, (rounded_down,), "rounded up first"),
        (language.check_short_phase, (None, DTS, trained), "Not answered yet"),
        (language.check_short_phase, (short(threshold=0.05), DTS, trained), "you changed threshold"),
        (language.check_short_phase, (short(hard=0.005), DTS, trained), "keep a soft phase of two steps"),
        (language.check_short_phase, (short(hard=1.0), DTS, trained), "a hard switch after it"),
        (language.check_short_phase, (DTS, DTS, trained), "10.5 % more FLOPs than Switch"),
        (language.check_counterexample, (None, None), "Not answered yet"),
        (language.check_counterexample, ([2.0, 1.0], [2.0]), "equally long"),
        (language.check_counterexample, ([2.0, 1.0], [2.0, 1.0]), "must end below the base"),
        (language.check_counterexample, ([3.0, 2.0, 1.0], [3.0, 1.0, 0.5]), "needs 1.50 times fewer steps"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out


def test_the_paper_s_shape_implies_few_experts():
    size, n_experts = language.SHAPES["24 layers of 1024, 16 experts"]
    assert language.implied_mean(size, n_experts) == pytest.approx(2.6, abs=0.1)


def test_who_never_arrives_is_read_off_the_curves():
    assert language.never_arriving(RUNS) == {"dts": {0}, "dense": {0}}
