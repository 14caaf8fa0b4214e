"""One expert becomes many (EvoMoE, the expert-diversify phase).

Legend: E experts; W_0 a weight matrix of the trained expert, M_e a mask, rho the mask ratio, sigma the noise.

    W_e = M_e * W_0  [/ (1 - rho) with ``rescale``] + sigma * std(W_0) * N(0, 1),   M_e ~ Bernoulli(1 - rho),
    independent

on weight matrices only; biases are copied. rho = sigma = 0 gives E copies, which stay equal for ever under a gate that
treats them alike: something must break the symmetry. ``neurons`` restarts a share of hidden units, in- and outgoing
weights together, for experts of two layers and more.

Optimiser state of the new experts (``state``): "reset": gone; with Adam's bias correction the first step then moves
every weight by about the learning rate, a jolt even for copies. "copy": m_e = M_e * m_0, v_e = v_0. "copy_v": v_e =
v_0, m_e = 0; a v of one expert that saw all tokens slows N experts down that see fewer. The paper does not say; its
public code has no such phase at all.

`spawn_experts` makes a new bank. `Evolution` does the same inside a model during training: the bank has all its E
experts from the start, in the shared phase only expert 0 is used, so the shapes, and with them checkpoints, never
change.

Taught in notebook 08.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.experts.base import ExpertBank

STATES = ("reset", "copy", "copy_v")


def check_diversity(mask_ratio: float, noise: float, neurons: float) -> None:
    """ValueError for ratios outside [0, 1] or negative noise."""
    for name, value in (("mask_ratio", mask_ratio), ("neurons", neurons)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share, in [0, 1]; got {value}")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")


def _matrices(bank: ExpertBank) -> list[nn.Parameter]:
    """The stacked weights that are masked: everything of at least two dimensions per expert."""
    return [parameter for parameter in bank.parameters() if parameter.dim() > 2]


@torch.no_grad()
def diversify_(
    bank: ExpertBank,
    *,
    source: int = 0,
    mask_ratio: float = 0.0,
    noise: float = 0.0,
    neurons: float = 0.0,
    rescale: bool = False,
    generator: torch.Generator | None = None,
) -> dict[nn.Parameter, Tensor]:
    """Overwrite all experts of a bank by diverse versions of expert ``source``, in place.

    Returns:
        parameter -> mask (E, ...) of what was kept (1 everywhere for biases).

    Raises:
        ValueError: a ratio outside [0, 1]; ``neurons`` for experts without hidden layer.
    """
    check_diversity(mask_ratio, noise, neurons)
    masks: dict[nn.Parameter, Tensor] = {}
    for parameter in bank.parameters():
        original = parameter[source].clone()
        mask = torch.ones_like(parameter)
        new = original.expand_as(parameter).clone()
        if parameter.dim() > 2:
            if mask_ratio:
                draw = torch.empty_like(parameter).uniform_(generator=generator)
                mask = (draw >= mask_ratio).to(parameter.dtype)
                new *= mask
                if rescale and mask_ratio < 1:
                    new /= 1 - mask_ratio
            if noise:
                new += noise * original.std() * torch.empty_like(parameter).normal_(generator=generator)
        masks[parameter] = mask
        parameter.copy_(new)
    if neurons:
        _restart_neurons(bank, neurons, generator)
    return masks


def _restart_neurons(bank: ExpertBank, share: float, generator: torch.Generator | None) -> None:
    matrices = [matrix for matrix in _matrices(bank) if matrix.dim() == 3]
    if len(matrices) < 2:
        raise ValueError("neurons needs experts with a hidden layer (two weight matrices); use mask_ratio or noise")
    for incoming, outgoing in itertools.pairwise(matrices):
        chosen = torch.empty(incoming.shape[0], incoming.shape[2], device=incoming.device).uniform_(generator=generator)
        chosen = chosen < share  # (E, hidden units)
        for matrix, where in ((incoming, chosen.unsqueeze(1)), (outgoing, chosen.unsqueeze(2))):
            bound = (6 / (matrix.shape[1] + matrix.shape[2])) ** 0.5
            fresh = torch.empty_like(matrix).uniform_(-bound, bound, generator=generator)
            matrix.copy_(torch.where(where, fresh, matrix))


def spawn_experts(
    expert: ExpertBank,
    n: int,
    *,
    source: int = 0,
    mask_ratio: float = 0.0,
    noise: float = 0.0,
    neurons: float = 0.0,
    rescale: bool = False,
    generator: torch.Generator | None = None,
) -> ExpertBank:
    """A new bank of ``n`` diverse versions of one trained expert; the given bank is unchanged.

    Args:
        expert: a bank of any size.
        n: number of experts to make, at least 1.
        source: which expert of the bank.
        mask_ratio, noise, neurons, rescale, generator: see the module's text.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= source < expert.n_experts:
        raise ValueError(f"source must be 0 .. {expert.n_experts - 1}, got {source}")
    bank = copy.deepcopy(expert)
    for module in bank.modules():
        if hasattr(module, "n_experts"):  # banks may contain banks (a convolutional expert's dense layers)
            module.n_experts = n
        for name, parameter in list(module.named_parameters(recurse=False)):
            stacked = parameter.detach()[source].expand(n, *parameter.shape[1:]).clone()
            setattr(module, name, nn.Parameter(stacked, parameter.requires_grad))
    diversify_(bank, mask_ratio=mask_ratio, noise=noise, neurons=neurons, rescale=rescale, generator=generator)
    return bank


