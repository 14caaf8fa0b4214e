"""The split, the identities with the teacher, and that only routed experts run."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_lab.bert import BlockExperts, become_mixture, split_neurons, switched_off
from moe_lab.bert.mixture import MixtureBlock, widths
from moe_lab.experts import combine_experts, run_everything
from moe_lab.gates import CometGate, DSelectKGate, HashGate, PermutationSearch, SoftmaxGate, TopKGate
from moe_lab.routing import sum_losses


def equal_weights(index, n_experts=4):
    gate = SoftmaxGate(None, n_experts)
    nn.init.zeros_(gate.logits.bias)
    return gate


def comet(index):
    return CometGate(12, 4, 1, gamma=1.0, generator=torch.Generator().manual_seed(index))


def hash_gate(index):
    return HashGate(200, 4, seed=index)


# ---- the split


def test_the_split_by_hand():
    importance = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0, 0.8, 0.3, 0.2])  # order 1 5 2 3 6 7 0 4
    assert split_neurons(importance, 2, expert_width=3, shared=1).tolist() == [[1, 5, 3], [1, 2, 6]]  # 7, 0, 4 are gone
    assert split_neurons(importance, 2, shared=0).tolist() == [[1, 2, 6, 0], [5, 3, 7, 4]]
    assert split_neurons(importance, 1, expert_width=2, shared=0).tolist() == [[1, 5]]
    assert split_neurons(importance, 3, expert_width=2, shared=2).tolist() == [[1, 5]] * 3


def test_default_widths_are_the_papers():
    assert widths(3072, 4) == (768, 512)
    assert len(split_neurons(torch.rand(3072), 4).unique()) == 1536
    assert widths(1536, 4) == (384, 256)
    assert widths(24, 12) == (2, 2)  # F/6 = 4 neurons do not fit into an expert of 2


@settings(max_examples=60)
@given(st.data())
def test_the_split_keeps_the_most_important_and_shares_what_it_should(data):
    n_neurons = data.draw(st.integers(1, 40))
    n_experts = data.draw(st.integers(1, 6))
    shared = data.draw(st.integers(0, n_neurons))
    own = data.draw(st.integers(0, (n_neurons - shared) // n_experts))
    if shared + own == 0:
        return
    importance = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=n_neurons, max_size=n_neurons))).double()
    neurons = split_neurons(importance, n_experts, shared + own, shared)
    assert neurons.shape == (n_experts, shared + own)
    times = torch.bincount(neurons.flatten(), minlength=n_neurons)
    assert int((times == n_experts).sum()) >= shared and len(neurons.unique()) == shared + n_experts * own
    kept, gone = importance[times > 0], importance[times == 0]
    assert len(gone) == 0 or kept.min() >= gone.max()
    assert all(len(row.unique()) == len(row) for row in neurons)
    assert (importance[neurons].diff(dim=1) <= 0).all()  # the most important first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (24, 5),
            r"5 experts do not divide the 24 neurons of a layer: give expert_width; 4 drops the 4 least important",
        ),
        ((24, 0), "n_experts must be at least 1"),
        ((24, 2, 25), "expert_width must be between 1 and 24"),
        ((24, 2, 0), "expert_width must be between 1 and 24"),
        ((24, 2, 12, 13), "shared must be between 0 and expert_width = 12"),
        ((24, 2, 12, -1), "shared must be between 0"),
        ((24, 4, 8, 0), "need more than the 24 there are; expert_width can be at most 6"),
    ],
)
def test_splits_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        widths(*arguments)


def test_a_number_of_experts_that_does_not_divide_works_with_a_width(teacher, importance, answer):
    student = become_mixture(teacher, importance, lambda index: equal_weights(index, 5), expert_width=4, shared=0)
    assert student.encoder.encoder.layer[0].mixture.moe.experts.w1.shape == (5, 12, 4)
    assert answer(student).logits.shape == (6, 2)


# ---- when the mixture is the teacher


@pytest.mark.parametrize("shared", [0, 4, 12, 24])
def test_all_experts_with_equal_weights_are_the_teacher_if_nothing_was_dropped(teacher, importance, answer, shared):
    teacher.double()
    width = shared + (24 - shared) // 4
    student = become_mixture(teacher, importance, equal_weights, expert_width=width, shared=shared, mix="before_norm")
    ours, theirs = answer(student), answer(teacher)
    assert all(int(routing.experts_per_token.min()) == 4 for routing in ours.trace.routings)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mix", ["after_norm", "before_norm"])
@pytest.mark.parametrize("gate", [comet, lambda index: TopKGate(12, 4, 4), hash_gate])
def test_experts_that_are_the_whole_layer_are_the_teacher_whatever_the_gate_says(
    teacher, importance, answer, mix, gate
):
    teacher.double()
    student = become_mixture(teacher, importance, gate, expert_width=24, shared=24, mix=mix)
    torch.testing.assert_close(answer(student).logits, answer(teacher).logits, rtol=1e-6, atol=1e-7)  # float32 gates


def test_whole_layers_behind_a_one_hot_gate_are_the_teacher_in_every_layer(teacher, importance, answer, batch):
    student = become_mixture(teacher, importance, hash_gate, expert_width=24, shared=24)
    for ours, theirs in zip(answer(student).trace.hidden, answer(teacher).trace.hidden, strict=True):
        torch.testing.assert_close(ours[batch["seen"]], theirs[batch["seen"]], rtol=0, atol=1e-6)


def test_experts_that_differ_are_not_the_teacher_after_the_norm(teacher, importance, answer):
    student = become_mixture(teacher, importance, equal_weights, expert_width=6, shared=0)
    assert (answer(student).logits - answer(teacher).logits).abs().max() > 1e-3


def test_dropped_neurons_are_missed(teacher, importance, answer):
    student = become_mixture(teacher, importance, equal_weights, expert_width=5, shared=0, mix="before_norm")
    assert (answer(student).logits - answer(teacher).logits).abs().max() > 1e-3


def test_the_teacher_is_left_alone(teacher, importance, answer):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wanted = answer(teacher).logits
    student = become_mixture(teacher, importance, comet)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(answer(teacher).logits, wanted)


def test_an_expert_is_its_rows_of_the_teacher_with_a_norm_of_its_own(teacher, importance):
    student = become_mixture(teacher, importance, comet, expert_width=6, shared=2)
    neurons = split_neurons(importance[1], 4, 6, 2)
    layer, bank = teacher.encoder.encoder.layer[1], student.encoder.encoder.layer[1].mixture.moe.experts
    assert bank.norm_weight.shape == (4, 12) and bank.norm_weight.is_leaf
    a = torch.randn(5, 12)
    for expert in range(4):
        cut = copy.deepcopy(layer)
        with torch.no_grad():
            cut.output.dense.weight[:, [h for h in range(24) if h not in neurons[expert]]] = 0
        wanted = cut.output(cut.intermediate(a), a)
        torch.testing.assert_close(bank.single(expert, a), wanted)


# ---- running


def bank(norm, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 4), (3, 4), (3, 4, 5), (3, 5)]
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    experts = BlockExperts(weights, nn.GELU(), nn.LayerNorm(5) if norm else None)
    return experts.to(dtype)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 1, 7])
@pytest.mark.parametrize("kind", ["dense", "sparse", "one expert"])
def test_dispatch_is_the_oracle_in_outputs_and_gradients(norm, n_tokens, kind):
    experts = bank(norm)
    x = torch.randn(n_tokens, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(n_tokens, 3, dtype=torch.float64)
    if kind == "sparse":
        weights = weights * (weights > 0.5)
    if kind == "one expert":
        weights[:, 1:] = 0
    (fast,), (slow,) = combine_experts(experts, x, [weights]), run_everything(experts, x, [weights])
    torch.testing.assert_close(fast, slow)
    grad = torch.randn_like(slow)
    variables = [x, *experts.parameters()]
    ours, theirs = (torch.autograd.grad(y, variables, grad, allow_unused=True) for y in (fast, slow))
    for a, b, variable in zip(ours, theirs, variables, strict=True):
        zero = torch.zeros_like(variable)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_everywhere_is_every_expert_on_its_own_in_outputs_and_gradients(norm, n_tokens):
    experts = bank(norm)
    x = torch.randn(n_tokens, 5, dtype=torch.float64, requires_grad=True)
    found, wanted = experts.everywhere(x), torch.stack([experts.single(e, x) for e in range(3)])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, experts(x).view(3, n_tokens, 5))
    grad = torch.randn_like(wanted)
    variables = [x, *experts.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y, variables, grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mix", ["after_norm", "before_norm"])
@pytest.mark.parametrize("make", [comet, hash_gate, lambda index: TopKGate(12, 4, 1, renormalise=False)])
def test_all_experts_at_once_in_training_change_neither_loss_nor_gradients(teacher, importance, answer, mix, make):
    teacher.double()
    student = become_mixture(teacher, importance, make, mix=mix).train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, BlockExperts):
            module.dropout = 0.0
    found = []
    for at_once in (False, True):
        for layer in student.encoder.encoder.layer:
            layer.mixture.moe.all_in_training = at_once
        student.zero_grad()
        given = answer(student)
        terms = sum_losses(given.trace.routings)
        (given.logits.square().sum() + sum(terms.values())).backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((given.logits.detach(), {name: float(v.detach()) for name, v in terms.items()}, gradients))
    (logits, terms, gradients), (logits_2, terms_2, gradients_2) = found
    torch.testing.assert_close(logits_2, logits, rtol=1e-6, atol=1e-8)
    assert terms_2 == pytest.approx(terms) and gradients.keys() == gradients_2.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_2[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_in_eval_mode_only_routed_experts_run_also_where_training_runs_all(teacher, importance, answer):
    student = become_mixture(teacher, importance, hash_gate)
    for layer in student.encoder.encoder.layer:
        layer.mixture.moe.all_in_training = True
    rows = rows_run(student, 0)
    n_routed = len(answer(student).trace.routings[0].weights)
    assert sum(rows) == n_routed
    del rows[:]
    answer(student.train())
    assert rows == []  # not asked expert by expert


def test_dropout_is_drawn_in_training_only(teacher, importance):
    student = become_mixture(teacher, importance, hash_gate)
    experts = student.encoder.encoder.layer[0].mixture.moe.experts
    assert experts.dropout == pytest.approx(0.1)
    x = torch.randn(64, 12)
    counts = [16] * 4
    assert torch.equal(experts.eval()(x, counts), experts(x, counts))
    assert not torch.equal(experts.train()(x, counts), experts(x, counts))
    assert not torch.equal(experts.everywhere(x), experts.everywhere(x))
    assert torch.equal(experts.eval().everywhere(x), experts.everywhere(x))


def rows_run(student, layer):
    """Rows that each expert of a layer ran on, filled at the next forward pass."""
    found = []
    experts = student.encoder.encoder.layer[layer].mixture.moe.experts

    def count(module, args):
        rows, counts = args[0].shape[0], args[1] if len(args) > 1 else None
        found.extend([rows] * module.n_experts if counts is None else counts)

    experts.register_forward_pre_hook(count)
    return found


def test_only_routed_experts_run_and_padding_runs_nowhere(teacher, importance, answer, batch):
    student = become_mixture(teacher, importance, hash_gate)
    rows = [rows_run(student, layer) for layer in range(2)]
    found = answer(student)
    ids = batch["tokens"][batch["seen"]]
    for layer in range(2):
        table = hash_gate(layer).table
        assert rows[layer] == torch.bincount(table[ids], minlength=4).tolist()
        assert sum(rows[layer]) == int(batch["seen"].sum())
        assert found.trace.routings[layer].weights.shape == (len(ids), 4)


def test_a_hash_routes_by_token_id_alone(teacher, importance, answer, batch):
    found = answer(become_mixture(teacher, importance, hash_gate))
    ids = batch["tokens"][batch["seen"]]
    for routing in found.trace.routings:
        expert = routing.weights.argmax(1)
        assert all(len(expert[ids == one].unique()) == 1 for one in ids.unique())
        assert len(expert.unique()) > 1
    first, second = (routing.weights.argmax(1) for routing in found.trace.routings)
    assert not torch.equal(first, second)  # a table of its own for each layer


def test_padding_keeps_the_output_of_attention_unless_it_is_routed(teacher, importance, answer, batch):
    plain = become_mixture(teacher, importance, comet)
    routed = become_mixture(teacher, importance, comet, route_padding=True)
    n_real, n_all = int(batch["seen"].sum()), batch["seen"].numel()
    assert len(answer(plain).trace.routings[0].weights) == n_real < n_all
    assert len(answer(routed).trace.routings[0].weights) == n_all
    a, b = answer(plain), answer(routed)
    torch.testing.assert_close(a.logits, b.logits)
    assert not torch.allclose(a.trace.hidden[1][~batch["seen"]], b.trace.hidden[1][~batch["seen"]])
    caught = []
    block = plain.encoder.encoder.layer[0].mixture
    block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    kept = answer(plain).trace.hidden[1]
    assert torch.equal(kept[~batch["seen"]], caught[0][~batch["seen"]])


@pytest.mark.parametrize("mix", ["after_norm", "before_norm"])
@pytest.mark.parametrize(
    "make",
    [
        comet,
        lambda index: DSelectKGate(12, 4, 1, gamma=1.0),
        lambda index: TopKGate(12, 4, 1, renormalise=False),
        lambda index: PermutationSearch(comet(index), 5),
    ],
)
def test_the_loss_and_the_gates_terms_reach_every_gate_and_expert(teacher, importance, answer, mix, make):
    student = become_mixture(teacher, importance, make, mix=mix).train()
    found = answer(student)
    terms = sum_losses(found.trace.routings)
    assert terms
    gates = [layer.mixture.moe.gate for layer in student.encoder.encoder.layer]
    for value in (found.logits.square().sum(), *(value for name, value in terms.items() if name != "permutation")):
        student.zero_grad()
        value.backward(retain_graph=True)
        for gate in gates:
            assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in gate.parameters())
    student.zero_grad()
    found.logits.square().sum().backward()
    for layer in student.encoder.encoder.layer:
        assert float(layer.mixture.moe.experts.w1.grad.abs().sum()) > 0


@pytest.mark.filterwarnings("ignore:local search ended undecided")
def test_weights_come_back_from_a_state_dict(teacher, importance, answer):
    first = become_mixture(teacher, importance, lambda index: PermutationSearch(comet(index), 2))
    for layer in first.encoder.encoder.layer:
        for _ in range(3):
            layer.mixture.moe.gate.permutation.advance()
    second = become_mixture(teacher, importance, lambda index: PermutationSearch(comet(index + 7), 2))
    assert not torch.equal(answer(first).logits, answer(second).logits)
    second.load_state_dict(first.state_dict())
    assert torch.equal(answer(first).logits, answer(second).logits)


def test_importance_of_another_encoder_is_refused(teacher, importance):
    with pytest.raises(ValueError, match=r"importance is of layers with \[24\] neurons, the encoder's have \[24, 24\]"):
        become_mixture(teacher, importance[:1], comet)
    with pytest.raises(ValueError, match="did you mean 'after_norm'"):
        become_mixture(teacher, importance, comet, mix="afternorm")
    with pytest.raises(ValueError, match=r"layer 0 lacks 'intermediate.dense'"):
        become_mixture(become_mixture(teacher, importance, comet), importance, comet)


# ---- without one expert


def test_tokens_of_an_expert_that_is_off_keep_the_output_of_attention(teacher, importance, answer, batch):
    student = become_mixture(teacher, importance, hash_gate)
    block = student.encoder.encoder.layer[1].mixture
    assert isinstance(block, MixtureBlock)
    seen, caught = batch["seen"], []
    block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    wanted = answer(student)
    expert = wanted.trace.routings[1].weights.argmax(1)
    with switched_off(student, 1, 2):
        found = answer(student)
    assert (expert == 2).any()
    after, before = found.trace.hidden[2][seen], wanted.trace.hidden[2][seen]
    torch.testing.assert_close(after[expert != 2], before[expert != 2])
    assert not torch.isclose(after[expert == 2], before[expert == 2]).all(1).any()
    assert torch.equal(after[expert == 2], caught[-1][seen][expert == 2])
    assert torch.equal(answer(student).logits, wanted.logits)  # on again


def test_other_experts_take_over_the_weight_of_one_that_is_off(teacher, importance, answer):
    student = become_mixture(teacher, importance, comet)
    wanted = answer(student).trace.routings[0].weights
    with switched_off(student, 0, 1):
        found = answer(student).trace.routings[0].weights
    assert (found[:, 1] == 0).all()
    torch.testing.assert_close(found.sum(1), wanted.sum(1))
    torch.testing.assert_close(found[:, 0] / found[:, 3], wanted[:, 0] / wanted[:, 3])


def test_an_expert_that_is_not_there_cannot_be_switched_off(teacher, importance):
    student = become_mixture(teacher, importance, comet)
    for place in ((2, 0), (0, 4), (-1, 0)):
        with (
            pytest.raises(ValueError, match=f"no expert {place[1]} in layer {place[0]}"),
            switched_off(student, *place),
        ):
            pass
