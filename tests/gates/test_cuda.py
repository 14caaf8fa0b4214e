"""The same gates on a GPU: weights, zeros and gradients agree with the CPU; compiled too."""

import copy

import pytest
import torch

from moe_lab.gates import GATE_NAMES, build_gate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIONS = {"in_features": 32, "k": 2, "n_keys": 100, "permutation_steps": 5}


def both(name, n_experts):
    gate = build_gate(name, n_experts=n_experts, **OPTIONS)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.mul_(30)  # some splits saturate: the exact zeros must agree as well
    keys = name.startswith("hash")
    x = torch.arange(100) if keys else torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    return gate, copy.deepcopy(gate).cuda(), x


@pytest.mark.parametrize("name", [*GATE_NAMES, "comet+", "topk+"])
@pytest.mark.parametrize("n_experts", [5, 16])
def test_cpu_and_gpu_agree(name, n_experts):
    cpu, gpu, x = both(name, n_experts)
    here, there = cpu(x), gpu(x.cuda())
    assert torch.allclose(there.weights.cpu(), here.weights, atol=1e-5)
    assert (there.active.cpu() != here.active).float().mean() < 1e-3
    for routing in (here, there):
        (routing.weights.square().sum() + sum(routing.losses.values())).backward() if routing.losses else None
    for one, two in zip(cpu.parameters(), gpu.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(two.grad.cpu(), one.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["softmax", "topk", "dselect_k", "comet"])
def test_compiled_on_a_gpu_equals_eager(name):
    _, gpu, x = both(name, 16)
    compiled = torch.compile(gpu, fullgraph=True)
    assert torch.allclose(compiled(x.cuda()).weights, gpu(x.cuda()).weights, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "topk", "dselect_k", "comet"])
def test_autocast_on_a_gpu_leaves_rows_summing_to_one(name):
    _, gpu, x = both(name, 16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        weights = gpu(x.cuda()).weights
    assert weights.dtype == torch.float32
    assert ((weights.sum(-1) - 1).abs() <= 1e-6).all()
