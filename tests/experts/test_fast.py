"""The fast path against the oracle that runs every expert on every token: outputs, all gradients, what it allocates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lab.experts import ConvExperts, MLPExperts, MoE, MultiGateMoE, combine_experts, kernels, run_everything
from moe_lab.experts.dispatch import _takes_fast, run_experts, why_not_fast
from moe_lab.experts.fast import groupable, grouped_mlp
from moe_lab.gates import CometGate, TopKGate
from moe_lab.gates.losses import load_balancing_loss

D, H, F = 8, 16, 24  # rows that grouped_mm takes
EXACT = {torch.float64: 1e-10, torch.float32: 2e-4}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In Triton's interpreter, where time goes by the number of steps."""
    if kernels.INTERPRETED:
        monkeypatch.setattr(kernels.tuning, "TILE", 16)
        for name in kernels.BLOCKS:
            monkeypatch.setitem(kernels.BLOCKS, name, kernels.Blocks(16, 32, 1))
        for name in kernels.PRODUCTS:
            monkeypatch.setitem(kernels.PRODUCTS, name, kernels.Product(16, 16, 1, depth=8, stages=1))


def make_bank(n_experts, sizes=(D, H, F), activation="gelu", dtype=torch.float64):
    bank = MLPExperts(n_experts, sizes, activation, activate_last=False).to(dtype)
    with torch.no_grad():
        for bias in bank.biases:
            bias.uniform_(-1, 1)
    return bank


def layer(bank):
    return bank.weights[0], bank.biases[0], bank.weights[1], bank.biases[1], bank.activation


def fixed(tokens, n_experts, k, dtype=torch.float64):
    """Distinct experts (T, K) and values that may be 0; the same as a function of values -> (T, E)."""
    experts = torch.rand(tokens, n_experts).topk(k, dim=1).indices
    values = torch.rand(tokens, k, dtype=dtype) * (torch.rand(tokens, k) < 0.8)
    return (
        experts,
        values.requires_grad_(),
        lambda v: torch.zeros(tokens, n_experts, dtype=dtype).scatter(1, experts, v),
    )


def unequal(tokens, n_experts, dtype=torch.float64):
    """(T, E) weights: from no expert to all; the second token has one."""
    keep = torch.rand(tokens, n_experts) < torch.linspace(0, 1, tokens)[:, None]
    if tokens > 1:
        keep[1] = torch.arange(n_experts) == n_experts - 1
    return ((torch.rand(tokens, n_experts, dtype=dtype) + 0.1) * keep).requires_grad_()


def gradients(y, leaves):
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.autograd.grad(y, leaves, grad.to(y.dtype), retain_graph=True, materialize_grads=True)


