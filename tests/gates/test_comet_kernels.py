"""COMET's kernels against `comet`'s own functions and autograd.

The Triton half runs on CUDA, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/gates/test_comet_kernels.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from moe_lab.experts import kernels
from moe_lab.gates import CometGate, PermutationSearch, comet_kernels
from moe_lab.gates.comet_kernels import TreeBlocks, trees, trees_backward, trees_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not kernels.usable(torch.empty(1, device=DEVICE)), reason="needs Triton and CUDA, or Triton and TRITON_INTERPRET=1"
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


@needs_triton
@pytest.mark.parametrize(("tokens", "n_experts", "k"), SHAPES)
def test_the_kernels_agree_with_the_oracle_and_autograd(tokens, n_experts, k, blocks):
    found, expected = both_ways(*drawn(tokens, n_experts, k), k)
    close(found, expected)
    assert torch.equal(found[0] == 0, expected[0] == 0)
    if n_experts > 2 and tokens > 30:
        assert (expected[2] == 0).any()  # the case that the exact zeros are about
    assert (found[2][expected[2] == 0] == 0).all()


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
def test_a_token_of_nan_is_as_visible_as_in_the_reference():
    gate, fast = gates()
    x = torch.randn(4, 8, device=DEVICE)
    x[2, 0] = torch.nan
    for each in (gate, fast):
        weights, entropy, grad_x, grad_weight, *_ = everything(each, x)
        assert weights.isfinite().all(1).tolist() == [True, True, False, True]
        assert not entropy.isfinite() and not grad_weight.isfinite().all()
        assert grad_x[[0, 1, 3]].isfinite().all()


@needs_triton
def test_gradients_are_rounded_to_the_dtype_that_their_products_want():
    logits, bias = drawn(12, 5, 2)
    (_, _, found), (_, _, expected) = both_ways(logits, bias, 2, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)  # the interpreter cuts off


def gates(n_experts=6, k=2, dtype=torch.float32, width=8, scale=60):
    """The same gate twice, reference and fast; some splits saturate."""
    gate = CometGate(width, n_experts, k, backend="reference")
    with torch.no_grad():
        for parameter in gate.split.parameters():
            parameter.mul_(scale)
    gate = gate.to(DEVICE, dtype)
    fast = copy.deepcopy(gate)
    fast.backend = "fast"
    return gate, fast


def everything(gate, x, use_details=False):
    """Weights, losses, and the gradients of x and of all parameters."""
    x = x.detach().clone().requires_grad_()
    routing = gate(x)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(routing.weights.shape, generator=generator).to(DEVICE)
    value = (routing.weights * grad).sum() + 0.5 * sum(routing.losses.values())
    if use_details:
        value = value + (routing.details["tree_weights"] * grad[..., None]).square().sum()
        value = value + routing.details["tree_probabilities"].square().sum()
    leaves = [x, *(p for p in gate.parameters() if p.requires_grad)]
    return [routing.weights, *routing.losses.values(), *torch.autograd.grad(value, leaves, allow_unused=True)]


@needs_triton
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("use_details", [False, True])
def test_a_fast_gate_gives_what_the_reference_gives(k, use_details):
    gate, fast = gates(k=k)
    x = torch.randn(35, 8, device=DEVICE)
    close(everything(fast, x, use_details), everything(gate, x, use_details), 1e-4)
    here, there = gate(x), fast(x)
    assert torch.equal(here.active, there.active) and there.weights.shape == (35, 6)
    assert set(here.losses) == set(there.losses) == {"entropy"}
    assert set(here.details) == set(there.details) and len(there.details) == 2
    for name, tensor in here.details.items():
        torch.testing.assert_close(there.details[name], tensor, rtol=1e-5, atol=1e-5)
    assert "levels" not in there.details and not fast.eval()(x).losses


@needs_triton
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_tokens_lose_nothing_in_the_forward(parameters):
    gate, fast = gates(n_experts=5, dtype=parameters, scale=20)
    x = torch.randn(33, 8, device=DEVICE, dtype=torch.bfloat16)
    found, expected = everything(fast, x), everything(gate, x)
    tight = 1e-5 if parameters == torch.bfloat16 else 2e-4  # float32 parameters: two parts, 2^-17
    close(found[:2], expected[:2], tight)
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@needs_triton
def test_autocast_changes_nothing():
    gate, fast = gates()
    x = torch.randn(20, 8, device=DEVICE)
    expected = everything(gate, x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = everything(fast, x)
    close(found, expected, 1e-4)


@needs_triton
@pytest.mark.parametrize("steps_done", [0, 3])
def test_local_search_around_a_fast_gate_soft_and_hard(steps_done):
    gate, fast = gates()
    around = [PermutationSearch(g, 3, generator=torch.Generator().manual_seed(2)).to(DEVICE) for g in (gate, fast)]
    for search in around:
        for _ in range(steps_done):
            search.permutation.advance()
    x = torch.randn(9, 8, device=DEVICE)
    close(everything(around[1], x), everything(around[0], x), 1e-4)


@needs_triton
def test_what_needs_no_gradient_gets_none_and_parts_of_the_result_may_go_unused():
    gate, fast = gates()
    x = torch.randn(5, 8, device=DEVICE)
    with torch.no_grad():
        assert not fast(x).weights.requires_grad
    for part in ("entropy", "details"):
        results = []
        for each in (gate, fast):
            routing = each(x)
            value = routing.losses["entropy"] if part == "entropy" else routing.details["tree_weights"].square().sum()
            results.append(torch.autograd.grad(value, [each.split.weight, each.split.bias]))
        close(*results, 1e-4)
    gate(x).weights.square().sum().backward()
    fast.split.requires_grad_(False)
    fast(x).weights.square().sum().backward()
    assert fast.split.weight.grad is None
    torch.testing.assert_close(fast.leaf.weight.grad, gate.leaf.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("n_experts", [16, 40])
def test_nothing_waits_for_the_device(n_experts):
    """A CUDA graph can hold forward and backward."""
    from moe_lab.bench.device import captured

    gate, fast = gates(n_experts=n_experts, width=64)
    x = torch.randn(1000, 64, device=DEVICE, requires_grad=True)
    leaves = [x, *fast.parameters()]

    def step(each):
        routing = each(x)
        value = routing.weights.square().sum() + routing.losses["entropy"]
        return torch.autograd.grad(value, leaves if each is fast else [x, *each.parameters()])

    close(captured(lambda: step(fast))(), step(gate), 1e-3)


def test_automatic_stays_the_reference_and_fast_falls_back_where_triton_cannot_run(monkeypatch):
    gate, fast = gates()
    monkeypatch.setattr(CometGate, "_fast", lambda self, x: pytest.fail("the kernels were chosen"))
    gate.backend = "auto"
    x = torch.randn(4, 8, device=DEVICE)
    expected = gate(x).weights
    assert torch.equal(fast.double()(x.double()).weights.float().isfinite(), expected.isfinite())
    assert fast.float()(x[:0]).weights.shape == (0, 6)  # no tokens
    assert torch.equal(fast.cpu().half()(x.cpu().half()).active, gate.cpu().half()(x.cpu().half()).active)


def test_what_the_kernels_do_not_have_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'fsat'; did you mean 'fast'"):
        CometGate(4, 4, 2, backend="fsat")
    gate = CometGate(4, 4, 2)
    gate.backend = "fastest"
    with pytest.raises(ValueError, match="unknown backend"):
        gate(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no static gates"):
        CometGate(None, 4, 2, backend="fast")()
    with pytest.raises(ValueError, match="no split_balance and no more than 1024 experts"):
        CometGate(1, 1025, 1, split_balance=True, backend="fast")(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="gate input must have shape"):
        CometGate(4, 4, 2, backend="fast")(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="call it with x"):
        CometGate(4, 4, 2, backend="fast")()


def test_the_oracle_s_gradient_of_an_unreached_subtree_is_exactly_zero():
    logits = torch.randn(14 + 16, 6) * 0.2
    logits[:2] = 9.0
    logits.requires_grad_()
    weights, entropy, p, g = trees_oracle(logits, torch.zeros(30), 2, 1.0)
    assert torch.equal(g.sum(1), weights) and (p[4:] == 0).all()
    (grad,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum() + entropy, logits)
    assert (grad[14:].view(8, 2, 6)[4:] == 0).all()
    assert (grad[:14].view(7, 2, 6)[[0, 2, 5, 6]] == 0).all() and (grad[:14].view(7, 2, 6)[[1, 3, 4]] != 0).any()
