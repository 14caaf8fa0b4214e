"""The multi-digit classifier: the paper's size and what its gates see."""

from __future__ import annotations

import pytest
import torch

from moe_lab.gates import CometGate, HashGate, TopKGate
from moe_lab.models import MultiDigitClassifier


def test_multimnist_model_has_the_size_of_the_paper_s_architecture():
    """Experts 16 * (260 + 5020 + 36050 + 2550); heads 2 * (2550 + 2550 + 510); gates 2 * 31 * 4 * 1297."""
    model = MultiDigitClassifier([CometGate(1296, 16, 4) for _ in range(2)], 36)
    expected = 16 * (260 + 5020 + 36050 + 2550) + 2 * (2550 + 2550 + 510) + 2 * 31 * 4 * 1297
    assert sum(p.numel() for p in model.parameters()) == expected


def test_gates_see_the_flattened_pixels_divided_by_255():
    torch.manual_seed(0)
    gates = [TopKGate(144, 4, 2), TopKGate(144, 4, 2)]
    model = MultiDigitClassifier(gates, 12, channels=(3, 4), kernel=3, dense=(8,), head=(8,))
    image = torch.randint(0, 511, (5, 1, 12, 12), dtype=torch.int16)
    logits, routings = model(image)
    assert [tuple(scores.shape) for scores in logits] == [(5, 10), (5, 10)]
    for gate, routing in zip(gates, routings, strict=True):
        torch.testing.assert_close(routing.weights, gate(image.flatten(1).float() / 255).weights)


def test_bytes_and_floats_of_the_same_image_give_the_same_logits():
    torch.manual_seed(0)
    model = MultiDigitClassifier([TopKGate(100, 3, 2)], 10, n_tasks=1, kernel=3, dense=(8,), head=())
    image = torch.randint(0, 256, (4, 1, 10, 10), dtype=torch.uint8)
    torch.testing.assert_close(model(image)[0], model(image.float())[0])


def test_hash_gates_need_keys():
    model = MultiDigitClassifier([HashGate(9, 3)], 10, n_tasks=1, kernel=3, dense=(8,), head=())
    image = torch.zeros(4, 1, 10, 10)
    with pytest.raises(ValueError, match="keys"):
        model(image)
    _, (routing,) = model(image, keys=torch.arange(4))
    assert torch.equal(routing.weights.argmax(1), model.moe.gates[0].table[:4])


def test_a_gate_per_task_is_required():
    with pytest.raises(ValueError, match="2 tasks"):
        MultiDigitClassifier([TopKGate(1296, 4, 2)], 36)
