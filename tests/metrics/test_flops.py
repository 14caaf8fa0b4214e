"""FLOPs: the formulas against PyTorch's counter on real models, and numbers derived by hand; crossings likewise."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.gates import DenseToSparseGate, HashGate, SoftmaxGate, SwitchGate, TemperatureSchedule, TopKGate
from moe_lab.metrics.flops import (
    classifier_flops,
    first_crossing,
    language_flops,
    speedup,
    training_flops,
    translation_flops,
)
from moe_lab.models.language import Classifier, LanguageModel, TransformerSize, Translator

V, S, D, F, E, B = 29, 12, 16, 40, 5, 3
SIZE = TransformerSize(V, S, layers=4, width=D, heads=2, hidden=F, moe_every=2)
DENSE = dataclasses.replace(SIZE, moe_every=0)


def topk(k):
    return lambda index: TopKGate(D, E, k, renormalise=k > 1)


def count(run):
    """(forward, forward and backward) FLOPs. ``run`` returns a scalar that may be trained.

    Only the plain attention is counted: the CPU's fused kernel is unknown to the counter and would be free.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = run()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def count_language(model, length=S):
    tokens = torch.randint(V, (B, length), generator=torch.Generator().manual_seed(0))
    routings = []

    def run():
        logits, found = model(tokens)
        routings.extend(found)
        return logits.square().mean()

    forward, both = count(run)
    return forward / (B * length), both / (B * length), [float(r.experts_per_token.double().mean()) for r in routings]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [S, S - 5])
def test_a_dense_model_costs_what_is_counted(causal, length):
    forward, both, _ = count_language(LanguageModel(DENSE, causal=causal), length)
    expected = language_flops(DENSE, context=length)
    assert forward == pytest.approx(expected, rel=1e-12)
    assert both == pytest.approx(training_flops(expected), rel=1e-12)


@pytest.mark.parametrize("k", range(1, E + 1))
def test_a_mixture_costs_what_is_counted_for_each_k(k):
    """With all experts the weighted sum is a matrix product, which the counter sees: 2 k D per token and mixture."""
    forward, both, experts = count_language(LanguageModel(SIZE, causal=True, make_gate=topk(k)))
    assert experts == [k, k]
    expected = language_flops(SIZE, n_experts=E, experts_per_token=k)
    combine = 2 * 2 * k * D if k == E else 0
    assert forward == pytest.approx(expected + combine, rel=1e-12)
    assert both == pytest.approx(training_flops(expected + combine), rel=1e-12)


@pytest.mark.parametrize(
    "make_gate",
    [
        lambda index: SwitchGate(D, E, capacity_factor=0.6),
        lambda index: DenseToSparseGate(D, E, TemperatureSchedule(0.5, 0.5, 1), threshold=0.1),
    ],
    ids=["dropped tokens", "each token its own number"],
)
def test_any_number_of_experts_layer_by_layer(make_gate):
    torch.manual_seed(0)
    forward, both, experts = count_language(LanguageModel(SIZE, causal=True, make_gate=make_gate))
    assert experts[0] != experts[1] or experts[0] != 1
    expected = language_flops(SIZE, n_experts=E, experts_per_token=experts)
    assert forward == pytest.approx(expected, rel=1e-12)
    assert both == pytest.approx(training_flops(expected), rel=1e-12)
    mean = sum(experts) / len(experts)
    assert language_flops(SIZE, n_experts=E, experts_per_token=mean) == pytest.approx(expected)


def test_a_hash_has_no_router_and_costs_as_much_as_the_dense_model():
    forward, both, _ = count_language(LanguageModel(SIZE, causal=True, make_gate=lambda index: HashGate(V, E)))
    assert forward == language_flops(SIZE, router=False) == language_flops(DENSE)
    assert both == training_flops(forward)


