"""Workspaces are cleared around a capture; on CUDA a graph outlives those that were captured before it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from moe_lab.cuda_graphs import capturing


@pytest.fixture
def seen(monkeypatch):
    """What happens around a capture, in order; the capture itself is imitated."""
    events = []

    @contextmanager
    def capture(graph, pool=None):
        events.append((graph, pool))
        yield
        events.append("captured")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: events.append("clear"), raising=False)
    return events


def test_workspaces_are_cleared_before_and_after(seen):
    with capturing("graph", "pool"):
        seen.append("step")
    assert seen == ["clear", ("graph", "pool"), "step", "captured", "clear"]


def test_a_step_that_cannot_be_captured_leaves_no_workspace_either(seen):
    with pytest.raises(RuntimeError, match="waits"), capturing("graph"):
        raise RuntimeError("waits")
    assert seen == ["clear", ("graph", None), "clear"]


def test_a_pytorch_without_the_function_captures_as_before(seen, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    with capturing("graph"):
        pass
    assert seen == [("graph", None), "captured"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_outlives_an_earlier_one_and_cleared_workspaces():
    x, w = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def captured():
        graph = torch.cuda.CUDAGraph()
        x @ w
        with capturing(graph):
            y = x @ w
        return graph, y

    first = captured()
    second, y = captured()
    del first
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    for _ in range(3):
        second.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, x @ w)
