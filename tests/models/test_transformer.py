"""The transformer sees what it may see, ignores padding, and a mixture of one is a feed-forward layer."""

import pytest
import torch

from moe_lab.experts import run_everything
from moe_lab.gates import (
    BaseLayerGate,
    DenseToSparseGate,
    ExpertChoiceGate,
    GShardGate,
    HashGate,
    SoftmaxGate,
    StableGate,
    SwitchGate,
    TemperatureSchedule,
)
from moe_lab.models.language import Classifier, LanguageModel, TransformerSize, Translator
from moe_lab.models.transformer import Attention, FeedForward, MixtureFeedForward, Transformer

V, S, D, E = 23, 12, 16, 4
SIZE = TransformerSize(V, S, layers=4, width=D, heads=2, moe_every=2)
GATES = {
    "switch": lambda i: SwitchGate(D, E),
    "gshard": lambda i: GShardGate(D, E),
    "hash": lambda i: HashGate(V, E, seed=i),
    "base": lambda i: BaseLayerGate(D, E),
    "stable": lambda i: StableGate(D, E, V, stage_one_steps=2),
    "dense_to_sparse": lambda i: DenseToSparseGate(D, E, TemperatureSchedule(2.0, 0.3, 10)),
    "expert_choice": lambda i: ExpertChoiceGate(D, E),
}
CAUSAL = [name for name in GATES if name != "expert_choice"]


def tokens(rows=3, length=S, seed=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def mask(lengths, total=S):
    return torch.arange(total) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("name", GATES)
def test_every_gate_serves_in_every_second_block_and_learns(name):
    model = LanguageModel(SIZE, causal=True, make_gate=GATES[name])
    logits, routings = model(tokens())
    assert logits.shape == (3, S, V) and [r.weights.shape for r in routings] == [(3 * S, E)] * 2
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens().flatten())
    (loss + sum(value for r in routings for value in r.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert [block.mixture is not None for block in model.body.blocks] == [False, True, False, True]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_does_not_change_an_earlier_prediction(name):
    torch.manual_seed(0)
    model = LanguageModel(SIZE, causal=True, make_gate=GATES[name]).eval()
    first = tokens()
    second = first.clone()
    second[:, 7:] = (second[:, 7:] + 1) % V
    with torch.no_grad():
        a, b = model(first)[0], model(second)[0]
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-5)
    assert not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)


def test_expert_choice_looks_ahead():
    torch.manual_seed(0)
    model = LanguageModel(SIZE, causal=True, make_gate=GATES["expert_choice"]).eval()
    first = tokens()
    second = first.clone()
    second[:, 7:] = (second[:, 7:] + 1) % V
    with torch.no_grad():
        assert not torch.allclose(model(first)[0][:, :7], model(second)[0][:, :7], atol=1e-4)


@pytest.mark.parametrize("name", ["switch", "stable", "hash"])
def test_padding_is_not_routed_and_changes_nothing(name):
    torch.manual_seed(0)
    model = LanguageModel(SIZE, causal=False, make_gate=GATES[name]).eval()
    seen = mask([5, 12, 8])
    x = tokens()
    other = torch.where(seen, x, (x + 3) % V)
    with torch.no_grad():
        (a, routings), (b, _) = model(x, seen), model(other, seen)
        alone, _ = model(x[:1, :5])
    assert routings[0].weights.shape == (25, E)
    assert torch.allclose(a[seen], b[seen], atol=1e-5)
    assert torch.allclose(a[0, :5], alone[0], atol=1e-5)


def test_a_mixture_of_equal_experts_under_a_gate_that_sums_to_one_is_a_feed_forward_layer():
    plain = FeedForward(D, 32)
    layer = MixtureFeedForward(SoftmaxGate(D, E), D, 32)
    with torch.no_grad():
        for weight, bias, linear in zip(
            layer.moe.experts.weights, layer.moe.experts.biases, (plain.layers[0], plain.layers[3]), strict=True
        ):
            weight.copy_(linear.weight.T.expand_as(weight))
            bias.copy_(linear.bias.expand_as(bias))
    x = torch.randn(2, 5, D)
    y, routing = layer(x, tokens(2, 5))
    assert torch.allclose(y, plain(x), atol=1e-5)
    (oracle,) = run_everything(layer.moe.experts, x.flatten(0, 1), [routing.weights])
    assert torch.allclose(y.flatten(0, 1), oracle, atol=1e-5)


