"""Banks: initialisation, dropout, and that grouped rows meet their own expert."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lab.experts import ConvExperts, MLPExperts
from moe_lab.experts.dropout import dropout, relu_dropout_


@pytest.mark.parametrize(
    ("bank", "x"),
    [
        (MLPExperts(4, (5, 7, 3)), torch.randn(10, 5)),
        (MLPExperts(4, (5, 3), activation="gelu", activate_last=False), torch.randn(10, 5)),
        (ConvExperts(4, 1, 14, channels=(2, 3), kernel=3, dense=(6, 4)), torch.randn(10, 1, 14, 14)),
    ],
)
def test_rows_of_an_expert_meet_only_that_expert(bank, x):
    counts = [3, 0, 6, 1]
    y = bank(x, counts)
    for expert, (rows, outputs) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        torch.testing.assert_close(outputs, bank.single(expert, rows))
    together = bank(x).view(4, 10, -1)
    for expert in range(4):
        torch.testing.assert_close(together[expert], bank.single(expert, x))


def test_glorot_bounds_use_the_fans_of_one_expert():
    bank = MLPExperts(64, (30, 20), generator=torch.Generator().manual_seed(0))
    bound = math.sqrt(6 / 50)
    assert 0.99 * bound < bank.weights[0].abs().max() <= bound
    assert bank.biases[0].abs().max() == 0
    conv = ConvExperts(16, 2, 20, generator=torch.Generator().manual_seed(0))
    bound = math.sqrt(6 / (2 * 25 + 10 * 25))
    assert 0.99 * bound < conv.weights[0].abs().max() <= bound


def test_the_same_generator_gives_the_same_experts_and_experts_differ():
    first, second = (MLPExperts(3, (4, 4), generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.weights[0], second.weights[0])
    assert not torch.equal(first.weights[0][0], first.weights[0][1])


def test_the_paper_s_cnn_has_its_sizes():
    """MultiMNIST, one expert: 1*10*25+10, 10*20*25+20, (36-4)/2=16, (16-4)/2=6, 20*36*50+50, 50*50+50."""
    bank = ConvExperts(1, 1, 36)
    assert sum(p.numel() for p in bank.parameters()) == 260 + 5020 + 36050 + 2550


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_stated_share(p):
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1003), p, True)
    kept = round((1 - p) * 256) / 256
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / kept).item()}
    n = y.numel()
    assert abs((y != 0).float().mean() - kept) < 4 * math.sqrt(kept * (1 - kept) / n)
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), rtol=0, atol=4 * math.sqrt((1 - kept) / kept / n))


def test_each_byte_of_the_random_words_is_used_evenly_and_independently():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(200_000, 8), 0.5, True) != 0).float()  # column = byte of the 64-bit word
    tolerance = 4.5 * 0.5 / math.sqrt(200_000)
    assert (kept.mean(0) - 0.5).abs().max() < tolerance
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / math.sqrt(200_000)


def test_dropout_has_the_same_mask_in_the_backward_pass_and_none_in_eval():
    x = torch.ones(50, 50, requires_grad=True)
    y = dropout(x, 0.3, True)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, 0.3, False) is x
    assert dropout(x, 0.0, True) is x


def test_dropout_follows_the_seed():
    x = torch.ones(20, 20)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5, True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_is_drawn_for_each_pair_of_token_and_expert():
    """Two experts with equal weights on the same token: equal without dropout, different masks with it."""
    bank = MLPExperts(2, (4, 64), dropout=0.5)
    with torch.no_grad():
        bank.weights[0][1] = bank.weights[0][0]
    x = torch.randn(1, 4).expand(2, 4)
    first, second = bank(x, [1, 1])
    assert not torch.equal(first, second)
    first, second = bank.eval()(x, [1, 1])
    assert torch.equal(first, second)


def test_impossible_banks_are_refused_with_advice():
    with pytest.raises(ValueError, match="smaller kernel"):
        ConvExperts(2, 1, 10)
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        MLPExperts(2, (3, 3), activation="rellu")
    with pytest.raises(ValueError, match="probability"):
        MLPExperts(2, (3, 3), dropout=1.0)
    with pytest.raises(ValueError, match="sizes"):
        MLPExperts(2, (3,))
    with pytest.raises(ValueError, match="sum to the 5 rows"):
        MLPExperts(2, (3, 3))(torch.randn(5, 3), [2, 2])


def test_the_grouped_convolution_that_gpus_use_equals_the_loop_over_experts():
    bank = ConvExperts(3, 2, 13, channels=(4, 5), kernel=3, dense=(6,)).double()
    x = torch.randn(7, 2, 13, 13, dtype=torch.float64)
    grouped = bank.head(bank._all_features(x), [7] * 3)
    torch.testing.assert_close(grouped, bank(x))
    of_grouped = torch.autograd.grad(grouped.square().sum(), list(bank.parameters()))
    of_loop = torch.autograd.grad(bank(x).square().sum(), list(bank.parameters()))
    for one, other in zip(of_grouped, of_loop, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_relu_and_dropout_in_one_go_equal_the_two_steps(p):
    start = torch.randn(40, 30)
    results = []
    for fused in (True, False):
        torch.manual_seed(4)
        x = start.clone().requires_grad_()
        z = x * 1  # a leaf must not be overwritten
        y = relu_dropout_(z, p, True) if fused else dropout(z.relu(), p, True)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
