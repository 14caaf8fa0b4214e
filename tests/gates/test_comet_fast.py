"""COMET's gate on its kernels against the gate level by level, and when it takes them.

The Triton half runs on CUDA, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/gates/test_comet_fast.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap

from moe_lab import triton_support
from moe_lab.gates import CometGate, PermutationSearch, comet_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not triton_support.usable(torch.empty(1, device=DEVICE)),
    reason="needs Triton and CUDA, or Triton and TRITON_INTERPRET=1",
)
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
# The interpreter computes what will be masked away, too: 0 / 0 behind the last token.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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
def test_one_expert_runs_fast_too():
    gate, fast = gates(n_experts=1)
    for each in (gate, fast):
        each.split.requires_grad_(False)  # it has no numbers: their gradient may be none or nothing
    x = torch.randn(5, 8, device=DEVICE)
    assert fast._runs_fast(x)
    close(everything(fast, x), everything(gate, x))


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
def test_x_may_lie_in_memory_as_it_likes():
    gate, fast = gates()
    strided = torch.randn(35, 16, device=DEVICE)[:, ::2]
    for x in (strided, torch.randn(8, 35, device=DEVICE).T, strided[:1].expand(35, 8)):
        assert not x.is_contiguous()
        leaf = x.requires_grad_()  # itself, where `everything` would clone it
        results = []
        for each in (fast, gate):
            routing = each(leaf)
            value = routing.weights.square().sum() + routing.losses["entropy"]
            results.append(torch.autograd.grad(value, [leaf, *each.parameters()]))
        close(*results, 1e-4)


@needs_triton
def test_weights_may_be_computed_from_other_parameters():
    gate, fast = gates()
    for each in (gate, fast):
        torch.nn.utils.parametrizations.weight_norm(each.leaf, "weight")
    x = torch.randn(9, 8, device=DEVICE)
    close(everything(fast, x), everything(gate, x), 1e-4)


@needs_triton
def test_gradients_may_be_differentiated_again():
    """A penalty on gradients, where x and a parameter of the gate come from the same number."""
    results = []
    gate, fast = gates()
    x = torch.randn(11, 8, device=DEVICE)
    for each in (fast, gate):
        scale = torch.ones((), device=DEVICE, requires_grad=True)
        parameters = {name: p * scale for name, p in each.named_parameters()}
        given = x * scale
        routing = functional_call(each, parameters, (given,))
        value = routing.weights[:, 0].square().sum() + routing.losses["entropy"]
        first = torch.autograd.grad(value, [given, *parameters.values()], create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        results.append([value, penalty, *torch.autograd.grad(penalty, [scale, *each.parameters()])])
    close(*results, 1e-3)


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


@needs_cuda
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


def test_fast_falls_back_where_triton_cannot_run(monkeypatch):
    gate, fast = gates()
    monkeypatch.setattr(CometGate, "_fast", lambda self, x: pytest.fail("the kernels were chosen"))
    x = torch.randn(4, 8, device=DEVICE)
    for dtype, device in ((torch.float64, DEVICE), (torch.float16, "cpu")):
        given = x.to(device, dtype)
        assert torch.equal(fast.to(given)(given).weights, gate.to(given)(given).weights)
    fast = fast.to(x)
    assert fast(x[:0]).weights.shape == (0, 6)  # no tokens


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


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels that could run everywhere, but must not be started."""
    monkeypatch.setattr(comet_kernels, "usable", lambda x, n_experts, k, *parameters: True)
    monkeypatch.setattr(CometGate, "_fast", lambda self, x: pytest.fail("the kernels were chosen"))


