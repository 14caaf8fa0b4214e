"""The adapter of ScatterMoE, against a package of the same signatures written in plain torch."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from moe_lab.bench import gpu_scattermoe
from moe_lab.bench.gpu_moe import moe_cases
from moe_lab.bench.gpu_problem import Problem, Shape, error, expected

FAKE = """
import torch
from torch import nn

class Experts(nn.Module):
    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, output_size, input_size))

class MLP(nn.Module):
    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        assert not bias
        self.experts = Experts(num_experts, input_size, hidden_size)
        self.output_experts = Experts(num_experts, hidden_size, input_size)
        self.top_k, self.activation = top_k, activation

    def forward(self, x, expert_p, expert_idxs):
        assert expert_p.dtype == x.dtype and expert_idxs.shape == expert_p.shape == (len(x), self.top_k)
        rows = x.repeat_interleave(self.top_k, 0)[:, :, None]
        w1, w2 = (part.weight[expert_idxs.flatten()] for part in (self.experts, self.output_experts))
        out = (w2 @ self.activation(w1 @ rows)).reshape(len(x), self.top_k, -1)
        return (expert_p.unsqueeze(1) @ out).squeeze(1)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "scattermoe").mkdir()
    (tmp_path / "scattermoe" / "__init__.py").touch()
    (tmp_path / "scattermoe" / "mlp.py").write_text(FAKE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "scattermoe"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.skipif(gpu_scattermoe.version() is not None, reason="the real one can be imported")
@pytest.mark.parametrize("k", [1, 2])
def test_a_package_of_these_signatures_computes_our_layer_in_outputs_and_all_gradients(fake, k, monkeypatch):
    gpu_scattermoe.add_path(fake)
    assert gpu_scattermoe.version() == "unknown"
    problem = Problem(Shape(24, 8, 16, 4, k), "cpu", torch.float32)
    monkeypatch.setattr(gpu_scattermoe, "usable", lambda x: False)  # of the real one: all of it runs in Triton
    assert "ScatterMoE" not in moe_cases(problem, compiled=False)
    monkeypatch.setattr(gpu_scattermoe, "usable", lambda x: True)
    cases = moe_cases(problem, compiled=False)
    assert error(problem, cases["ScatterMoE"].prepare()(), expected(problem)) < 1e-5
    assert "ScatterMoE" not in moe_cases(Problem(Shape(24, 8, 16, 4, k), "cpu", bias=True), compiled=False)


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="clone of shawntan/scattermoe"):
        gpu_scattermoe.add_path(tmp_path)
    assert str(tmp_path) not in sys.path


def test_without_the_package_there_is_no_such_case(monkeypatch):
    monkeypatch.setattr(gpu_scattermoe, "usable", lambda x: True)
    monkeypatch.setattr(gpu_scattermoe, "version", lambda: None)
    assert "ScatterMoE" not in moe_cases(Problem(Shape(24, 8, 16, 4, 2), "cpu"), compiled=False)
