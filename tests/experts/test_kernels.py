"""Kernels against their oracles, and the oracles against loops.

The Triton half runs on CUDA, or in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/experts/test_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.experts import kernels
from moe_lab.experts.kernels import Blocks, Product, products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not kernels.usable(torch.empty(1, device=DEVICE)), reason="needs Triton and CUDA, or Triton and TRITON_INTERPRET=1"
)
DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 2e-2)}  # bfloat16: two roundings of 2^-8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small inputs need several blocks, with odd rests, and the interpreter few steps."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels.tuning, "TILE", 4)
        for name in kernels.BLOCKS:
            monkeypatch.setitem(kernels.BLOCKS, name, Blocks(2, 16, 1))
        for name in kernels.PRODUCTS:
            monkeypatch.setitem(kernels.PRODUCTS, name, Product(8, 16, 1, depth=16, stages=1))


def routed(tokens, n_experts, k, seed=0):
    """Experts (N,) of distinct choices per token, and weights (N,)."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, n_experts, generator=generator).topk(k, dim=1).indices
    return experts.flatten().to(DEVICE), torch.rand(tokens * k, generator=generator).to(DEVICE)


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(experts=st.lists(st.integers(0, 6), max_size=40))
def test_the_order_is_that_of_a_stable_sort_and_ends_count_the_experts(experts):
    value = torch.arange(len(experts), dtype=torch.float32)
    place, ends, by_expert, *_ = kernels.expert_order_oracle(torch.tensor(experts, dtype=torch.int64), value, 7)
    expected = sorted(range(len(experts)), key=experts.__getitem__)
    assert by_expert.int().tolist() == expected
    assert place.tolist() == [expected.index(pair) for pair in range(len(experts))]
    assert ends.tolist() == [sum(e <= expert for e in experts) for expert in range(7)]
    assert place.dtype == ends.dtype == torch.int32