def same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=8 if kernels.INTERPRETED else 60)
@given(
    tokens=st.sampled_from([1, 2, 7, 33]),
    n_experts=st.sampled_from([1, 2, 3, 5, 9, 17]),
    k=st.integers(1, 17),
    activation=st.sampled_from(kernels.ACTIVATIONS),
    dtype=st.sampled_from(list(EXACT)),
    sizes=st.sampled_from([(D, H, F), (3, 5, 7)]),
    recompute=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_a_fixed_number_of_experts_equals_the_oracle_in_outputs_and_all_gradients(
    tokens, n_experts, k, activation, dtype, sizes, recompute, seed
):
    torch.manual_seed(seed)
    bank = make_bank(n_experts, sizes, activation, dtype)
    experts, values, spread = fixed(tokens, n_experts, min(k, n_experts), dtype)
    x = torch.randn(tokens, sizes[0], dtype=dtype, requires_grad=True)
    (expected,) = run_everything(bank, x, [spread(values)])
    y = grouped_mlp(x, (experts, values), *layer(bank), recompute=recompute)
    leaves = [x, values, *bank.parameters()]
    same([y, *gradients(y, leaves)], [expected, *gradients(expected, leaves)], EXACT[dtype])


@settings(deadline=None, max_examples=8 if kernels.INTERPRETED else 40)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    n_experts=st.sampled_from([1, 2, 3, 5, 9, 17]),
    activation=st.sampled_from(kernels.ACTIVATIONS),
    dtype=st.sampled_from(list(EXACT)),
    recompute=st.booleans(),
    bounded=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_any_pattern_of_weights_equals_the_oracle_and_a_zero_has_no_gradient(
    tokens, n_experts, activation, dtype, recompute, bounded, seed
):
    torch.manual_seed(seed)
    bank, weights = make_bank(n_experts, (D, H, F), activation, dtype), unequal(tokens, n_experts, dtype)
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    (expected,) = run_everything(bank, x, [weights])
    y = grouped_mlp(x, weights, *layer(bank), most=n_experts if bounded else None, recompute=recompute)
    leaves = [x, *bank.parameters()]
    same([y, *gradients(y, leaves)], [expected, *gradients(expected, leaves)], EXACT[dtype])
    (grad,), (reference,) = gradients(y, [weights]), gradients(combine_experts(bank, x, [weights])[0], [weights])
    same([grad], [reference], EXACT[dtype])
    assert (grad[weights == 0] == 0).all()


def test_all_six_products_are_our_own_where_they_can_run(monkeypatch):
    """Imitated by loops: which operands, whose transpose, in the forward and the backward."""
    asked = []

    def ranges(ends):
        return zip([0, *ends.tolist()], ends.tolist(), strict=False)

    def product(rows, weight, ends, transposed):
        asked.append((tuple(rows.shape), tuple(weight.shape), transposed))
        matrices = weight.mT if transposed else weight
        return torch.cat([rows[begin:end] @ w for (begin, end), w in zip(ranges(ends), matrices, strict=True)])

    def outer(left, right, ends):
        asked.append((tuple(left.shape), tuple(right.shape)))
        return torch.stack([left[begin:end].T @ right[begin:end] for begin, end in ranges(ends)])

    monkeypatch.setattr("moe_lab.experts.fast.product", product)
    monkeypatch.setattr("moe_lab.experts.fast.outer", outer)
    monkeypatch.setattr("moe_lab.experts.fast.product_runs", lambda rows, weight, transposed: True)
    monkeypatch.setattr("moe_lab.experts.fast.outer_runs", lambda left, right: True)
    bank, (experts, values, _) = make_bank(5), fixed(21, 5, 2)
    x = torch.randn(21, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, values, *bank.parameters()]
    expected = grouped_mlp(x, (experts, values), *layer(bank), own=False)
    expected = [expected, *gradients(expected, leaves)]
    assert not asked
    y = grouped_mlp(x, (experts, values), *layer(bank))
    same([y, *gradients(y, leaves)], expected, 1e-10)
    w1, w2 = (5, D, H), (5, H, F)
    assert asked[:3] == [((42, D), w1, False), ((42, H), w2, False), ((42, F), w2, True)]
    assert asked[3:] == [((42, H), (42, F)), ((42, H), w1, True), ((42, D), (42, H))]


@pytest.mark.parametrize("recompute", [False, True])
def test_products_of_our_own_give_the_same_layer_and_where_they_cannot_run_the_same_bits(recompute):
    bank, (experts, values, spread) = make_bank(5, dtype=torch.float16), fixed(21, 5, 2, torch.float32)
    x = torch.randn(21, D).half().requires_grad_()
    if kernels.usable(x):
        assert kernels.product_runs(x.detach(), bank.weights[0].detach(), transposed=False)
        assert kernels.outer_runs(x.detach(), x.detach())
    for routing in ((experts, values), spread(values.detach())):
        leaves = [x, *([values] if isinstance(routing, tuple) else []), *bank.parameters()]
        expected = grouped_mlp(x, routing, *layer(bank), recompute=recompute, own=False)
        y = grouped_mlp(x, routing, *layer(bank), recompute=recompute)
        for a, b in zip([y, *gradients(y, leaves)], [expected, *gradients(expected, leaves)], strict=True):
            assert torch.equal(a, b) or (kernels.usable(x) and (a - b).norm() < 5e-3 * b.norm())


def test_gradcheck_in_float64():
    bank = make_bank(3, (2, 3, 2), "tanh")
    experts, values, _ = fixed(5, 3, 2)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in layer(bank)[:4]]
    assert torch.autograd.gradcheck(lambda x, v, *p: grouped_mlp(x, (experts, v), *p, "tanh"), (x, values, *parameters))


