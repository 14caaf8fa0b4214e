"""COMET's kernels against `comet`'s own functions and autograd.

The Triton half runs on CUDA, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/gates/test_comet_kernels.py.
"""

from __future__ import annotations

import pytest
import torch

from moe_lab import triton_support
from moe_lab.gates import comet_kernels
from moe_lab.gates.comet_kernels import TreeBlocks, trees, trees_backward, trees_oracle
from moe_lab.gates.trees import walk_levels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not triton_support.usable(torch.empty(1, device=DEVICE)),
    reason="needs Triton and CUDA, or Triton and TRITON_INTERPRET=1",
)
# The interpreter computes what will be masked away, too: 0 / 0 behind the last token.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
SHAPES = [(1, 2, 1), (7, 5, 2), (129, 3, 1), (33, 17, 3), (64, 16, 4), (40, 1, 2)]  # T, E, K


@pytest.fixture(params=["whole", "subtrees"])
def blocks(request, monkeypatch):
    """Trees as one subtree, or as subtrees of 4 leaves in the forward and 2 in the backward."""
    if request.param == "subtrees":
        monkeypatch.setattr(comet_kernels, "WHOLE", 1)
        monkeypatch.setattr(comet_kernels, "BLOCKS", {"forward": TreeBlocks(1, 2), "backward": TreeBlocks(1, 1)})


def drawn(tokens, n_experts, k, scale=0.4):
    """Logits (C, T), some of them saturated, and bias (C,)."""
    n_logits = (2 * n_experts - 1) * k
    return torch.randn(n_logits, tokens, device=DEVICE) * scale, torch.randn(n_logits, device=DEVICE) * 0.1


