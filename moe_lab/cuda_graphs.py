"""Capturing CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: object | None = None) -> Iterator[None]:
    """`torch.cuda.graph`, with cuBLAS workspaces that belong to this graph alone.

    PyTorch keeps one workspace per handle and stream, and all captures share a stream: a graph would work in memory of
    the pool of an earlier one. Once that graph is gone and somebody has the workspaces cleared (CUDA graphs inside
    ``torch.compile(mode="reduce-overhead")`` do), the memory is given back, and the later graph ends in a launch
    failure (our explanation of a benchmark that ended so; not yet reproduced by itself). So workspaces are made anew
    inside this graph's pool, and nobody uses them after it. Graphs that were captured before, without this, may lose
    theirs.

    Args:
        graph: to be captured.
        pool: of `torch.cuda.graph_pool_handle`, for graphs that share memory.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # no public name
    clear()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        clear()