def test_without_biases_only_the_products_remain():
    bank = MLPExperts(4, (D, H, F), "relu", activate_last=False)  # its biases are 0
    experts, values, spread = fixed(9, 4, 2, torch.float32)
    x = torch.randn(9, D)
    y = grouped_mlp(x, (experts, values), bank.weights[0], None, bank.weights[1], None, "relu")
    torch.testing.assert_close(y, run_everything(bank, x, [spread(values)])[0], rtol=1e-4, atol=1e-5)


def test_one_expert_can_take_every_token_and_the_others_get_exactly_zero_gradient():
    bank = make_bank(4, dtype=torch.float32)
    experts, values = torch.full((9, 1), 2), torch.rand(9, 1)
    y = grouped_mlp(torch.randn(9, D), (experts, values), *layer(bank))
    y.sum().backward()
    for parameter in bank.parameters():
        assert parameter.grad[2].abs().sum() > 0
        assert parameter.grad[[0, 1, 3]].abs().max() == 0


def test_bfloat16_is_within_one_percent_of_float64():
    """||a - b|| / ||b|| under 1e-2: operands are rounded to 8 bits (2^-9 = 2e-3), three times in a row."""
    bank, (experts, values, spread) = make_bank(5, dtype=torch.bfloat16), fixed(64, 5, 2, torch.float32)
    x = torch.randn(64, D).bfloat16().requires_grad_()
    leaves = [x, values, *bank.parameters()]
    y = grouped_mlp(x, (experts, values), *layer(bank))
    assert y.dtype == torch.bfloat16
    exact_bank = make_bank(5)
    exact_bank.load_state_dict(bank.state_dict())
    exact_x, exact_values = x.detach().double().requires_grad_(), values.detach().double().requires_grad_()
    (exact,) = run_everything(exact_bank, exact_x, [spread(exact_values.float()).double()])
    expected = [exact, *gradients(exact, [exact_x, exact_values, *exact_bank.parameters()])]
    for a, b in zip([y, *gradients(y, leaves)], expected, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_autocast_computes_in_its_dtype_and_parameters_keep_theirs():
    bank, (experts, values, _) = make_bank(5, dtype=torch.float32), fixed(30, 5, 2, torch.float32)
    x = torch.randn(30, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mlp(x, (experts, values), *layer(bank))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in bank.parameters())
    torch.testing.assert_close(y.float(), grouped_mlp(x, (experts, values), *layer(bank)), rtol=0.03, atol=0.03)


def test_a_second_backward_finds_everything_as_it_was():
    """The backward writes over its own buffers only."""
    bank, (experts, values, _) = make_bank(5), fixed(30, 5, 2)
    x = torch.randn(30, D, dtype=torch.float64, requires_grad=True)
    for recompute in (False, True):
        y = grouped_mlp(x, (experts, values), *layer(bank), recompute=recompute)
        leaves = [x, values, *bank.parameters()]
        same(gradients(y, leaves), gradients(y, leaves), 0)


class Watched(TorchDispatchMode):
    """The names of all operations, and the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


WAITING = {"nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "bincount", "unique_dim", "masked_select"}


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter copies every tensor")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_fixed_number_of_experts_never_waits_for_the_device_and_makes_nothing_of_all_experts(recompute):
    """Largest allowed: N hidden rows, or a parameter. T x E x H would be four times that."""
    bank, (experts, values, spread) = make_bank(16, dtype=torch.bfloat16), fixed(100, 16, 4, torch.float32)
    weights, x = spread(values.detach() + 0.1), torch.randn(100, D).bfloat16().requires_grad_()
    with Watched() as seen:
        y = grouped_mlp(x, (experts, values), *layer(bank), recompute=recompute)
        y.backward(torch.ones_like(y))
    assert not WAITING & set(seen.names)
    assert seen.names.count("_grouped_mm") == 6
    assert seen.largest == max(100 * 4 * H, 100 * 4 * F, 16 * H * F) < 100 * 16 * H
    with Watched() as seen:
        grouped_mlp(x, weights, *layer(bank), recompute=recompute).sum().backward()
    assert [name for name in seen.names if name in WAITING] == ["nonzero"]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_the_backward_is_what_the_docstring_says(recompute):
    bank, (experts, values, _) = make_bank(4), fixed(50, 4, 2)
    x, kept = torch.randn(50, D, dtype=torch.float64, requires_grad=True), {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[0] == 100:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_mlp(x, (experts, values), *layer(bank), recompute=recompute)
    assert sum(kept.values()) == (100 * H if recompute else 100 * (D + 2 * H))


def test_a_token_with_more_experts_than_promised_becomes_nan_and_no_other():
    weights = torch.tensor([[0.0, 0.7, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0]])
    bank, x = make_bank(4, dtype=torch.float32), torch.randn(4, D)
    y, all_of_it = (grouped_mlp(x, weights, *layer(bank), most=most) for most in (2, None))
    assert y[3].isnan().all() and all_of_it.isfinite().all()
    same([y[:3]], [all_of_it[:3]], 1e-6)
    same([grouped_mlp(x, weights, *layer(bank), most=9)], [all_of_it], 1e-6)


@pytest.mark.parametrize("most_per_token", [None, 2])
def test_a_mixture_on_the_fast_path_trains_gate_and_experts_like_the_reference(most_per_token):
    moe = MoE(TopKGate(D, 6, 2), make_bank(6), "fast", most_per_token).double()
    x, results = torch.randn(40, D, dtype=torch.float64, requires_grad=True), {}
    for moe.mixture.backend in ("fast", "reference"):
        y, routing = moe(x)
        results[moe.mixture.backend] = [y, *gradients(y, [x, *moe.parameters()])]
    same(results["fast"], results["reference"], 1e-10)
    assert torch.isfinite(load_balancing_loss(routing.weights, routing.active))


def test_a_mixture_tells_the_experts_how_many_of_them_the_gate_takes(monkeypatch):
    told = []
    monkeypatch.setattr("moe_lab.experts.moe.run_experts", lambda *a: told.append(a[-1]) or [a[1]] * len(a[2]))
    bank, x = make_bank(4, dtype=torch.float32), torch.randn(3, D)
    MoE(TopKGate(D, 4, 3), bank)(x)
    MoE(TopKGate(D, 4, 3), bank, most_per_token=4)(x)
    MoE(CometGate(D, 4, 2), bank)(x)
    MultiGateMoE([TopKGate(D, 4, 3)] * 2, bank)(x)
    assert told == [3, 4, None, None]


def test_auto_takes_the_fast_path_on_a_gpu_where_it_can_run(monkeypatch):
    card = [9]
    monkeypatch.setattr("moe_lab.triton_support.usable", lambda x: x.is_cuda)
    monkeypatch.setattr("moe_lab.triton_support.capability", lambda device: (card[0], 0))

    def takes_it(bank=None, n_tasks=1, dims=2, dtype=torch.bfloat16, is_cuda=True, most=None):
        x = SimpleNamespace(is_cuda=is_cuda, dim=lambda: dims, dtype=dtype, device=torch.device("cpu"))
        return _takes_fast(make_bank(4) if bank is None else bank, x, n_tasks, most)

    dropping = MLPExperts(4, (D, H, F), activate_last=False, dropout=0.5)
    assert takes_it() and takes_it(dtype=torch.float16) and takes_it(dtype=torch.float32, most=2)
    assert not takes_it(dtype=torch.float32) and not takes_it(dtype=torch.float32, most=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert takes_it(dtype=torch.float32)
    assert not takes_it(is_cuda=False) and not takes_it(dims=4) and not takes_it(dtype=torch.float64)
    assert not takes_it(n_tasks=2) and not takes_it(MLPExperts(4, (D, H, F)))
    assert not takes_it(dropping) and takes_it(dropping.eval())
    card[0] = 8
    assert not takes_it()


def test_on_a_cpu_auto_is_the_reference_and_choices_are_checked(monkeypatch):
    bank, gate = make_bank(4, dtype=torch.float32), TopKGate(D, 4, 2)
    monkeypatch.setattr("moe_lab.experts.fast.grouped_mlp", None)  # would raise if it were called
    MoE(gate, bank)(torch.randn(3, D))
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        MoE(gate, bank, "fsat")
    x, weights = torch.randn(3, D), torch.ones(3, 4)
    with pytest.raises(ValueError, match="at least 1"):
        run_experts(bank, x, [weights], "fast", 0)
    with pytest.raises(ValueError, match="must have shape"):
        run_experts(bank, x, [weights[:2]], "fast")


def test_the_fast_path_says_what_it_cannot_run():
    def bank(*args, **options):
        return MLPExperts(3, *args, **{"activate_last": False} | options)

    refused = {
        "dropout": bank((D, H, F), dropout=0.5),
        "two layers": bank((D, F)),
        "activate_last": bank((D, H, F), activate_last=True),
        "ConvExperts": ConvExperts(3, 1, 12, channels=(2, 2), kernel=3, dense=(4,)),
    }
    for reason, one in refused.items():
        assert reason in why_not_fast(one, 1)
        with pytest.raises(ValueError, match=f"{reason}.*'reference'"):
            run_experts(one, torch.randn(2, D), [torch.ones(2, 3)], "fast")
    assert why_not_fast(refused["dropout"].eval(), 1) is None
    assert "one task" in why_not_fast(bank((D, H, F)), 2)
    with pytest.raises(ValueError, match="one task"):
        MultiGateMoE([CometGate(D, 3, 2)] * 2, bank((D, H, F)), "fast")(torch.randn(2, D))


def test_arguments_that_do_not_fit_are_refused():
    bank, x = make_bank(4, dtype=torch.float32), torch.randn(5, D)
    pairs = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        grouped_mlp(x, pairs, *layer(bank)[:4], "gleu")
    with pytest.raises(ValueError, match=r"x \(T, D\)"):
        grouped_mlp(x[:, 1:], pairs, *layer(bank))
    with pytest.raises(ValueError, match="weights must have shape"):
        grouped_mlp(x, torch.ones(5, 3), *layer(bank))
    with pytest.raises(ValueError, match="experts and values"):
        grouped_mlp(x, (pairs[0], torch.ones(5, 1)), *layer(bank))


def test_grouped_products_are_asked_only_for_what_they_take():
    assert groupable(torch.bfloat16, 4, 8, 16) and groupable(torch.float32, 4, 4)
    assert not groupable(torch.bfloat16, 4, 8, 12)  # 24 bytes
    assert not groupable(torch.float64, 4, 8) and not groupable(torch.bfloat16, 1024, 8)


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter cannot be traced")
def test_it_compiles_without_graph_breaks():
    bank, (experts, values, _) = make_bank(4, dtype=torch.bfloat16), fixed(12, 4, 2, torch.float32)
    x = torch.randn(12, D).bfloat16().requires_grad_()
    compiled = torch.compile(grouped_mlp, backend="aot_eager", fullgraph=True, dynamic=False)
    leaves = [x, values, *bank.parameters()]
    y, expected = (f(x, (experts, values), *layer(bank)) for f in (compiled, grouped_mlp))
    same([y, *gradients(y, leaves)], [expected, *gradients(expected, leaves)], 1e-2)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(n_experts=16, k=2, tokens=333, sizes=(128, 256, 128)):
    bank = make_bank(n_experts, sizes, dtype=torch.bfloat16).cuda()
    experts, values, spread = fixed(tokens, n_experts, k, torch.float32)
    x = torch.randn(tokens, sizes[0]).bfloat16().cuda().requires_grad_()
    return bank, x, experts.cuda(), values.detach().cuda().requires_grad_(), spread(values.detach()).cuda()


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"own": False}], ids=str)
def test_cuda_in_bfloat16_agrees_with_float64_on_the_cpu_and_repeats_its_bits(options):
    bank, x, experts, values, _ = on_cuda()
    leaves = [x, values, *bank.parameters()]
    grad = torch.randn(333, 128, dtype=torch.float64)

    def run(x, experts, values, bank):
        y = grouped_mlp(x, (experts, values), *layer(bank), **options)
        return [y, *torch.autograd.grad(y, [x, values, *bank.parameters()], grad.to(y))]

    found, again = run(x, experts, values, bank), run(x, experts, values, bank)
    exact = make_bank(16, (128, 256, 128))
    exact.load_state_dict(bank.state_dict())
    cpu = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves[:2]]
    for a, b, c in zip(found, again, run(cpu[0], experts.cpu(), cpu[1], exact), strict=True):
        assert torch.equal(a, b)
        assert (a.cpu().double() - c).norm() < 1e-2 * c.norm()


@needs_cuda
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_auto_on_cuda_is_the_fast_path_and_agrees_with_the_reference(density):
    moe = MoE(TopKGate(128, 16, 2 if density < 1 else 16), make_bank(16, (128, 256, 128), dtype=torch.float32)).cuda()
    x, found = torch.randn(333, 128, device="cuda", requires_grad=True), {}
    for moe.mixture.backend in ("auto", "fast", "reference"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, _ = moe(x)
        leaves = [x, *moe.parameters()]
        grads = torch.autograd.grad(y.float().square().sum(), leaves, materialize_grads=True)
        found[moe.mixture.backend] = [y, *grads]
    for auto, fast, reference in zip(*found.values(), strict=True):
        assert torch.equal(auto, fast) and auto.dtype == reference.dtype
        assert (auto - reference).float().norm() <= 2e-2 * reference.float().norm() + 1e-6


@needs_cuda
def test_auto_does_not_wait_for_the_device_where_the_gate_says_how_many():
    moe = MoE(TopKGate(128, 16, 2), make_bank(16, (128, 256, 128), dtype=torch.bfloat16)).cuda()
    x = torch.randn(333, 128, device="cuda", dtype=torch.bfloat16)
    moe(x)[0].sum().backward()  # what is made on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_auto_can_be_compiled():
    moe = MoE(TopKGate(128, 16, 2), make_bank(16, (128, 256, 128), dtype=torch.bfloat16)).cuda()
    x = torch.randn(333, 128, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    leaves = [x, *moe.parameters()]

    def both(function):
        y = function(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    for found, expected in zip(both(torch.compile(lambda x: moe(x)[0])), both(lambda x: moe(x)[0]), strict=True):
        assert (found - expected).float().norm() <= 2e-2 * expected.float().norm()


@needs_cuda
def test_a_fixed_number_of_experts_can_be_captured_in_a_cuda_graph():
    bank, x, experts, values, weights = on_cuda()
    leaves = [x, *bank.parameters()]

    def step():
        one = grouped_mlp(x, (experts, values), *layer(bank))
        two = grouped_mlp(x, weights, *layer(bank), most=3)
        return [one, two, *torch.autograd.grad(one.sum() + 2 * two.sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        experts.copy_(torch.rand(333, 16).topk(2, dim=1).indices)  # other loads, same shapes
    graph.replay()
    same(captured, step(), 1e-2)
