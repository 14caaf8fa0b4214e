"""Checks of notebook 08 accept a right answer and say what is wrong with others."""

import math

import pytest
import torch

from moe_lab.exercises import evolution


def distance(rho, sigma):
    return 1 - (1 - rho) ** 2 / (1 - rho + sigma**2)


def by_turns(step, x, n_experts):
    return torch.eye(n_experts)[torch.arange(len(x)) % n_experts]


def uniform(step, x, n_experts):
    return torch.full((len(x), n_experts), 1 / n_experts)


def memory(beta2, n):
    return max(0, math.ceil(math.log((n**2 - 1) / 3) / -math.log(beta2) - 1e-9))


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (evolution.check_distance, distance),
        (evolution.check_break_even, lambda rho: (2 - rho) / (1 - rho)),
        (evolution.check_breaking, by_turns),
        (evolution.check_memory, memory),
        (evolution.check_counterexample, ([1, -1], [1, 1])),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(answer)
    assert capsys.readouterr().out.startswith("Right.")


CHECKS = [getattr(evolution, name) for name in dir(evolution) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_no_answer_is_no_mistake(check, capsys):
    assert not check(None)
    assert capsys.readouterr().out == "Not answered yet.\n"


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (evolution.check_distance, lambda rho, sigma: rho, "what about the lengths?"),
        (evolution.check_distance, lambda rho, sigma: 1 - (1 - rho) ** 2 / (1 - rho + sigma), "adds σ²"),
        (evolution.check_distance, lambda rho, sigma: rho**2, "you say 0.090, two such experts are 0.300 apart"),
        (evolution.check_break_even, lambda rho: 1.0, "0.100 (plain) and 0.111 (rescaled): plain is better already"),
        (evolution.check_break_even, lambda rho: 20.0, "rescaled is better already"),
        (evolution.check_break_even, lambda rho: 0.0, "with 0.00 experts"),
        (evolution.check_breaking, uniform, "0.000 apart in function"),
        (evolution.check_breaking, lambda step, x, n: by_turns(step, x, n)[:5], "shape (64, 4), yours have (5, 4)"),
        (evolution.check_breaking, lambda step, x, n: 2 * uniform(step, x, n), "one of yours sums to 2.00"),
        (evolution.check_breaking, lambda step, x, n: 1.5 * uniform(step, x, n) - 0.5 * by_turns(step, x, n), "negat"),
        (evolution.check_breaking, lambda step, x, n: by_turns(step, x, n)[:1].expand(len(x), n), "gets 100%"),
        (evolution.check_memory, lambda beta2, n: 10, "at t = 10 the step is 0.138"),
        (evolution.check_memory, lambda beta2, n: memory(beta2, n) - 0.5, "round up"),
        (evolution.check_counterexample, ([1], [1, 1]), "yours have 1 and 2"),
        (evolution.check_counterexample, ([1, 2], [1, 1]), "the same side of 0"),
        (evolution.check_counterexample, ([1, -0.1], [1, 1]), "no real difference\n"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(answer)
    assert says in capsys.readouterr().out


def test_the_mean_over_masks_is_exact():
    # w · x = 3 - 1; masks leave 0, 3, -1 or 2, rescaled by 2: relu gives 0, 6, 0, 4
    assert evolution.masked_mean([3, 1], [1, -1]) == (2.0, 2.5)


def test_distance_formula_is_what_the_package_makes():
    from moe_lab.experts import MLPExperts
    from moe_lab.experts.evolve import expert_distances, spawn_experts

    generator = torch.Generator().manual_seed(0)
    one = MLPExperts(1, (300, 300), generator=generator)
    two = spawn_experts(one, 2, mask_ratio=0.2, noise=0.5, generator=generator)
    measured = expert_distances(two, torch.zeros(1, 300))["parameter"][0, 1].item()
    assert measured == pytest.approx(distance(0.2, 0.5), abs=0.01)
