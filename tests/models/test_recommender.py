"""The recommender: the paper's size, and its pieces wired as the docstring says."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import relu

from moe_lab.gates import CometGate, HashGate, SoftmaxGate, TopKGate
from moe_lab.models import TwoTaskRecommender


def test_movielens_model_with_comet_has_the_paper_s_number_of_parameters():
    """By hand: embeddings (6040 + 3952) * 128 = 1,278,976; experts 16 * (256 * 256 + 256) = 1,052,672; heads
    2 * (256 * 256 + 256 + 256 + 1) = 132,098; gates 2 * (15 + 16) * 2 * 257 = 31,868."""
    model = TwoTaskRecommender(6040, 3952, n_experts=16, gates=[CometGate(256, 16, 2) for _ in range(2)])

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.user_embedding) + count(model.item_embedding) == 1_278_976
    assert count(model.moe.experts) == 1_052_672
    assert count(model.heads) == 132_098
    assert count(model.moe.gates) == 31_868
    assert count(model) == 2_495_614


def test_prediction_equals_the_formula_written_out():
    torch.manual_seed(0)
    gates = [SoftmaxGate(6, 3), TopKGate(6, 3, 2)]
    model = TwoTaskRecommender(5, 7, embedding=3, hidden=4, head=2, n_experts=3, gates=gates).double().eval()
    user, item = torch.tensor([0, 4, 4]), torch.tensor([6, 0, 3])
    output = model(user, item)
    x = torch.cat((model.user_embedding.weight[user], model.item_embedding.weight[item]), 1)
    bank = model.moe.experts
    experts = [relu(x @ bank.weights[0][e] + bank.biases[0][e]) for e in range(3)]
    for task, got in enumerate((output.watch_logit, output.rating)):
        weights = output.routings[task].weights
        y = sum(weights[:, [e]] * experts[e] for e in range(3))
        first, _, last = model.heads[task]
        expected = relu(y @ first.weight.T + first.bias) @ last.weight.T + last.bias
        torch.testing.assert_close(got, expected.squeeze(1))
    assert output.routings[1].experts_per_token.tolist() == [2, 2, 2]


def test_hash_gates_route_by_user_for_both_tasks():
    gates = [HashGate(5, 4, seed=1), HashGate(5, 4, seed=1)]
    model = TwoTaskRecommender(5, 7, embedding=3, hidden=4, head=2, n_experts=4, gates=gates)
    user = torch.tensor([3, 0, 3, 2])
    for routing in model(user, torch.tensor([1, 2, 3, 4])).routings:
        assert torch.equal(routing.weights.argmax(1), gates[0].table[user])


def test_embeddings_start_in_keras_s_range_and_follow_the_generator():
    def build():
        generator = torch.Generator().manual_seed(3)
        gates = [SoftmaxGate(16, 2, generator=generator) for _ in range(2)]
        return TwoTaskRecommender(300, 200, embedding=8, n_experts=2, gates=gates, generator=generator)

    first, second = build(), build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for table in (first.user_embedding, first.item_embedding):
        assert 0.0499 < table.weight.abs().max() <= 0.05


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    gates = [SoftmaxGate(8, 2), SoftmaxGate(8, 2)]
    model = TwoTaskRecommender(5, 5, embedding=4, n_experts=2, gates=gates)
    rows = torch.arange(5), torch.arange(5)
    assert not torch.equal(model(*rows).rating, model(*rows).rating)
    model.eval()
    assert torch.equal(model(*rows).rating, model(*rows).rating)


def test_one_gate_for_two_tasks_is_refused():
    with pytest.raises(ValueError, match="two gates"):
        TwoTaskRecommender(5, 5, n_experts=2, gates=[SoftmaxGate(256, 2)])
