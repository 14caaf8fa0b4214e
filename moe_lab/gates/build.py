"""Gates by name: what experiments, sweeps and notebooks type.

A trailing ``+`` adds permutation-based local search ("COMET+", "Hash-r+" in the paper).
"""

from __future__ import annotations

import difflib

import torch

from moe_lab.gates.base import Gate
from moe_lab.gates.comet import CometGate
from moe_lab.gates.dselect_k import DSelectKGate
from moe_lab.gates.hashed import HashGate
from moe_lab.gates.local_search import Permutation, PermutationSearch
from moe_lab.gates.softmax import SoftmaxGate
from moe_lab.gates.topk import TopKGate

GATE_NAMES = ("softmax", "topk", "hash", "hash_balanced", "dselect_k", "comet")


def check_gate_name(name: str) -> None:
    """Raise ValueError with the nearest valid name if ``name`` (with or without ``+``) is not a gate."""
    if name.removesuffix("+") not in GATE_NAMES:
        near = difflib.get_close_matches(name.removesuffix("+"), GATE_NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown gate {name!r}{hint} Valid: {', '.join(GATE_NAMES)}; add '+' for local search.")


def build_gates(
    name: str,
    n_gates: int,
    *,
    in_features: int | None,
    n_experts: int,
    k: int,
    gamma: float = 1.0,
    noise: bool = False,
    n_keys: int | None = None,
    seed: int = 0,
    permutation_steps: int | None = None,
    schedule: str = "default",
) -> list[Gate]:
    """One gate per task; with ``+`` all of them share one permutation, as in the paper.

    Args:
        name: one of `GATE_NAMES`, optionally with ``+``.
        n_gates: number of tasks. Each gate starts from its own weights; hash gates share one table.
        in_features: width of the gate input (ignored by hash gates), None for static gates.
        n_experts: E.
        k: trees, selectors or chosen experts (ignored by softmax and hash).
        gamma: smooth-step width (COMET, DSelect-k).
        noise: learned noise on the logits in training (top-k).
        n_keys: number of keys, needed by hash gates.
        seed: of weights, table and permutation.
        permutation_steps: length of the search in optimiser steps, needed with ``+``.
        schedule: temperature schedule of the search.

    Raises:
        ValueError: unknown name, or an argument that this gate needs is missing.
    """
    check_gate_name(name)
    base = name.removesuffix("+")
    generator = torch.Generator().manual_seed(seed)
    if base.startswith("hash"):
        if n_keys is None:
            raise ValueError("a hash gate needs n_keys, the number of users or token ids it may be called with")
        gates = [HashGate(n_keys, n_experts, balanced=base == "hash_balanced", seed=seed) for _ in range(n_gates)]
    else:
        make = {
            "softmax": lambda: SoftmaxGate(in_features, n_experts, generator=generator),
            "topk": lambda: TopKGate(in_features, n_experts, k, noise=noise, generator=generator),
            "dselect_k": lambda: DSelectKGate(in_features, n_experts, k, gamma, generator=generator),
            "comet": lambda: CometGate(in_features, n_experts, k, gamma, generator=generator),
        }[base]
        gates = [make() for _ in range(n_gates)]
    if name.endswith("+"):
        if permutation_steps is None:
            raise ValueError(f"{name!r} needs permutation_steps, the length of the local search in optimiser steps")
        permutation = Permutation(n_experts, permutation_steps, schedule=schedule, generator=generator)
        gates = [PermutationSearch(gate, permutation=permutation) for gate in gates]
    return gates


def build_gate(name: str, **options) -> Gate:
    """A single gate; options as in `build_gates`."""
    return build_gates(name, 1, **options)[0]
