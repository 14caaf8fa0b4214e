"""ScatterMoE (Tan et al. 2024, github.com/shawntan/scattermoe), timed beside us where it can be imported.

It is another package, in no registry: clone it and name the folder that holds ``scattermoe/``, with ``--scattermoe``.
Without it, on a CPU, or for experts with biases, the case is left out.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch.nn import functional

from moe_lab.bench.gpu_problem import Problem, Step
from moe_lab.triton_support import usable


def add_path(folder: Path | str) -> None:
    """Let ``import scattermoe`` find the package in this folder.

    Raises:
        ValueError: it is not there.
    """
    folder = Path(folder).resolve()
    if not (folder / "scattermoe" / "mlp.py").is_file():
        raise ValueError(f"{folder} has no scattermoe/mlp.py: name the folder of a clone of shawntan/scattermoe")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def version() -> str | None:
    """Of the package that would be imported: "unknown" without metadata (a clone), None without a package."""
    if importlib.util.find_spec("scattermoe") is None:
        return None
    try:
        return metadata.version("scattermoe")
    except metadata.PackageNotFoundError:
        return "unknown"


def runs_on(x: torch.Tensor) -> bool:
    """It is there, and its kernels (all of them Triton's) can run on x."""
    return version() is not None and usable(x)


def scattermoe_step(p: Problem) -> Step:
    """Forward and backward of its MLP, with the weights of the problem (which it keeps as (E, out, in)).

    Its routing is a pair too, (T, K) weights and experts; the weights must be of the dtype of x. The order of pairs is
    found inside, as in ours.
    """
    from scattermoe.mlp import MLP

    mlp = MLP(
        input_size=p.shape.width, hidden_size=p.shape.hidden, num_experts=p.shape.experts, top_k=p.shape.k,
        activation=getattr(functional, p.activation),
    ).to(p.x.device, p.x.dtype)  # fmt: skip
    with torch.no_grad():
        mlp.experts.weight.copy_(p.w1.transpose(1, 2))
        mlp.output_experts.weight.copy_(p.w2.transpose(1, 2))
    leaves = [p.x, p.values, mlp.experts.weight, mlp.output_experts.weight]
    step = p.step(lambda: mlp(p.x, p.values.to(p.x.dtype), p.experts), leaves)

    def run() -> list[torch.Tensor]:
        y, grad_x, grad_values, grad_w1, grad_w2 = step()
        return [y, grad_x, grad_values, grad_w1.transpose(1, 2), grad_w2.transpose(1, 2)]

    return run