@pytest.mark.parametrize("k", [1, 3])
def test_adding_rows_up_is_the_transpose_of_copying_them(k):
    """<scatter(x), r> = <x, sum(r)>: each is the other's backward."""
    place = torch.randperm(5 * k).int()
    x, r = torch.randn(5, 4, dtype=torch.float64), torch.randn(5 * k, 4, dtype=torch.float64)
    scattered = kernels.scatter_rows(x, place, k)
    for pair, row in enumerate(place.tolist()):
        assert torch.equal(scattered[row], x[pair // k])
    torch.testing.assert_close((scattered * r).sum(), (x * kernels.sum_rows(r, place, k, 5)).sum())


def test_a_token_without_pairs_sums_to_zero_and_lists_of_unequal_length_are_followed():
    starts, place = torch.tensor([0, 2, 2, 3], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    rows = torch.tensor([[1.0], [10.0], [100.0]])
    assert kernels.sum_rows_oracle(rows, place, starts, 3).flatten().tolist() == [101, 0, 10]
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert kernels.scatter_rows_oracle(x, place, starts).flatten().tolist() == [1, 3, 1]


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gradients_of_the_activation_are_autograd_s(activation, has_bias):
    experts, value = routed(6, 4, 2)
    _, ends, g, *_ = kernels.expert_order(experts.cpu(), value.cpu().double(), 4)
    h, bias = torch.randn(12, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64) if has_bias else None
    leaves = [t.requires_grad_() for t in (h, g, bias) if t is not None]
    out = kernels.activate_oracle(h, bias, g, ends, activation)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    h, g, bias = (None if t is None else t.detach() for t in (h, g, bias))
    *found, again = kernels.activate_backward_oracle(h, bias, g, ends, activation, grad, True)
    for a, b in zip([f for f in found if f is not None], expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(again, out.detach())


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_the_activation_by_hand(activation):
    """Two experts, one row each: g act(h + b) with h + b = 0.5 and -1."""
    h, bias = torch.tensor([[0.25], [-0.5]]), torch.tensor([[0.25], [-0.5]])
    value, ends = torch.tensor([2.0, 10.0]), torch.tensor([1, 2], dtype=torch.int32)
    a, b = {"relu": (0.5, 0.0), "gelu": (0.345731, -0.158655), "tanh": (0.462117, -0.761594)}[activation]
    out = kernels.activate_oracle(h, bias, value, ends, activation)
    torch.testing.assert_close(out, torch.tensor([[2 * a], [10 * b]]), rtol=1e-5, atol=1e-5)


def pattern(tokens, n_experts, seed=0):
    """(T, E) weights with tokens of 0 to E experts, a NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, n_experts, generator=generator)
    keep = torch.rand(tokens, n_experts, generator=generator) < torch.rand(tokens, 1, generator=generator)
    weights[0, 0], keep[0, 0] = torch.nan, True
    return weights.where(keep, 0.0).to(DEVICE)


@pytest.mark.parametrize("most", [None, 2])
def test_a_pattern_is_the_list_of_its_non_zeros_token_by_token(most):
    weights = pattern(9, 5).cpu()
    place, ends, value, starts, row = kernels.pattern_order_oracle(weights, most)
    pairs = [[e for e in range(5) if w[e] != 0][:most] for w in weights]
    assert starts.tolist() == [sum(map(len, pairs[:t])) for t in range(10)]
    in_order = sorted((e, t) for t, experts in enumerate(pairs) for e in experts)
    assert ends.tolist() == [sum(e <= expert for e, _ in in_order) for expert in range(5)]
    for r, (e, t) in enumerate(in_order):
        assert row[t, e] == r == place[starts[t] + pairs[t].index(e)]
        crowded = most is not None and int((weights[t] != 0).sum()) > most
        torch.testing.assert_close(value[r], torch.tensor(torch.nan) if crowded else weights[t, e], equal_nan=True)
    assert int((row >= 0).sum()) == len(in_order) and row.min() >= -1


def test_triton_is_not_asked_for_what_it_cannot_do():
    assert not kernels.usable(torch.empty(1, device=DEVICE, dtype=torch.float64))
    if not kernels.INTERPRETED:
        assert not kernels.usable(torch.empty(1))


@needs_triton
@pytest.mark.parametrize(("tokens", "n_experts", "k"), [(1, 1, 1), (7, 3, 2), (130, 5, 5), (301, 17, 1)])
def test_triton_sorts_like_torch(tokens, n_experts, k):
    experts, value = routed(tokens, n_experts, k)
    close(kernels.expert_order(experts, value, n_experts), kernels.expert_order_oracle(experts, value, n_experts), 0)


@needs_triton
@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize(("tokens", "n_experts"), [(1, 1), (7, 3), (301, 16), (130, 65)])
def test_triton_sorts_a_pattern_like_torch(tokens, n_experts, most):
    weights = pattern(tokens, n_experts)
    found, expected = kernels.pattern_order(weights, most), kernels.pattern_order_oracle(weights, most)
    n = len(expected.place)
    assert len(found.place) == (n if most is None else tokens * min(most, n_experts))
    found = found._replace(place=found.place[:n], value=found.value[:n])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_triton_sorts_when_one_expert_gets_all():
    experts, value = torch.full((300,), 2, device=DEVICE), torch.rand(300, device=DEVICE)
    place, ends, by_expert, *_ = kernels.expert_order(experts, value, 4)
    assert place.tolist() == list(range(300)) and ends.tolist() == [0, 0, 300, 300]
    assert torch.equal(by_expert, value)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 1, 1), (5, 2, 33), (3, 17, 8)])
def test_triton_moves_rows_like_torch(tokens, k, width, dtype):
    dtype, tolerance = DTYPES[dtype]
    experts, value = routed(tokens, 20, k)
    place = kernels.expert_order(experts, value, 20).place
    x = torch.randn(tokens, width, device=DEVICE).to(dtype)
    rows = kernels.scatter_rows_oracle(x, place, k)
    starts = torch.arange(tokens + 1, device=DEVICE, dtype=torch.int32) * k
    for slots in (k, starts):
        assert torch.equal(kernels.scatter_rows(x, place, slots), rows)
        expected = kernels.sum_rows_oracle(rows, place, slots, tokens)
        close([kernels.sum_rows(rows, place, slots, tokens)], [expected], tolerance)


@needs_triton
def test_triton_follows_lists_of_unequal_length():
    counts = torch.tensor([3, 0, 1, 0, 5, 1, 0])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(DEVICE)
    place = torch.randperm(10).int().to(DEVICE)
    x, rows = torch.randn(7, 19, device=DEVICE), torch.randn(10, 19, device=DEVICE)
    assert torch.equal(kernels.scatter_rows(x, place, starts), kernels.scatter_rows_oracle(x, place, starts))
    summed = kernels.sum_rows(rows, place, starts, 7)
    close([summed], [kernels.sum_rows_oracle(rows, place, starts, 7)], 1e-5)
    assert torch.equal(summed[counts == 0], torch.zeros(3, 19, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_triton_activates_like_torch_forward_and_backward(activation, has_bias, dtype):
    """Experts 0 and 3 of five have no rows, expert 2 more than two tiles and a rest."""
    dtype, tolerance = DTYPES[dtype]
    ends = torch.tensor([0, 1, 10, 10, 13], dtype=torch.int32, device=DEVICE)
    h, grad = (torch.randn(13, 21, device=DEVICE).mul(2).to(dtype) for _ in range(2))
    bias = torch.randn(5, 21, device=DEVICE).to(dtype) if has_bias else None
    value = torch.rand(13, device=DEVICE)
    value[4] = 0
    arguments = (h, bias, value, ends, activation)
    close([kernels.activate(*arguments)], [kernels.activate_oracle(*arguments)], tolerance)
    for again in (False, True):
        expected = kernels.activate_backward_oracle(*arguments, grad, again)
        close(kernels.activate_backward(*arguments, grad.clone(), again), expected, 5 * tolerance)


@needs_triton
def test_triton_s_gelu_is_the_exact_one_to_float32_precision(monkeypatch):
    """The kernel's polynomial against float64, value and slope, in both tails."""
    monkeypatch.setattr(kernels.tuning, "TILE", 128)
    for name in kernels.BLOCKS:
        monkeypatch.setitem(kernels.BLOCKS, name, Blocks(128, 1, 4))
    z = torch.linspace(-12, 12, 601, device=DEVICE)[:, None]
    one, ends = torch.ones(601, device=DEVICE), torch.tensor([601], dtype=torch.int32, device=DEVICE)
    exact = z.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    found = kernels.activate(z, None, one, ends, "gelu")
    assert (found - expected).abs().max() < 2e-6
    dh, dg, _, _ = kernels.activate_backward(z, None, one, ends, "gelu", torch.ones_like(z), False)
    assert (dh - slope).abs().max() < 2e-6
    assert (dg - expected[:, 0]).abs().max() < 2e-6


@needs_triton
def test_triton_s_gelu_far_from_zero():
    """Where the exponential underflows and z^2 overflows."""
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 13.0, -13.0, 40.0, -40.0, 1e20, -1e20], device=DEVICE)[:, None]
    one, ends = torch.ones(10, device=DEVICE), torch.tensor([10], dtype=torch.int32, device=DEVICE)
    arguments = z, None, one, ends, "gelu"
    close([kernels.activate(*arguments)], [torch.nn.functional.gelu(z)], 1e-6)
    dh, dg, _, _ = kernels.activate_backward(*arguments, torch.ones_like(z), False)
    slope = torch.where(z.abs() < 1, 0.5, (z > 0).float())
    close([dh, dg], [slope, torch.nn.functional.gelu(z)[:, 0]], 1e-6)


@needs_triton
def test_triton_keeps_nan():
    h = torch.tensor([[torch.nan], [1.0]], device=DEVICE)
    one, ends = torch.ones(2, device=DEVICE), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    for activation in kernels.ACTIVATIONS:
        assert kernels.activate(h, None, one, ends, activation).isnan().flatten().tolist() == [True, False]


@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[0, 1, 9, 0, 3], [300, 0, 0, 129, 1], [0, 0, 0, 0, 7]], ids=str)
def test_a_product_equals_the_loop_over_experts_and_leaves_rows_of_nobody_alone(monkeypatch, counts, transposed):
    """Odd rests in rows and columns; the last rows belong to no expert."""
    half, inner = (torch.bfloat16, 64) if DEVICE == "cuda" else (torch.float16, 32)
    ends, n = torch.tensor(counts).cumsum(0).to(DEVICE, torch.int32), sum(counts)
    rows = torch.randn(n + 5, inner, device=DEVICE).to(half)
    rows[n:] = torch.nan
    w = torch.randn(5, 40, inner, device=DEVICE).to(half)
    w_given = w if transposed else w.transpose(1, 2).contiguous()
    assert kernels.product_runs(rows, w_given, transposed)
    empty = torch.Tensor.new_empty  # also of Triton's interpreter, with options
    full = lambda self, *size, **how: empty(self, *size, **how) if how else self.new_full(size, 7.0)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    found, behind = kernels.product(rows, w_given, ends, transposed).split([n, 5])
    monkeypatch.undo()
    expected = torch.cat([part @ each.T for part, each in zip(rows[:n].float().split(counts), w.float(), strict=True)])
    assert found.dtype == half and (found.float() - expected).norm() < 5e-3 * expected.norm()
    assert (behind == 7).all()


