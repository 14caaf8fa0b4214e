"""The formula is what PyTorch's counter counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.bert import SentenceClassifier, become_mixture
from moe_lab.bert.cost import active_parameters, flops_per_token, gate_outputs, head_flops
from moe_lab.gates import CometGate, DSelectKGate, HashGate, PermutationSearch, SoftmaxGate, TopKGate

LENGTH = 9
GATES = {
    "hash": lambda index: HashGate(200, 4, seed=index),
    "topk": lambda index: TopKGate(12, 4, 2),
    "dselect_k": lambda index: DSelectKGate(12, 4, 2),
    "comet": lambda index: CometGate(12, 4, 2),
    "comet+": lambda index: PermutationSearch(CometGate(12, 4, 1), 5),
    "all": lambda index: SoftmaxGate(None, 4),
}


def counted(model, tokens):
    """FLOPs of matrix products; the counter does not know the fused attention of a CPU."""
    model.requires_grad_(False)  # the counter's module tracker asks parameters for a graph that no_grad does not build
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer = model(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return counter.get_total_flops(), answer.trace.routings


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_teacher(encoder, pool):
    model = SentenceClassifier(encoder, 3, pool=pool).eval()
    flops, _ = counted(model, torch.arange(5, 5 + LENGTH)[None])
    pooling = 0 if pool == "cls" else 2 * LENGTH * 12  # the mean is a product here; the formula leaves it out
    assert flops == LENGTH * flops_per_token(model.encoder, LENGTH) + head_flops(model) + pooling


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("mix", ["after_norm", "before_norm"])
def test_mixtures(teacher, importance, name, mix):
    student = become_mixture(teacher, importance, GATES[name], mix=mix).eval()
    flops, routings = counted(student, torch.arange(5, 5 + LENGTH)[None])
    experts = [float(routing.experts_per_token.double().mean()) for routing in routings]
    formula = LENGTH * flops_per_token(student.encoder, LENGTH, experts) + head_flops(student)
    dense = [routing for routing in routings if bool(routing.active.all())]
    combination = 2 * LENGTH * 4 * 12 * len(dense)  # the weighted sum, counted where it is one product
    assert flops == pytest.approx(formula + combination, rel=1e-12)


def test_outputs_of_gates():
    assert {name: gate_outputs(make(0)) for name, make in GATES.items()} == {
        "hash": 0,
        "topk": 4,
        "dselect_k": (2 + 1) * 2,
        "comet": (2 * 4 - 1) * 2,
        "comet+": 2 * 4 - 1,
        "all": 0,
    }


def test_active_parameters_of_the_teacher_are_all_but_the_tables(teacher):
    tables = [teacher.encoder.embeddings.word_embeddings, teacher.encoder.embeddings.position_embeddings]
    tables.append(teacher.encoder.embeddings.token_type_embeddings)
    total = sum(p.numel() for p in teacher.parameters()) - sum(table.weight.numel() for table in tables)
    assert active_parameters(teacher) == total


def test_active_parameters_of_a_mixture_count_experts_that_run(teacher, importance):
    student = become_mixture(teacher, importance, GATES["hash"], expert_width=6, shared=0)
    expert = 12 * 6 + 6 + 6 * 12 + 12 + 2 * 12
    block = 2 * 12 * 24 + 24 + 12 + 2 * 12  # what it replaces
    assert active_parameters(student, [1, 1]) == active_parameters(teacher) - 2 * (block - expert)
    assert active_parameters(student, [1, 2.5]) == active_parameters(student, [1, 1]) + 1.5 * expert


def test_numbers_for_another_number_of_layers_are_refused(teacher):
    with pytest.raises(ValueError, match="3 numbers of experts per token for 2 layers"):
        flops_per_token(teacher.encoder, 9, [1, 1, 1])
