"""What must be true of every gate, for any number of experts, any k, any weights."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.gates import (
    BaseLayerGate,
    CometGate,
    DenseToSparseGate,
    DSelectKGate,
    ExpertChoiceGate,
    GShardGate,
    HashGate,
    PermutationSearch,
    SoftmaxGate,
    StableGate,
    SwitchGate,
    TemperatureSchedule,
    TopKGate,
)

D = 6
SIZES = [1, 2, 3, 5, 9, 16, 17]
STATIC = ["softmax", "topk", "dselect_k", "comet", "switch", "gshard", "dense_to_sparse"]  # with in_features=None
LEARNED = [*STATIC, "base_layer", "expert_choice"]
LEAST = {"gshard": 2, "dense_to_sparse": 2}  # experts; others 1
PARTIAL = {"switch", "gshard", "dense_to_sparse", "base_layer", "expert_choice"}  # weights sum to less than 1


def make(kind, n_experts, k=2, in_features=D, seed=0, scale=1.0):
    """Without noise: the same input gives the same output."""
    generator = torch.Generator().manual_seed(seed)
    schedule = TemperatureSchedule(2.0, 0.3, 100)
    gate = {
        "softmax": lambda: SoftmaxGate(in_features, n_experts, generator=generator),
        "topk": lambda: TopKGate(in_features, n_experts, k, renormalise=k > 1, generator=generator),
        "dselect_k": lambda: DSelectKGate(in_features, n_experts, k, generator=generator),
        "comet": lambda: CometGate(in_features, n_experts, k, generator=generator),
        "switch": lambda: SwitchGate(in_features, n_experts, generator=generator),
        "gshard": lambda: GShardGate(in_features, n_experts, second="best", generator=generator),
        "dense_to_sparse": lambda: DenseToSparseGate(
            in_features, n_experts, schedule, noise="never", generator=generator
        ),
        "base_layer": lambda: BaseLayerGate(in_features, n_experts, generator=generator),
        "expert_choice": lambda: ExpertChoiceGate(in_features, n_experts, generator=generator),
    }[kind]()
    with torch.no_grad():
        for parameter in gate.parameters():
            if not parameter.requires_grad:
                continue
            parameter.uniform_(-1, 1, generator=generator).mul_(scale)
    return gate


def sums_to_one(kind, n_experts, k):
    if kind in PARTIAL or (kind == "dselect_k" and n_experts & (n_experts - 1)):
        return kind == "gshard"  # two weights, divided by their sum
    return not (kind == "topk" and k == 1)


@given(
    kind=st.sampled_from(LEARNED),
    n_experts=st.sampled_from(SIZES),
    k=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_weights_are_a_point_of_the_simplex(kind, n_experts, k, scale, seed, dtype):
    n_experts = max(n_experts, LEAST.get(kind, 1))
    gate = make(kind, n_experts, k, seed=seed, scale=scale).to(dtype)
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    weights = gate(x).weights
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert weights.shape == (11, n_experts)
    assert weights.dtype == dtype
    assert (weights >= 0).all()
    total = weights.sum(-1)
    assert (total <= 1 + tolerance).all()
    if sums_to_one(kind, n_experts, k):
        assert ((total - 1).abs() <= tolerance).all()


@given(
    kind=st.sampled_from(LEARNED),
    n_experts=st.sampled_from(SIZES),
    k=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_row_has_more_experts_than_the_gate_says(kind, n_experts, k, scale, training, seed):
    n_experts = max(n_experts, LEAST.get(kind, 1))
    gate = make(kind, n_experts, k, seed=seed, scale=scale).train(training)
    routing = gate(torch.randn(11, D, generator=torch.Generator().manual_seed(seed)))
    says = {"softmax": n_experts, "topk": min(k, n_experts), "switch": 1, "gshard": 2, "base_layer": 1}
    assert routing.most == says.get(kind, 1 if kind == "dense_to_sparse" and not training else None)
    if routing.most is not None:
        assert routing.most >= 1 and routing.experts_per_token.max() <= routing.most


def test_gates_of_keys_say_one_and_gates_that_change_say_what_holds_now():
    keys = torch.arange(9)
    assert HashGate(9, 4)(keys).most == 1
    stable = StableGate(D, 4, 9, stage_one_steps=1)
    assert stable((torch.randn(9, D), keys)).most == 1
    schedule = TemperatureSchedule(2.0, 0.3, 2)
    gate, said = DenseToSparseGate(D, 4, schedule, shared_steps=1, hard_after=1, k=2), []
    for _ in range(3):
        routing = gate(torch.randn(50, D))
        assert routing.most is None or routing.experts_per_token.max() <= routing.most
        said.append((gate.phase, routing.most))
        gate.advance()
    assert said == [("shared", 1), ("soft", None), ("hard", 2)]
    gate = DenseToSparseGate(D, 4, schedule, inference="matched").eval()
    assert gate(torch.randn(3, D)).most is None


def test_a_soft_permutation_spreads_weights_and_a_hard_one_does_not():
    search = PermutationSearch(make("topk", 5), steps=1)
    soft = search(torch.randn(20, D))
    assert soft.most is None and soft.experts_per_token.max() > 2
    search.permutation.advance()
    hard = search(torch.randn(20, D))
    assert hard.most == hard.experts_per_token.max() == 2


@pytest.mark.parametrize("n_experts", SIZES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_cardinality_holds_once_every_split_is_saturated(n_experts, k):
    x = torch.randn(200, D)
    for kind in ["comet", "dselect_k"]:
        soft, hard = make(kind, n_experts, k, scale=0.01), make(kind, n_experts, k, scale=1.0)
        with torch.no_grad():
            for parameter in (hard.split if kind == "comet" else hard.code).parameters():
                parameter.mul_(1e6)
        assert hard(x).experts_per_token.max() <= k
        assert soft(x).experts_per_token.float().mean() == n_experts  # nothing is zero before training
    if k > 1:
        assert (make("topk", n_experts, k)(x).experts_per_token == min(k, n_experts)).all()
    assert (HashGate(50, n_experts)(torch.arange(50)).experts_per_token == 1).all()


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("n_experts", [1, 2, 5, 16])
def test_a_static_gate_gives_every_token_the_same_row(kind, n_experts):
    n_experts = max(n_experts, LEAST.get(kind, 1))
    gate = make(kind, n_experts, in_features=None)
    alone, many = gate().weights, gate(torch.randn(7, 3)).weights
    assert alone.shape == (1, n_experts)
    assert torch.allclose(many, alone.expand(7, -1), atol=1e-7)
    assert torch.equal(many == 0, (alone == 0).expand(7, -1))
    many.square().sum().backward()
    if n_experts > 1:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_row_batches_work_forward_and_backward(kind, rows):
    gate = make(kind, 5)
    routing = gate(torch.zeros(rows, D))
    assert routing.weights.shape == (rows, 5)
    assert torch.isfinite(routing.load).all() and torch.isfinite(routing.importance).all()
    assert all(torch.isfinite(loss) and (rows or loss == 0) for loss in routing.losses.values()), routing.losses
    (routing.weights.sum() + sum(routing.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in gate.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_extreme_inputs_give_finite_weights_and_gradients(kind, value):
    for n_experts in (3, 16):
        gate = make(kind, n_experts)
        x = torch.full((4, D), value, requires_grad=True)
        routing = gate(x)
        (routing.weights.square().sum() + sum(routing.losses.values())).backward()
        assert torch.isfinite(routing.weights).all()
        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in gate.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("n_experts", [2, 5, 8])
def test_gradients_agree_with_finite_differences(kind, n_experts):
    gate = make(kind, n_experts, scale=0.2).double()
    x = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    learned = {name: parameter for name, parameter in gate.named_parameters() if parameter.requires_grad}

    def weights(x, *parameters):
        routing = torch.func.functional_call(gate, dict(zip(learned, parameters, strict=True)), (x,))
        return routing.weights, *routing.losses.values()

    assert torch.autograd.gradcheck(weights, (x, *learned.values()), atol=1e-6)


@pytest.mark.parametrize("kind", LEARNED)
def test_autocast_does_not_touch_the_gate(kind):
    gate, x = make(kind, 16), torch.randn(64, D)
    plain = gate(x).weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gate(x)
    assert torch.equal(cast.weights, plain)
    assert all(torch.isfinite(loss) for loss in cast.losses.values())


@pytest.mark.parametrize("kind", LEARNED)
def test_bfloat16_parameters_still_give_rows_that_sum_to_one(kind):
    gate = make(kind, 16).bfloat16()
    weights = gate(torch.randn(64, D).bfloat16()).weights
    assert weights.dtype == torch.float32
    if sums_to_one(kind, 16, 2):
        assert ((weights.sum(-1) - 1).abs() <= 1e-6).all()


@pytest.mark.parametrize("kind", LEARNED)
def test_regularisers_exist_in_training_and_not_in_evaluation(kind):
    gate, x = make(kind, 5), torch.randn(9, D)
    assert gate(x).losses or kind == "base_layer"  # balanced by constraint
    assert not gate.eval()(x).losses


@pytest.mark.parametrize("kind", LEARNED)
def test_state_dict_round_trip_restores_the_same_function(kind):
    gate, other = make(kind, 9, seed=1), make(kind, 9, seed=2)
    x = torch.randn(8, D)
    assert not torch.equal(gate(x).weights, other(x).weights)
    buffer = io.BytesIO()
    torch.save(gate.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(gate(x).weights, other(x).weights)


@pytest.mark.parametrize("kind", [kind for kind in LEARNED if kind != "base_layer"])  # which asks SciPy
@pytest.mark.parametrize("n_experts", [5, 16])
def test_compiles_without_graph_breaks(kind, n_experts):
    gate, x = make(kind, n_experts, scale=0.3), torch.randn(12, D)
    compiled = torch.compile(copy.deepcopy(gate), fullgraph=True, backend="aot_eager")
    expected, got = gate(x), compiled(x)
    assert torch.allclose(got.weights, expected.weights, atol=1e-6)
    assert torch.equal(got.active, expected.active)
    assert got.losses.keys() == expected.losses.keys()
    got.weights.square().sum().backward()


@pytest.mark.parametrize("kind", LEARNED)
def test_the_same_generator_seed_gives_the_same_start(kind):
    first, second = make(kind, 7, seed=3), make(kind, 7, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@settings(max_examples=20)
@given(n_experts=st.integers(1, 12), seed=st.integers(0, 99))
def test_statistics_of_a_routing_are_consistent(n_experts, seed):
    routing = make("topk", n_experts, 2, seed=seed)(torch.randn(30, D))
    assert torch.allclose(routing.load.sum(), torch.tensor(1.0))
    assert torch.allclose(routing.importance.sum(), torch.tensor(1.0))
    assert (routing.entropy <= torch.tensor(float(min(2, n_experts))).log() + 1e-6).all()
    assert (routing.entropy >= 0).all()


def test_wrong_inputs_are_refused_with_advice():
    with pytest.raises(ValueError, match="per example"):
        make("comet", 4)()
    with pytest.raises(ValueError, match=rf"\(tokens, {D}\)"):
        make("comet", 4)(torch.randn(3, D + 1))
    with pytest.raises(ValueError, match="n_experts"):
        CometGate(4, 0, 1)
    with pytest.raises(ValueError, match="gamma"):
        CometGate(4, 4, 1, gamma=0)
    with pytest.raises(ValueError, match="gamma"):
        DSelectKGate(4, 4, 1, gamma=-1)
    with pytest.raises(ValueError, match="k must"):
        TopKGate(4, 4, 0)
    with pytest.raises(ValueError, match="in_features"):
        SoftmaxGate(0, 4)