def padded(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("make_gate", [None, topk(2)], ids=["dense", "mixtures"])
def test_a_padded_batch_of_translations_costs_what_is_counted(make_gate):
    size = SIZE if make_gate else DENSE
    model = Translator(size, make_gate=make_gate)
    source_seen, target_seen = padded([9, 4]), padded([3, 7])
    source, target = torch.randint(V, source_seen.shape), torch.randint(V, target_seen.shape)
    forward, both = count(lambda: model(source, source_seen, target, target_seen)[0].square().mean())
    expected = translation_flops(
        size,
        source_tokens=9,
        target_tokens=7,
        n_experts=E,
        source_experts=2,
        target_experts=[2, 2] if make_gate else 2,
        real_source=13 / 2,
        real_target=10 / 2,
    )
    assert forward == pytest.approx(2 * expected, rel=1e-12)
    assert both == pytest.approx(2 * training_flops(expected), rel=1e-12)


@pytest.mark.parametrize("make_gate", [None, topk(3)], ids=["dense", "mixtures"])
def test_a_padded_batch_to_classify_costs_what_is_counted(make_gate):
    size = SIZE if make_gate else DENSE
    model = Classifier(LanguageModel(size, causal=False, make_gate=make_gate), 4)
    seen = padded([9, 4])
    tokens = torch.randint(V, seen.shape)
    forward, both = count(lambda: model(tokens, seen)[0].square().mean())
    expected = classifier_flops(size, tokens=9, n_classes=4, n_experts=E, experts_per_token=3, real_tokens=13 / 2)
    assert forward == pytest.approx(2 * expected, rel=1e-12)
    assert both == pytest.approx(2 * training_flops(expected), rel=1e-12)


def test_numbers_by_hand():
    """L = 2, d = 2, F = 3, V = 5, T = 4, mixture in the second layer, N = 3.

    Attention 8*4 + 4*4*2 = 64 a layer, feed-forward 4*2*3 = 24, router 2*2*3 = 12, head 2*2*5 = 20.
    """
    size = TransformerSize(5, 4, layers=2, width=2, heads=1, hidden=3, moe_every=2)
    dense = dataclasses.replace(size, moe_every=0)
    assert language_flops(dense) == 2 * 64 + 2 * 24 + 20
    assert language_flops(size, n_experts=3) == 2 * 64 + 24 + 12 + 24 + 20
    assert language_flops(size, n_experts=3, experts_per_token=2.5) == 2 * 64 + 24 + 12 + 60 + 20
    assert language_flops(dense, context=2) == 2 * (64 - 16) + 2 * 24 + 20  # a kernel that skips the masked half
    assert language_flops(dense, head_share=0.15) == 2 * 64 + 2 * 24 + 3
    # Three source tokens (attention 32 + 24 = 56) and two target tokens (32 + 16 = 48), without mixtures. Cross: 4*4 +
    # 4*3*2 = 40 for a target token, 4*4 = 16 for a source token.
    assert translation_flops(dense, source_tokens=3, target_tokens=2) == (
        3 * 2 * (56 + 24) + 2 * 2 * (48 + 24) + 2 * (2 * 40 + 3 * 16) + 2 * 20
    )
    # One real token of three: 24 + 12 instead of 24 in the second layer, for that one only; head 2*4 + 2*2*7.
    assert classifier_flops(size, tokens=3, n_classes=7, n_experts=3, real_tokens=1) == 3 * (112 + 24) + 36 + 8 + 28
    assert training_flops(10.0) == 30.0


@given(k=st.floats(0, 64), other=st.floats(0, 64), share=st.floats(0, 1))
def test_affine_in_experts_per_token(k, other, share):
    def cost(value):
        return language_flops(SIZE, n_experts=64, experts_per_token=value)

    assert cost(share * k + (1 - share) * other) == pytest.approx(share * cost(k) + (1 - share) * cost(other))
    assert cost(k) - cost(0) == pytest.approx(2 * k * 4 * D * F, abs=1e-6)  # a difference of large numbers


def test_numbers_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="give n_experts"):
        language_flops(SIZE)
    with pytest.raises(ValueError, match="must be in"):
        language_flops(SIZE, n_experts=4, experts_per_token=4.5)
    with pytest.raises(ValueError, match="must be in"):
        language_flops(SIZE, n_experts=4, experts_per_token=[1, math.nan])
    with pytest.raises(ValueError, match="3 numbers of experts per token for 2 mixtures"):
        translation_flops(SIZE, source_tokens=2, target_tokens=2, n_experts=4, target_experts=[1, 1, 1])


def test_a_full_softmax_costs_all_experts():
    model = LanguageModel(SIZE, causal=True, make_gate=lambda index: SoftmaxGate(D, E))
    forward, _, experts = count_language(model)
    assert experts == [E, E]
    assert forward == language_flops(SIZE, n_experts=E, experts_per_token=E) + 2 * 2 * E * D


def test_first_crossing_by_hand():
    assert first_crossing([0, 10, 20], [3.0, 2.0, 1.0], 1.5) == 15
    assert first_crossing([0, 10, 20], [3.0, 2.0, 1.0], 2.0) == 10
    assert first_crossing([0, 10, 20], [3.0, 2.0, 1.0], 4.0) == 0
    assert first_crossing([0, 10, 20], [3.0, 2.0, 1.0], 0.9) == math.inf
    # Up again in between: the running minimum 2.1 stays, and the line goes from there.
    assert first_crossing([0, 10, 20, 30], [3.0, 2.1, 2.5, 1.9], 2.0) == pytest.approx(25)
    # Flat first, then down: from the last flat point.
    assert first_crossing([0, 10, 20], [2.0, 2.0, 1.0], 1.5) == 15
    # Points without a value are not there.
    assert first_crossing([0, 10, 20, 30], [math.inf, 3.0, math.nan, 1.0], 2.0) == 20
    assert first_crossing([], [], 2.0) == math.inf


def test_speedup_by_hand():
    """Base: lowest 1.8, final 2.0; it is at 2.0 for the first time half-way from 10 (2.2) to 20 (1.8): 15."""
    x, y = [0, 10, 20, 30], [3.0, 2.2, 1.8, 2.0]
    assert speedup(x, y, x, y) == 1
    assert speedup(x, y, [0, 10], [3.0, 1.0]) == pytest.approx(3)  # at 5
    assert speedup(x, y, [0, 60], [3.0, 1.0]) == pytest.approx(0.5)  # at 30
    assert speedup(x, y, [0, 10], [3.0, 2.01]) == 0
    assert speedup(x, y, [0, 10], [3.0, 1.0], target=1.7) == math.inf
    assert speedup(x, y, [0, 10], [3.0, 2.5], target=1.7) == 0


def test_curves_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one length"):
        first_crossing([1, 2], [1.0], 0.5)
    with pytest.raises(ValueError, match="must increase"):
        first_crossing([1, 1], [1.0, 0.0], 0.5)
    with pytest.raises(ValueError, match="no finite final loss"):
        speedup([1, 2], [1.0, math.nan], [1, 2], [1.0, 0.0])
    with pytest.raises(ValueError, match="no ratio"):
        speedup([0, 1], [1.0, 0.5], [0, 1], [0.4, 0.3])


@given(
    losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=20),
    shift=st.floats(0.5, 3),
    target=st.floats(0.05, 11),
)
def test_twice_the_price_is_half_the_speed(losses, shift, target):
    x = [shift + i for i in range(len(losses))]
    crossing = first_crossing(x, losses, target)
    assert (crossing == math.inf) == (min(losses) > target)
    twice = speedup(x, losses, [2 * value for value in x], losses, target)
    assert twice == (0 if crossing == math.inf else pytest.approx(0.5))