def both_ways(logits, bias, k, gamma=1.0, entropy=True, dtype=torch.float32):
    """(weights, entropy, gradient of the logits) of the kernels, and of the oracle."""
    logits = logits.requires_grad_()
    expected, uncertain, *_ = trees_oracle(logits, bias, k, gamma)
    grad = torch.randn(expected.shape, device=DEVICE)
    (slope,) = torch.autograd.grad((expected * grad).sum() + (3 * uncertain if entropy else 0), logits)
    logits = logits.detach()
    weights, log_mass, found = trees(logits, bias, k, gamma, entropy)
    given = torch.tensor(3.0, device=DEVICE) if entropy else None
    own = trees_backward(logits, bias, weights, log_mass, k, gamma, grad, given, dtype)
    return (weights, found, own), (expected.detach(), uncertain.detach() if entropy else None, slope)


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def zero_factor(logits, bias, k):
    """(C, T) bool: the gradient of this logit has a factor that is exactly 0; a 0 by cancellation is not meant."""
    n_splits = (len(bias) // k - 1) // 2
    split = (logits.detach() + bias[:, None])[: n_splits * k].unflatten(0, (-1, k))
    reach, p = walk_levels(split, 1.0)
    never = torch.cat([*reach, p]) == 0
    never[:n_splits] |= split.abs() >= 0.5
    return never.flatten(0, 1)


@needs_triton
@pytest.mark.parametrize(("tokens", "n_experts", "k"), SHAPES)
def test_the_kernels_agree_with_the_oracle_and_autograd(tokens, n_experts, k, blocks):
    logits, bias = drawn(tokens, n_experts, k)
    found, expected = both_ways(logits, bias, k)
    close(found, expected)
    assert torch.equal(found[0] == 0, expected[0] == 0)
    exact = zero_factor(logits, bias, k)
    if n_experts > 2 and tokens > 30:
        assert exact.any()
    assert (found[2][exact] == 0).all() and (expected[2][exact] == 0).all()


def test_a_zero_by_cancellation_is_one_to_rounding():
    """One expert has weight 1 whatever its logits: the gradients of its trees cancel, in the oracle too."""
    logits, bias = torch.randn(4, 4000, requires_grad=True), torch.zeros(4)
    assert not zero_factor(logits, bias, 4).any()
    weights, *_ = trees_oracle(logits, bias, 4, 1.0)
    (grad,) = torch.autograd.grad((weights * torch.randn(4000)).sum(), logits)
    assert 0 < grad.abs().max() < 1e-6


@needs_triton
@pytest.mark.parametrize("gamma", [0.1, 10.0])
def test_every_width_of_the_smooth_step_agrees_and_the_entropy_may_be_left_out(gamma):
    logits, bias = drawn(9, 6, 2, scale=0.4 * gamma)
    close(*both_ways(logits, bias * gamma, 2, gamma, entropy=False), tolerance=2e-5)


@needs_triton
def test_the_highest_logit_may_come_last_and_unreachable_ones_may_be_anything(blocks):
    """Masses are shifted by the highest reachable logit so far: 200 more than before must not overflow."""
    logits, bias = drawn(5, 8, 2)
    leaves = logits[14:].view(8, 2, 5)
    leaves += torch.linspace(-200, 200, 8, device=DEVICE)[:, None, None]
    found, expected = both_ways(logits, bias, 2)
    close(found, expected, 1e-4)
    logits, bias = drawn(5, 8, 2)
    logits[:2] = 9.0  # both roots send everybody to the left
    logits[14:].view(8, 2, 5)[4:] = 3e38
    found, expected = both_ways(logits, torch.zeros_like(bias), 2)
    close(found, expected)
    assert (found[0][4:] == 0).all() and (found[2][14:].view(8, 2, 5)[4:] == 0).all()


@needs_triton
def test_subtrees_that_no_token_of_a_block_reaches_are_not_computed(monkeypatch):
    """Their logits are NaN, which anything computed with them would be: weights and gradients stay what they were."""
    monkeypatch.setattr(comet_kernels, "WHOLE", 1)
    monkeypatch.setattr(comet_kernels, "BLOCKS", dict.fromkeys(("forward", "backward"), TreeBlocks(1, 2)))
    k, tokens = 2, 64  # two blocks of 32 tokens; 8 experts: two subtrees of 4 leaves
    logits, bias = drawn(tokens, 8, k, scale=0.2)
    bias.zero_()
    splits, leaves = logits[:14].view(7, k, tokens), logits[14:].view(8, k, tokens)
    splits[0, 0, :32] = 9.0  # in tree 0 the first block goes left, all of it
    splits[0, 1, 32:] = -9.0  # in tree 1 the second one goes right, all of it but its last token
    splits[0, 1, 63] = 9.0
    found, expected = both_ways(logits.clone(), bias, k)
    close(found, expected)
    right, left = [2, 5, 6], [1, 3, 4]
    splits[right, 0, :32] = torch.nan
    leaves[4:, 0, :32] = torch.nan
    weights, log_mass, entropy = trees(logits, bias, k, 1.0, True)
    assert torch.equal(weights, found[0]) and torch.equal(entropy, found[1])
    grad = torch.randn_like(weights)
    slope = trees_backward(logits, bias, weights, log_mass, k, 1.0, grad, entropy, torch.float32)
    assert slope.isfinite().all()
    assert (slope[:14].view(7, k, tokens)[right, 0, :32] == 0).all()
    assert (slope[14:].view(8, k, tokens)[4:, 0, :32] == 0).all()
    splits[left, 1, 32:63] = torch.nan  # one token of the block does go left: this subtree is computed
    assert not trees(logits, bias, k, 1.0, True)[2].isfinite()


@needs_triton
def test_gradients_are_rounded_to_the_dtype_that_their_products_want():
    logits, bias = drawn(12, 5, 2)
    (_, _, found), (_, _, expected) = both_ways(logits, bias, 2, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)  # the interpreter cuts off


def test_the_oracle_s_gradient_of_an_unreached_subtree_is_exactly_zero():
    logits = torch.randn(14 + 16, 6) * 0.2
    logits[:2] = 9.0
    logits.requires_grad_()
    weights, entropy, p, g = trees_oracle(logits, torch.zeros(30), 2, 1.0)
    assert torch.equal(g.sum(1), weights) and (p[4:] == 0).all()
    (grad,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum() + entropy, logits)
    assert (grad[14:].view(8, 2, 6)[4:] == 0).all()
    assert (grad[:14].view(7, 2, 6)[[0, 2, 5, 6]] == 0).all() and (grad[:14].view(7, 2, 6)[[1, 3, 4]] != 0).any()


def test_blocks_are_chosen_by_whether_a_tree_is_one_subtree_and_large_trees_have_few_levels_above(monkeypatch):
    monkeypatch.setattr(comet_kernels, "WHOLE_BLOCKS", {"forward": TreeBlocks(4, 4), "backward": TreeBlocks(4, 4)})
    monkeypatch.setattr(comet_kernels, "BLOCKS", {"forward": TreeBlocks(1, 4), "backward": TreeBlocks(1, 3)})
    for n_experts, depth, whole in ((1, 0, True), (2, 1, True), (16, 4, True), (17, 5, False), (1024, 10, False)):
        table = comet_kernels.blocks_table(n_experts)
        assert (table is comet_kernels.WHOLE_BLOCKS) == whole and comet_kernels.depth(n_experts) == depth
        for which, blocks in table.items():
            sizes = comet_kernels._sizes(which, n_experts, 2)
            assert sizes["TOP"] + sizes["LEVELS"] == depth and sizes["TOP"] <= comet_kernels.MOST_ABOVE
            assert sizes["LEVELS"] == (depth if whole else max(blocks.levels, depth - comet_kernels.MOST_ABOVE))
