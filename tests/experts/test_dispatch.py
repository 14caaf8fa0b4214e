"""Dispatch: the fast path against the oracle that runs every expert on every token.

The bank in these tests tags rows: the first feature of token t is t, so the rows a bank sees say which pairs ran.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.experts import ConvExperts, MLPExperts, MoE, MultiGateMoE, combine_experts, run_everything
from moe_lab.gates import CometGate, DSelectKGate, HashGate, SoftmaxGate, TopKGate


def random_weights(tokens: int, n_experts: int, density: float, seed: int, dtype=torch.float64):
    """Non-negative (T, E) with about ``density`` non-zeros; rows may be empty."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, n_experts, generator=generator, dtype=torch.float64) + 0.1
    keep = torch.rand(tokens, n_experts, generator=generator) < density
    return (weights * keep).to(dtype)


def gradients(outputs, leaves, seed=0):
    """d (random projection of the outputs) / d leaves."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)


def pairs_that_ran(bank, call):
    """The (token, expert) pairs ``bank`` computed during ``call()``; x[:, 0] holds the token's number."""
    seen = []

    def note(module, args):
        x = args[0]
        tokens = x.flatten(1)[:, 0].round().int().tolist()
        counts = args[1] if len(args) > 1 and args[1] is not None else None
        if counts is None:
            seen.extend((t, e) for e in range(module.n_experts) for t in tokens)
            return
        experts = [e for e, n in enumerate(counts) for _ in range(n)]
        seen.extend(zip(tokens, experts, strict=True))

    handle = bank.register_forward_pre_hook(note)
    try:
        call()
    finally:
        handle.remove()
    return seen


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    n_experts=st.sampled_from([1, 2, 3, 5, 9, 16, 17]),
    n_tasks=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.1]),
    hidden=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_fast_path_equals_oracle_in_outputs_and_all_gradients(tokens, n_experts, n_tasks, density, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (4, 6, 3) if hidden else (4, 3)
    bank = MLPExperts(n_experts, sizes, activation="tanh", generator=generator).double()
    with torch.no_grad():
        for bias in bank.biases:
            bias.uniform_(-1, 1, generator=generator)
    x = torch.randn(tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = [random_weights(tokens, n_experts, density, seed + s).requires_grad_() for s in range(n_tasks)]
    leaves = [x, *bank.parameters(), *weights]

    fast, slow = combine_experts(bank, x, weights), run_everything(bank, x, weights)
    for a, b in zip(fast, slow, strict=True):
        assert a.shape == b.shape == (tokens, 3)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    got, expected = gradients(fast, leaves), gradients(slow, leaves)
    for a, b in zip(got[:-n_tasks], expected[:-n_tasks], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for w, a, b in zip(weights, got[-n_tasks:], expected[-n_tasks:], strict=True):
        torch.testing.assert_close(a, torch.where(w != 0, b, 0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("density", [0.5, 1.1], ids=["sparse", "dense"])
def test_gradcheck_in_float64(density):
    torch.manual_seed(0)
    bank = MLPExperts(3, (4, 5), activation="tanh").double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    pattern = random_weights(6, 3, density, 1) != 0
    weights = random_weights(6, 3, 1.1, 2)[pattern].requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in bank.parameters())

    def run(x, routed, weight, bias):
        from torch.func import functional_call

        full = torch.zeros(6, 3, dtype=torch.float64).index_put(pattern.nonzero(as_tuple=True), routed)
        parameters = {"weights.0": weight, "biases.0": bias}

        class Bound(torch.nn.Module):
            n_experts = 3

            def forward(self, *args):
                return functional_call(bank, parameters, args)

        return tuple(combine_experts(Bound(), x, [full, full * 2]))

    assert torch.autograd.gradcheck(run, (x, weights, weight, bias))


def _gates(n_experts, sparse):
    torch.manual_seed(3)
    gates = {
        "comet": lambda: CometGate(5, n_experts, 2),
        "dselect_k": lambda: DSelectKGate(5, n_experts, 2),
        "topk": lambda: TopKGate(5, n_experts, 2),
        "softmax": lambda: SoftmaxGate(5, n_experts),
    }
    for name, build in gates.items():
        pair = [build().double(), build().double()]
        if sparse and name in ("comet", "dselect_k"):
            with torch.no_grad():
                for gate in pair:  # some splits saturated, some soft
                    for parameter_name, parameter in gate.named_parameters():
                        if "leaf" not in parameter_name:
                            parameter.mul_(60)
        yield name, pair


@pytest.mark.parametrize("n_experts", [5, 8])
@pytest.mark.parametrize("sparse", [False, True])
def test_gate_parameters_receive_the_oracle_s_gradient(n_experts, sparse):
    """A weight that is exactly 0 has no path to the gate's parameters: skipping its expert loses nothing."""
    for name, gates in _gates(n_experts, sparse):
        model = MultiGateMoE(gates, MLPExperts(n_experts, (5, 4)).double())
        x = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
        fast, routings = model(x)
        slow = run_everything(model.experts, x, [r.weights for r in routings])
        if sparse and name != "softmax":
            assert not routings[0].active.all(), name
        leaves = [x, *model.parameters()]
        for a, b in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_runs_on_exactly_the_tokens_that_some_task_routes_to_it(training):
    torch.manual_seed(0)
    gates = [TopKGate(4, 9, 2), TopKGate(4, 9, 3)]
    model = MultiGateMoE(gates, MLPExperts(9, (4, 3), dropout=0.5)).train(training)
    x = torch.randn(21, 4)
    x[:, 0] = torch.arange(21)
    result = []
    ran = pairs_that_ran(model.experts, lambda: result.append(model(x, gate_inputs=torch.randn(21, 4))))
    ((_, routings),) = result
    needed = routings[0].active | routings[1].active
    assert len(ran) == len(set(ran)), "a pair needed by both tasks ran twice"
    assert set(ran) == {tuple(pair) for pair in needed.nonzero().tolist()}


def test_a_converged_comet_gate_runs_at_most_k_experts_per_token():
    torch.manual_seed(0)
    gate = CometGate(6, 11, 2)
    with torch.no_grad():
        gate.split.weight.mul_(1e7)
        gate.split.bias.mul_(1e7)
    model = MoE(gate, MLPExperts(11, (6, 3)))
    x = torch.randn(50, 6)
    x[:, 0] = torch.arange(50)
    ran = pairs_that_ran(model.experts, lambda: model(x))
    assert torch.bincount(torch.tensor([t for t, _ in ran])).max() <= 2
    assert len(ran) == int(gate(x).active.sum()) < 50 * 11


def test_without_zeros_every_expert_runs_on_all_tokens_without_copies():
    model = MoE(SoftmaxGate(4, 3), MLPExperts(3, (4, 2)))
    calls = []
    model.experts.register_forward_pre_hook(lambda m, args: calls.append([tuple(a.shape) for a in args]))
    model(torch.randn(10, 4))
    assert calls == [[(10, 4)]]


def test_one_expert_can_take_every_token_and_the_others_get_exactly_zero_gradient():
    torch.manual_seed(0)
    bank = MLPExperts(4, (3, 2), activation="tanh")
    weights = torch.zeros(8, 4)
    weights[:, 2] = 1
    x = torch.randn(8, 3)
    (y,) = combine_experts(bank, x, [weights])
    torch.testing.assert_close(y, bank.single(2, x))
    y.sum().backward()
    for p in bank.parameters():
        assert p.grad[2].abs().sum() > 0
        assert p.grad[[0, 1, 3]].abs().max() == 0


def test_an_expert_that_is_not_run_cannot_poison():
    torch.manual_seed(0)
    bank = MLPExperts(3, (3, 2))
    with torch.no_grad():
        bank.weights[0][1].fill_(torch.inf)
    x = torch.randn(5, 3)
    first, second = torch.zeros(5, 3), torch.zeros(5, 3)
    first[:, 0], second[:, 1] = 1, 1  # the second task does use the broken expert
    clean, broken = combine_experts(bank, x, [first, second])
    assert clean.isfinite().all()
    assert not broken.isfinite().all()
    clean.sum().backward()
    assert bank.weights[0].grad.isfinite().all()
    assert not run_everything(bank, x, [first])[0].isfinite().all()


def test_all_weights_zero_gives_zero():
    bank = MLPExperts(3, (3, 2))
    (y,) = combine_experts(bank, torch.randn(4, 3), [torch.zeros(4, 3)])
    assert torch.equal(y, torch.zeros(4, 2))


@pytest.mark.parametrize("density", [0.4, 1.1])
def test_bfloat16_and_autocast_agree_with_float32_to_their_precision(density):
    torch.manual_seed(0)
    bank, x = MLPExperts(5, (16, 8)), torch.randn(30, 16)
    weights = random_weights(30, 5, density, 0, torch.float32)
    (exact,) = combine_experts(bank, x, [weights])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (cast,) = combine_experts(bank, x, [weights])
    assert cast.dtype == torch.bfloat16
    cast.float().sum().backward()
    assert bank.weights[0].grad.dtype == torch.float32
    (half,) = combine_experts(bank.bfloat16(), x.bfloat16(), [weights])
    assert half.dtype == torch.bfloat16
    for y in (cast, half):
        torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.05)


def test_hash_gate_takes_keys_and_features_do_not_reach_it():
    model = MoE(HashGate(10, 4), MLPExperts(4, (3, 2)))
    x, keys = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 9, 9])
    y, _ = model(x, gate_input=keys)
    for row, key in enumerate(keys):
        expert = int(model.gate.table[key])
        torch.testing.assert_close(y[row : row + 1], model.experts.single(expert, x[row : row + 1]))
    with pytest.raises(ValueError, match="keys"):
        model(x)


@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_convolutional_experts_agree_with_the_oracle(tokens):
    torch.manual_seed(0)
    bank = ConvExperts(5, 2, 12, channels=(3, 4), kernel=3, dense=(6,)).double()
    x = torch.randn(tokens, 2, 12, 12, dtype=torch.float64, requires_grad=True)
    for density in (0.0, 0.4, 1.1):
        weights = [random_weights(tokens, 5, density, 1), random_weights(tokens, 5, density, 2)]
        fast, slow = combine_experts(bank, x, weights), run_everything(bank, x, weights)
        leaves = [x, *bank.parameters()]
        for a, b in zip([*fast, *gradients(fast, leaves)], [*slow, *gradients(slow, leaves)], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_weights_that_do_not_fit_are_refused():
    bank = MLPExperts(4, (3, 2))
    with pytest.raises(ValueError, match="tokens, n_experts"):
        combine_experts(bank, torch.randn(5, 3), [torch.ones(4, 4)])
    with pytest.raises(ValueError, match="bank has 4"):
        MoE(TopKGate(3, 5, 2), bank)
    with pytest.raises(ValueError, match="gate_inputs"):
        MultiGateMoE([TopKGate(3, 4, 2)] * 2, bank)(torch.randn(5, 3), [torch.randn(5, 3)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("density", [0.4, 1.1])
def test_cuda_agrees_with_cpu(density):
    torch.manual_seed(0)
    bank, x = MLPExperts(5, (16, 8)).double(), torch.randn(30, 16, dtype=torch.float64)
    weights = [random_weights(30, 5, density, s) for s in range(2)]
    expected = combine_experts(bank, x, weights)
    got = combine_experts(bank.cuda(), x.cuda(), [w.cuda() for w in weights])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