@torch.no_grad()
def carry_state(optimizer: Optimizer, masks: dict[nn.Parameter, Tensor], state: str, source: int = 0) -> None:
    """Give the spawned experts their optimiser state: "reset", "copy" or "copy_v" of expert ``source``'s.

    Stacked tensors of the parameter's shape (Adam's ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``; SGD's
    ``momentum_buffer``) are handled; scalars (``step``) are kept by the copies. Parameters that this optimiser does not
    have, or has no state for, are left alone.
    """
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}; got {state!r}")
    for parameter, mask in masks.items():
        known = optimizer.state.get(parameter)
        if not known:
            continue
        if state == "reset":
            del optimizer.state[parameter]
            continue
        for name, value in known.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            first_moment = name in ("exp_avg", "momentum_buffer")
            if first_moment and state == "copy_v":
                value.zero_()
            else:
                value.copy_(value[source].clone().expand_as(value) * (mask if first_moment else 1))


class Evolution(nn.Module):
    """Spawns the experts of a bank at a stated step of training. Put it into the model beside gate and bank.

    Until then the gate must use expert ``source`` only (`DenseToSparseGate(shared_steps=...)` does).

    Args:
        bank: the experts; shared with the model, not registered twice.
        shared_steps: optimiser steps before the spawn; 0: spawn never (the bank's own start is diverse).
        mask_ratio, noise, neurons, rescale: see the module's text.
        state: of the optimisers given to ``attach``.
        seed: of masks and noise: a run that is resumed before the spawn draws the same.

    Attributes:
        spawned: whether it has happened.
    """

    def __init__(
        self,
        bank: ExpertBank,
        shared_steps: int,
        *,
        mask_ratio: float = 0.1,
        noise: float = 0.0,
        neurons: float = 0.0,
        rescale: bool = False,
        state: str = "reset",
        seed: int = 0,
    ):
        super().__init__()
        check_diversity(mask_ratio, noise, neurons)
        if state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}; got {state!r}")
        if shared_steps < 0:
            raise ValueError(f"shared_steps must not be negative, got {shared_steps}")
        self._bank = [bank]  # in a list: not a sub-module, its parameters belong to the MoE layer
        self._optimizers: list[Optimizer] = []
        self.shared_steps, self.state, self.seed = shared_steps, state, seed
        self.options = {"mask_ratio": mask_ratio, "noise": noise, "neurons": neurons, "rescale": rescale}
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(Evolution._after_load)
        self._n_steps = 0

    def attach(self, optimizers: Optimizer | Iterable[Optimizer]) -> None:
        """Tell it whose state has to follow the spawn."""
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)

    def _after_load(self, _) -> None:
        self._n_steps = int(self.step)

    @property
    def spawned(self) -> bool:
        """The experts have been spawned."""
        return 0 < self.shared_steps <= self._n_steps

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done; after the last of the shared phase the experts are spawned."""
        self.step += 1
        self._n_steps += 1
        if self._n_steps != self.shared_steps:
            return
        device = next(self._bank[0].parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        masks = diversify_(self._bank[0], generator=generator, **self.options)
        for optimizer in self._optimizers:
            carry_state(optimizer, masks, self.state)


@torch.no_grad()
def expert_distances(bank: ExpertBank, x: Tensor) -> dict[str, Tensor]:
    """How far apart experts are, in parameters and in what they say.

    Args:
        bank: the experts.
        x: (T, ...) probe inputs.

    Returns:
        ``parameter`` (E, E): 1 - cosine of the flattened weights. ``function`` (E, E): root mean square of f_i - f_j
        over the probes, divided by that of all outputs. Both 0 on the diagonal and for copies.
    """
    flat = torch.cat([parameter.flatten(1).double() for parameter in bank.parameters()], 1)
    flat = torch.nn.functional.normalize(flat, dim=1)
    outputs = torch.stack([bank.single(expert, x).double() for expert in range(bank.n_experts)]).flatten(1)
    scale = outputs.square().mean().sqrt().clamp(min=1e-300)
    function = torch.cdist(outputs, outputs) / outputs.shape[1] ** 0.5 / scale
    return {"parameter": (1 - flat @ flat.T).clamp(min=0), "function": function}
