"""Distillation terms by hand."""

import math

import pytest
import torch

from moe_lab.bert import layer_loss, prediction_loss


def test_layers_by_hand_over_real_tokens_or_over_all():
    seen = torch.tensor([[True, False]])
    teacher = [torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)]
    student = [torch.tensor([[[1.0, 3.0], [10.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])]
    assert float(layer_loss(student, teacher, seen)) == pytest.approx((1 + 9) / 2 + 4 / 2)  # padding left out
    assert float(layer_loss(student, teacher, seen, padding=True)) == pytest.approx((1 + 9 + 100) / 4 + 4 / 4)


def test_layers_are_added_up_and_equal_states_cost_nothing():
    states = [torch.randn(3, 4, 5) for _ in range(3)]
    seen = torch.ones(3, 4, dtype=torch.bool)
    assert float(layer_loss(states, states, seen)) == 0
    moved = [states[0], states[1] + 1, states[2] + 2]
    assert float(layer_loss(moved, states, seen)) == pytest.approx(1 + 4)


def test_no_gradient_at_padding():
    state = torch.randn(1, 3, 2, requires_grad=True)
    layer_loss([state], [torch.zeros(1, 3, 2)], torch.tensor([[True, True, False]])).backward()
    assert (state.grad[0, 2] == 0).all() and (state.grad[0, :2] != 0).all()


def test_predictions_by_hand():
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    p, q = (0.25, 0.75), (0.5, 0.5)
    by_hand = sum(0.5 * (a - b) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    assert float(prediction_loss(student, teacher)) == pytest.approx(by_hand)
    assert float(prediction_loss(teacher, student)) == pytest.approx(by_hand)  # symmetric
    twice = prediction_loss(torch.cat([student, teacher]), torch.cat([teacher, teacher]))
    assert float(twice) == pytest.approx(by_hand / 2)  # a mean over examples


def test_a_constant_added_to_the_logits_changes_nothing():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    assert float(prediction_loss(a + 7, b)) == pytest.approx(float(prediction_loss(a, b)), rel=1e-4)


def test_a_regression_is_compared_by_squares():
    assert float(prediction_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]]))) == 5


def test_start_and_end_of_an_answer_are_averaged():
    start, end = torch.randn(3, 1, 6), torch.randn(3, 1, 6)
    zero = torch.zeros(3, 2, 6)
    both = prediction_loss(torch.cat([start, end], 1), zero)
    single = [prediction_loss(one, zero[:, :1]) for one in (start, end)]
    assert float(both) == pytest.approx(float(sum(single)) / 2, rel=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the student has 1 hidden states, the teacher 2"):
        layer_loss([torch.zeros(1, 1, 1)], [torch.zeros(1, 1, 1)] * 2, torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="shapes"):
        prediction_loss(torch.zeros(2, 2), torch.zeros(2, 3))
