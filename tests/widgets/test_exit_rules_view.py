"""Four rules by hand, the pictures that go first and last, and a figure that redraws quickly."""

import pytest
import torch
from slider_time import IN_TIME, plain_figures

from moe_lab.exits.policies import apply_thresholds, confidence, geometric_thresholds
from moe_lab.widgets.exit_rules import RULES, RulesView

COSTS = torch.tensor([0.25, 0.5, 1.0])


def view(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 3, 4, generator=generator)
    labels = torch.randint(4, (n,), generator=generator)
    known = 2 * torch.randn(80, 3, 4, generator=generator)
    return RulesView(logits, labels, COSTS, known, torch.rand(n, 8, 8, generator=generator)), logits, labels, known


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_rules_do_what_their_numbers_say():
    rules, logits, labels, known = view()
    p = logits.softmax(-1)
    for rule, value, sure in (
        ("probability", 0.6, p.amax(-1) >= 0.6),
        ("entropy", 0.7, -(p * p.log()).sum(-1) <= 0.7),
        ("margin", 0.3, p.topk(2).values.diff().squeeze(-1).neg() >= 0.3),
    ):
        sure[:, -1] = True
        exits = sure.byte().argmax(1)
        now = rules.at(rule, value)
        assert torch.equal(now.exits, exits)
        right = logits.argmax(-1)[torch.arange(60), exits] == labels
        assert now.cost == pytest.approx(COSTS[exits].mean().item())
        assert now.accuracy == pytest.approx(right.double().mean().item())
        assert sum(now.shares) == pytest.approx(1)
    expected = apply_thresholds(confidence(logits), geometric_thresholds(confidence(known), 1.5))
    assert torch.equal(rules.at("ratio", 1.5).exits, expected)
    with pytest.raises(ValueError, match="did you mean 'margin'"):
        rules.at("margins", 0.5)


def test_the_surest_leave_first_and_the_least_sure_last():
    rules, *_ = view()
    now = rules.at("probability", 0.6)
    first, last = rules.first_and_last(now.exits)
    sure = rules.sure["probability"][:, 0]
    assert len(first) == len(last) == 6 and first[0] == sure.argmax()
    assert now.exits[first].max() <= now.exits[last].min()
    stayed = now.exits == now.exits.max()
    assert sure[last[0]] == sure[stayed].min()


def test_every_rule_is_named_with_its_cost_and_accuracy():
    rules, *_ = view()
    written = texts(rules.view(0.6, 0.7, 0.3, 1.5, pictures="margin"))
    for rule, value in zip(RULES, (0.6, 0.7, 0.3, 1.5), strict=True):
        now = rules.at(rule, value)
        wanted = f"{RULES[rule][0]} {value:.2f}: cost {now.cost:.2f}, accuracy {100 * now.accuracy:.1f} %"
        assert wanted in written
    assert "leave first (margin): exit, ✓ right ✗ wrong" in written
    assert len(rules.view().axes[0].images) == 12
    with pytest.raises(ValueError, match="unknown rule"):
        rules.view(pictures="gates")


def test_shapes_that_do_not_fit_are_refused():
    _, logits, labels, known = view()
    with pytest.raises(ValueError, match="do not fit"):
        RulesView(logits, labels[:5], COSTS, known, torch.zeros(60, 8, 8))
    with pytest.raises(ValueError, match="images must be"):
        RulesView(logits, labels, COSTS, known, torch.zeros(60, 1, 8, 8))


def test_the_view_is_quick_enough_for_a_slider():
    rules, *_ = view(2000)

    assert plain_figures(lambda: rules.view(0.5)) < 1.25 * IN_TIME