@needs_triton
@pytest.mark.parametrize("widths", [(40, 16), (136, 264)], ids=str)
@pytest.mark.parametrize("counts", [[0, 1, 9, 0, 3], [70, 0, 0, 129, 1], [0, 0, 0, 0, 7]], ids=str)
def test_an_outer_product_equals_the_loop_over_experts_and_reads_no_row_of_another(counts, widths):
    """Odd rests in all three dimensions; the last rows belong to no expert, and an expert without rows gets zeros."""
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    ends, n = torch.tensor(counts).cumsum(0).to(DEVICE, torch.int32), sum(counts)
    left, right = (torch.randn(n + 5, width, device=DEVICE).to(half) for width in widths)
    left[n:], right[n:] = torch.nan, torch.nan
    assert kernels.outer_runs(left, right)
    found = kernels.outer(left, right, ends)
    parts = zip(left[:n].float().split(counts), right[:n].float().split(counts), strict=True)
    expected = torch.stack([a.T @ b for a, b in parts])
    assert found.dtype == half and (found.float() - expected).norm() < 5e-3 * expected.norm()
    left[: counts[0] + counts[1]] = torch.nan  # of other experts
    later = kernels.outer(left, right, ends)[2:]
    assert torch.equal(later, found[2:])


@needs_triton
@pytest.mark.parametrize("programs", [1, 2, 3, 4, 5, 7, 8, 24])
def test_a_last_round_in_halves_is_right_and_changes_no_bit(monkeypatch, programs):
    """Tiles: 12, 8 and 60 in the interpreter, 3, 3 and 5 on CUDA (two products, an outer one). So last rounds are full,
    less than half, half and more than half full, or the only one; with one program none is halved."""
    half, inner = (torch.bfloat16, 64) if DEVICE == "cuda" else (torch.float16, 32)
    counts = [0, 1, 9, 0, 3]
    ends, rows = torch.tensor(counts, device=DEVICE).cumsum(0).int(), torch.randn(18, inner, device=DEVICE).to(half)
    rows[13:] = torch.nan  # of nobody
    w = torch.randn(5, inner, 40, device=DEVICE).to(half)
    found = []
    for n in (1, programs):
        monkeypatch.setattr(products, "multiprocessors", lambda device, n=n: n)
        z = kernels.product(rows, w, ends)[:13]
        found.append((z, kernels.product(z, w, ends, transposed=True), kernels.outer(rows[:13], z, ends)))
    for alone, together in zip(*found, strict=True):
        assert torch.equal(alone, together)
    parts = zip(rows[:13].float().split(counts), w.float(), strict=True)
    expected = torch.cat([part @ each for part, each in parts])
    assert (found[1][0].float() - expected).norm() < 5e-3 * expected.norm()


