"""What notebook 15 measures computes what it says; times themselves are not tested."""

import pytest
import torch

from moe_lab.bench import speed_cases
from moe_lab.bench.exit_cases import ExitNetwork
from moe_lab.bench.gpu_problem import Problem, Shape
from moe_lab.bench.gpu_stages import stages
from moe_lab.bench.speed_cases import Layer

SHAPE = Shape(tokens=64, width=8, hidden=12, experts=4, k=2)


def test_masked_and_dispatched_are_the_same_layer():
    ways = Layer(SHAPE, seed=3).cases()
    assert torch.allclose(ways["all experts, masked"](), ways["dispatched"](), atol=1e-6)
    assert ways["dense, equal multiply-adds"]().shape == (64, 8)


def test_every_token_has_k_experts_whose_weights_sum_to_1():
    weights = Layer(SHAPE, popular=0.4).weights
    assert ((weights != 0).sum(1) == 2).all() and torch.allclose(weights.sum(1), torch.ones(64))


@pytest.mark.parametrize(("k", "popular"), [(1, 0.5), (2, 0.5), (2, 0.3)])
def test_the_popular_expert_gets_its_share_of_the_pairs(k, popular):
    counts = Layer(Shape(4096, 4, 4, 8, k), popular=popular).counts.double()
    assert float(counts[0] / counts.sum()) == pytest.approx(popular, abs=0.02)
    others = counts[1:] / counts.sum()
    assert others.max() - others.min() < 0.03


@pytest.mark.parametrize("popular", [0.1, 0.6])
def test_shares_that_cannot_be_are_refused(popular):
    with pytest.raises(ValueError, match="1/K"):
        Layer(SHAPE, popular=popular)


def test_experts_alone_see_their_own_rows():
    layer = Layer(Shape(32, 8, 12, 4, 1), popular=0.5)
    outputs = [function() for function in layer.each_expert().values()]
    assert [len(out) for out in outputs] == layer.counts.tolist()
    together = layer.cases()["dispatched"]()
    assert torch.allclose(together[layer.weights[:, 2] != 0], outputs[2], atol=1e-6)  # weights are 1


def test_tables_have_a_row_for_each_case():
    table = speed_cases.growth((2, 4), 16, 8, 12, 2, rounds=1)
    assert list(table.index) == [2, 4] and (table > 0).all().all() and table.shape[1] == 3
    layers = {"alike": Layer(SHAPE), "popular": Layer(SHAPE, popular=0.5)}
    found, each = speed_cases.loads(layers, rounds=1)
    assert list(found.index) == ["alike", "popular"] and [len(values) for values in each.values()] == [4, 4]
    assert found.slowest_ms["popular"] == pytest.approx(max(each["popular"]))
    assert found.largest["popular"] == pytest.approx(2.0, abs=0.3)  # half of the pairs, 4 experts


def test_capacity_by_hand():
    # 4 tokens to expert 0, 1 to expert 1, none to the others; a fair share is ceil(5 / 4) = 2
    weights = torch.zeros(5, 4)
    weights[:4, 0] = weights[4, 1] = 1
    table = speed_cases.capacities(weights, (1.0, 2.0, None))
    assert table.capacity.tolist() == [2, 4, 4]
    assert table.dropped.tolist() == pytest.approx([2 / 5, 0, 0])
    assert table.padded.tolist() == pytest.approx([1 - 3 / 8, 1 - 5 / 16, 1 - 5 / 16])
    assert table.largest.tolist() == pytest.approx([8 / 5, 16 / 5, 16 / 5])


def test_stages_and_whole_steps_are_those_of_the_benchmark():
    problem = Problem(SHAPE, "cpu", torch.float32)
    assert [row["stage"] for row in speed_cases.stage_rows(problem, rounds=1)] == list(stages(problem))
    table = speed_cases.whole_steps(problem, rounds=1)
    assert list(table.index) == ["dense", "plain", "ours"] and table.of_dense["dense"] == 1
    assert table.of_dense["ours"] == pytest.approx(table.ms["dense"] / table.ms["ours"])


def test_exits_are_timed_beside_the_multiply_adds_that_they_save():
    table = speed_cases.exit_times(ExitNetwork(3, 16, 8, rho=0.7), (1, 8), images=8, rounds=1)
    assert list(table.index) == [1, 8] and (table.ratio > 1.2).all()
    assert table.over_plain[8] == pytest.approx(table.plain[8] / table.predict[8])


def test_zeros_of_every_kind_are_the_share_that_was_asked_for():
    table = speed_cases.kinds_of_zeros(64, 0.75, block=8, rounds=1)
    assert table.operations.tolist() == pytest.approx([1, 1, 0.25, 0.25], abs=0.03)
    assert table.times.iloc[0] == 1


def test_blocks_skip_less_than_tokens_and_soft_gates_nothing():
    table = speed_cases.skipped_subtrees((1, 100), 32, 2, tokens=64, width=16, levels=3, block=8)
    assert table.zeros[1] == table.by_token[1] == 0
    assert table.zeros[100] > 0.3 and (table.by_block <= table.by_token).all()
    alone = speed_cases.skipped_subtrees((100,), 32, 2, tokens=64, width=16, levels=3, block=1)
    assert alone.by_block[100] == pytest.approx(alone.by_token[100])