def test_attention_by_hand():
    """One head, identity maps, two positions: softmax(x x^T / sqrt(D)) x, lower triangle only when causal."""
    attention = Attention(2, 1, causal=True)
    with torch.no_grad():
        attention.query.weight.copy_(torch.eye(2))
        attention.key_value.weight.copy_(torch.eye(2).repeat(2, 1))
        attention.out.weight.copy_(torch.eye(2))
        for linear in (attention.query, attention.key_value, attention.out):
            linear.bias.zero_()
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    second = torch.tensor([0.0, 4.0]).div(2**0.5).softmax(0)
    expected = torch.stack((x[0, 0], second[0] * x[0, 0] + second[1] * x[0, 1]))
    assert torch.allclose(attention(x)[0], expected, atol=1e-6)


def test_the_decoder_sees_the_source_and_only_its_real_tokens():
    torch.manual_seed(0)
    model = Translator(SIZE, make_gate=GATES["switch"]).eval()
    source, seen = tokens(2, 9), mask([9, 4], 9)
    target, target_seen = tokens(2, 6, seed=1), mask([6, 6], 6)
    with torch.no_grad():
        a, routings = model(source, seen, target, target_seen)
        padding = torch.where(seen, source, (source + 1) % V)
        b, _ = model(padding, seen, target, target_seen)
        changed = source.clone()
        changed[1, 0] = (changed[1, 0] + 1) % V
        c, _ = model(changed, seen, target, target_seen)
    assert [r.weights.shape[0] for r in routings] == [13, 13, 12, 12]
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(a[0], c[0], atol=1e-5) and not torch.allclose(a[1], c[1], atol=1e-4)


def test_gates_are_numbered_through_encoder_and_decoder():
    asked = []
    Translator(SIZE, make_gate=lambda index: asked.append(index) or SwitchGate(D, E))
    assert asked == [0, 1, 2, 3]


def test_a_classifier_shares_its_encoder_and_averages_real_tokens():
    torch.manual_seed(0)
    encoder = LanguageModel(SIZE, causal=False, make_gate=GATES["switch"])
    model = Classifier(encoder, 2).eval()
    seen, x = mask([4, 12]), tokens(2)
    logits, routings = model(x, seen)
    assert logits.shape == (2, 2) and len(routings) == 2
    assert torch.allclose(model(x[:1, :4], mask([4], 4))[0], logits[:1], atol=1e-5)
    logits.sum().backward()
    assert encoder.embedding.token.weight.grad is not None


def test_the_number_of_parameters_is_the_one_counted_by_hand():
    dense = LanguageModel(TransformerSize(V, S, layers=2, width=D, heads=2, moe_every=0), causal=True)
    block = 2 * 2 * D + (D * D + D) * 2 + (D * 2 * D + 2 * D) + (D * 4 * D + 4 * D) + (4 * D * D + D)
    assert sum(p.numel() for p in dense.parameters()) == (V + S) * D + 2 * block + 2 * D  # output layer is tied
    mixed = LanguageModel(
        TransformerSize(V, S, layers=2, width=D, heads=2, moe_every=2), causal=True, make_gate=GATES["switch"]
    )
    expert = D * 4 * D + 4 * D + 4 * D * D + D
    more = (E - 1) * expert + D * E + E
    assert sum(p.numel() for p in mixed.parameters()) == (V + S) * D + 2 * block + 2 * D + more


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="longer than this model"):
        LanguageModel(SIZE, causal=True, make_gate=GATES["switch"])(tokens(1, S + 1))
    with pytest.raises(ValueError, match="make_gate"):
        LanguageModel(SIZE, causal=True)
    with pytest.raises(ValueError, match="no mixture into 2 layers"):
        Transformer(2, D, 2, 32, moe_every=3, make_gate=GATES["switch"])
    with pytest.raises(ValueError, match="divisible"):
        Attention(10, 3)
    with pytest.raises(ValueError, match="vocabulary"):
        TransformerSize(0, 5)
    with pytest.raises(ValueError, match="probability"):
        TransformerSize(5, 5, dropout=1.0)