def test_a_tile_that_could_not_be_halved_is_refused():
    for pieces in (1, 3, 0):
        with pytest.raises(ValueError, match="pieces must be a power of 2, at least 2"):
            Product(128, 256, 8, depth=64, pieces=pieces)


@needs_triton
def test_products_can_be_compiled():
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    rows, w = torch.randn(9, 64, device=DEVICE).to(half), torch.randn(2, 64, 40, device=DEVICE).to(half)
    ends = torch.tensor([3, 9], dtype=torch.int32, device=DEVICE)

    def both(rows, w, ends):
        z = kernels.product(rows, w, ends)
        return z, kernels.product(z, w, ends, transposed=True), kernels.outer(rows, z, ends)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    shifted = torch.cat([w.flatten()[:1], w.flatten()])[1:].view_as(w)  # begins between two multiples of 16 bytes
    for weight in (w, shifted):
        for found, expected in zip(compiled(rows, weight, ends), both(rows, w, ends), strict=True):
            assert torch.equal(found, expected)


@needs_triton
def test_a_product_that_cannot_run_says_so():
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    rows, w = torch.randn(3, 64, device=DEVICE).to(half), torch.randn(2, 64, 40, device=DEVICE).to(half)
    assert kernels.product_runs(rows, w) and kernels.product_runs(rows[:, :40], w, transposed=True)
    assert not kernels.product_runs(rows[:0], w) and not kernels.product_runs(rows.float(), w.float())
    assert not kernels.product_runs(rows, w[..., :36])  # rows of 72 bytes
    assert not kernels.product_runs(rows[:, :56], w[:, :56])  # the last step would reach into the next expert
    flat = torch.randn(w.numel() + 1, device=DEVICE).to(half)
    assert not kernels.product_runs(rows, flat[1:].view_as(w))  # begins between two multiples of 16 bytes
    assert kernels.outer_runs(rows, rows) and not kernels.outer_runs(rows[:0], rows[:0])
    assert not kernels.outer_runs(rows, rows[:, :36]) and not kernels.outer_runs(rows, flat[1 : 1 + 192].view(3, 64))