def test_automatic_takes_the_kernels_on_cuda_for_what_they_have(anywhere):
    gate = CometGate(8, 6, 2)
    assert gate.backend == "auto"
    with FakeTensorMode():
        x = torch.empty(5, 8, device="cuda")  # says so; nothing is computed
    assert gate._runs_fast(x) and gate.eval()._runs_fast(x) and copy.deepcopy(gate)._runs_fast(x)
    gate.backend = "reference"
    assert not gate._runs_fast(x)
    balanced = CometGate(8, 6, 2, split_balance=True)
    assert not balanced._runs_fast(x) and balanced.eval()._runs_fast(x)
    assert CometGate(8, 1024, 2)._runs_fast(x) and not CometGate(8, 1025, 2)._runs_fast(x)
    assert not CometGate(None, 6, 2)._runs_fast(x) and not CometGate(None, 6, 2)._runs_fast(None)
    assert not CometGate(9, 6, 2)._runs_fast(x)
    assert not PermutationSearch(CometGate(8, 6, 2), 3).gate._runs_fast(x)  # it reads the weights of each tree
    CometGate(8, 6, 2)(torch.zeros(5, 8))  # on a CPU: never


def test_tensors_without_memory_or_of_a_dtype_that_does_not_fit_are_not_given_to_triton(monkeypatch):
    monkeypatch.setattr(comet_kernels, "triton_runs", lambda x: True)
    monkeypatch.setattr(comet_kernels, "_new_enough", lambda device: True)
    with FakeTensorMode():
        assert not comet_kernels.usable(torch.empty(5, 8), 6, 2)
    assert comet_kernels.usable(torch.empty(5, 8), 6, 2, torch.empty(3, 8, dtype=torch.bfloat16))
    half, none = torch.empty(5, 8, dtype=torch.float16), torch.empty(0, 8)
    assert comet_kernels.usable(torch.nn.Parameter(torch.empty(5, 8)), 1, 2, none)  # one expert has no splits
    for given in ((half, 6, 2), (none, 6, 2), (torch.empty(5, 8), 6, 2, half), (torch.empty(5, 8), 1025, 2)):
        assert not comet_kernels.usable(*given)


@pytest.mark.parametrize("backend", ["auto", "fast"])
def test_stacked_and_compiled_gates_are_the_reference(backend, anywhere):
    gate = CometGate(8, 6, 2, backend="reference")
    other = copy.deepcopy(gate)
    other.backend = backend
    x = torch.randn(3, 5, 8)
    values = {name: torch.stack([p, 2 * p, 3 * p]).detach() for name, p in gate.named_parameters()}
    found = vmap(lambda values, x: functional_call(other, values, (x,)).weights)(values, x)
    for i, weights in enumerate(found):
        alone = functional_call(gate, {name: value[i] for name, value in values.items()}, (x[i],)).weights
        torch.testing.assert_close(weights, alone)
    grads = torch.func.grad(lambda x: other(x).weights[:, 0].sum())(x[0])
    assert grads.any()
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x[0]).weights, gate(x[0]).weights)


@needs_cuda
def test_automatic_on_a_gpu_is_fast_and_elsewhere_the_reference(monkeypatch):
    gate, automatic = gates(n_experts=40, k=3)
    automatic.backend = "auto"
    calls = []
    run = CometGate._fast
    monkeypatch.setattr(CometGate, "_fast", lambda self, x: calls.append(len(x)) or run(self, x))
    x = torch.randn(70, 8, device=DEVICE)
    close(everything(automatic, x), everything(gate, x), 1e-3)
    close(everything(automatic.eval(), x), everything(gate.eval(), x), 1e-3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert automatic(x).weights.dtype == torch.float32
    assert calls == [70] * 3
    values = {name: torch.stack([p, p]) for name, p in automatic.named_parameters()}
    stacked = vmap(lambda values: functional_call(automatic, values, (x,)).weights)(values)
    close([stacked[1]], [gate(x).weights])
    close([torch.compile(automatic, fullgraph=True)(x).weights], [gate(x).weights])
    assert automatic.half()(x.half()).weights.isfinite().all()
    PermutationSearch(automatic.float(), 3).to(DEVICE)(x)
    assert calls == [70] * 3
