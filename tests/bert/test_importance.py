"""Importance is what autograd says, one example at a time."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe_lab.bert import neuron_importance


def losses(model, batch):
    return cross_entropy(
        model(batch["tokens"], batch["seen"], batch["segments"]).logits, batch["label"], reduction="none"
    )


def pieces(batch, size):
    n = len(batch["label"])
    return [{name: values[i : i + size] for name, values in batch.items()} for i in range(0, n, size)]


def one_by_one(model, batch):
    """The definition: the gradient of each example's loss with respect to the weights."""
    totals = [0.0] * len(model.encoder.encoder.layer)
    for one in pieces(batch, 1):
        model.zero_grad()
        losses(model, one).sum().backward()
        for index, layer in enumerate(model.encoder.encoder.layer):
            first, second = layer.intermediate.dense.weight, layer.output.dense.weight
            terms = (first * first.grad).sum(1) + (second * second.grad).sum(0)
            totals[index] = totals[index] + terms.abs().detach()
    model.zero_grad()
    return [total / len(batch["label"]) for total in totals]


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_it_is_the_definition_whatever_the_batches(teacher, batch, size, pool):
    teacher.double().pool = pool
    wanted = one_by_one(teacher, batch)
    found = neuron_importance(teacher, pieces(batch, size), losses)
    assert [tuple(values.shape) for values in found] == [(24,), (24,)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
        assert ours.min() >= 0 and ours.max() > 0


def test_it_is_not_the_gradient_of_the_mean_loss(teacher, batch):
    """Examples that pull a neuron in opposite directions both count."""
    teacher.double()
    twice = {name: torch.cat([values[:1], values[:1]]) for name, values in batch.items()}
    twice["label"] = torch.tensor([0, 1])
    with torch.no_grad():
        teacher.head.weight.zero_()[0] = 0.1  # p = 1/2, up to the sign: the two gradients are opposite
        teacher.head.weight[1] = -0.1
    found = neuron_importance(teacher, [twice], losses)[1]
    assert found.max() > 1e-6


def test_a_neuron_without_weights_has_none_and_bias_is_ignored(teacher, batch):
    layer = teacher.encoder.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[3] = 0
        layer.intermediate.dense.bias[3] = 2.0
        layer.output.dense.weight[:, 3] = 0
    found = neuron_importance(teacher, [batch], losses)[0]
    assert found[3] == 0 and (found > 0).sum() == 23


def test_it_is_the_first_order_change_of_the_loss(teacher, batch):
    """Shrinking a neuron's weights by a little changes one example's loss by that share of its importance."""
    teacher.double()
    one = pieces(batch, 1)[2]
    found = neuron_importance(teacher, [one], losses)
    share = 1e-5
    for index in range(2):
        for neuron in (0, 11):
            smaller = copy.deepcopy(teacher)
            layer = smaller.encoder.encoder.layer[index]
            with torch.no_grad():
                layer.intermediate.dense.weight[neuron] *= 1 - share
                layer.output.dense.weight[:, neuron] *= 1 - share
                change = (losses(smaller, one) - losses(teacher, one)).abs() / share
            assert float(change) == pytest.approx(float(found[index][neuron]), rel=1e-2, abs=1e-8)


def test_the_model_is_left_as_it_was(teacher, batch):
    teacher.train()
    teacher.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = neuron_importance(teacher, [batch], losses)
    second = neuron_importance(teacher, [batch], losses)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # no dropout although in training mode
    assert teacher.training and teacher.encoder.training
    assert [parameter.requires_grad for parameter in teacher.head.parameters()] == [False, True]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.encoder.embeddings._forward_hooks


def test_what_cannot_be_measured_is_refused(teacher, batch):
    with pytest.raises(ValueError, match="at least one batch"):
        neuron_importance(teacher, [], losses)
    with pytest.raises(ValueError, match="one number per example"):
        neuron_importance(teacher, [batch], lambda model, batch: losses(model, batch).mean())
    assert not teacher.encoder.encoder.layer[0].output.dense._forward_pre_hooks
