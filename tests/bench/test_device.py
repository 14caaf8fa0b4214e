"""Timing on a device, here the CPU; a CUDA graph only where there is CUDA."""

from __future__ import annotations

import pytest
import torch

from moe_lab.bench.device import captured, circumstances, device_turns, peak

CUDA = torch.cuda.is_available()


def test_on_a_cpu_each_case_gets_its_turns_and_has_no_peak():
    calls = {"a": 0, "b": 0}

    def step(name):
        calls[name] += 1

    timings = device_turns({name: lambda name=name: step(name) for name in calls}, "cpu", rounds=2, n_steps=3)
    assert {name: len(timing.wall) for name, timing in timings.items()} == {"a": 6, "b": 6}
    assert calls == {"a": 9, "b": 9}  # once to warm up, and once not timed in each round
    assert peak(lambda: None, "cpu") is None


def test_versions_are_named():
    found = circumstances("cpu")
    assert found["torch"] == torch.__version__ and {"device", "commit", "cuda", "triton"} <= set(found)


@pytest.mark.skipif(CUDA, reason="there is CUDA")
def test_without_cuda_nothing_is_captured():
    with pytest.raises(RuntimeError, match="needs CUDA"):
        captured(lambda: None)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_step_reads_its_inputs_anew():
    x = torch.ones(8, device="cuda")
    replay = captured(lambda: x * 2)
    x.fill_(3)
    assert replay().tolist() == [6.0] * 8
    assert peak(lambda: torch.empty(2**20, dtype=torch.uint8, device="cuda"), "cuda") >= 1
    assert len(device_turns({"a": replay}, "cuda", 2, 3)["a"].wall) == 6
