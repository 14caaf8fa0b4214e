"""The feed-forward blocks of an encoder become mixtures of experts (COMET-BERT; the split is MoEBERT's).

Legend: B batch, S sequence, D width, F hidden neurons of the teacher, E experts, W neurons of an expert, L layers.

Split. Neurons are sorted by importance. The first ``shared`` are in every expert; the others are dealt in turns, and
each expert keeps the first W - shared of its hand. BERT-base: F = 3,072, E = 4, W = 768 = F/4, shared = 512 = F/6:
1,536 neurons survive, the least important half is dropped, and a token pays for a quarter.

Mix, with a the output of attention and g the gate's weights for the token:

    "after_norm"    y = sum_e g_e LayerNorm_e(a + dropout(z_e(a)))         the paper's
    "before_norm"   y = LayerNorm(a + dropout(sum_e g_e z~_e(a)))          z~: columns of W_2 times E / m_h

m_h is the number of experts that have neuron h: with equal weights g = 1/E every neuron that survives then counts once.

When is the mixture the teacher? (Tested, in eval mode, to rounding.)

* "before_norm" with equal weights g_e = 1/E, all experts running (k = E), and no neuron dropped, that is
  shared + E (W - shared) = F. Shared neurons or none.
* Either mix, if every expert is the whole layer (W = shared = F), whatever the weights g, as long as they sum to 1.
* "after_norm" with experts that differ is never the teacher, not at k = E either: a mean of normalised vectors is not
  the norm of a mean.

Padding is not routed: it keeps the output of attention, which nothing reads. ``route_padding`` does as the authors'
code. Where we differ: their experts all run on every token; here only those that are routed to, except in training on a
GPU: there all of them at once are faster (`BlockExperts.everywhere`), with the same outputs and gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_lab.bert.encoder import check_layout
from moe_lab.bert.experts import BlockExperts
from moe_lab.experts import MoE
from moe_lab.gates import Gate
from moe_lab.models.transformer import MixtureFeedForward
from moe_lab.names import check_name
from moe_lab.routing import Routing

MIXES = ("after_norm", "before_norm")


def widths(
    n_neurons: int, n_experts: int, expert_width: int | None = None, shared: int | None = None
) -> tuple[int, int]:
    """(W, shared), by the paper's ratios where None: F/E, and F/6 rounded down but at most W.

    Raises:
        ValueError: F is not divisible by E and no width is given; numbers that cannot be.
    """
    if n_experts < 1:
        raise ValueError(f"n_experts must be at least 1, got {n_experts}")
    if expert_width is None:
        if n_neurons % n_experts:
            low = n_neurons // n_experts
            raise ValueError(
                f"{n_experts} experts do not divide the {n_neurons} neurons of a layer: give expert_width; "
                f"{low} drops the {n_neurons - n_experts * low} least important ones (with shared=0)"
            )
        expert_width = n_neurons // n_experts
    if not 1 <= expert_width <= n_neurons:
        raise ValueError(f"expert_width must be between 1 and {n_neurons}, got {expert_width}")
    shared = min(n_neurons // 6, expert_width) if shared is None else shared
    if not 0 <= shared <= expert_width:
        raise ValueError(f"shared must be between 0 and expert_width = {expert_width}, got {shared}")
    if n_experts * (expert_width - shared) > n_neurons - shared:
        most = shared + (n_neurons - shared) // n_experts
        raise ValueError(
            f"{n_experts} experts of width {expert_width} with {shared} shared neurons need more than the {n_neurons} "
            f"there are; expert_width can be at most {most}, or share more"
        )
    return expert_width, shared


def split_neurons(
    importance: Tensor, n_experts: int, expert_width: int | None = None, shared: int | None = None
) -> Tensor:
    """(E, W) int64: the neurons of each expert, the most important first.

    Args:
        importance: (F,); equal values in the order of their index.
        n_experts, expert_width, shared: E, W, see `widths`.

    Raises:
        ValueError: as `widths`.
    """
    expert_width, shared = widths(len(importance), n_experts, expert_width, shared)
    order = importance.argsort(descending=True, stable=True)
    own = expert_width - shared
    dealt = order[shared : shared + n_experts * own].view(own, n_experts).T
    return torch.cat([order[:shared].expand(n_experts, -1), dealt], 1)


class _BlockMoE(MoE):
    """A `MoE` that in training may run all experts on all tokens: no expert waits until it is known who needs it.

    Attributes:
        all_in_training: None: on a GPU only.
    """

    all_in_training: bool | None = None

    def forward(self, x: Tensor, gate_input: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Routing]:
        at_once = x.is_cuda if self.all_in_training is None else self.all_in_training
        if not (self.training and at_once):
            return super().forward(x, gate_input)
        routing = self.gate(x if gate_input is None else gate_input)
        found = self.experts.everywhere(x)
        with torch.autocast(x.device.type, enabled=False):  # sums in float32 at least, as in `combine_experts`
            precise = torch.promote_types(found.dtype, torch.float32)
            y = (routing.weights.to(precise).T.unsqueeze(-1) * found.to(precise)).sum(0)
        return y.to(found.dtype), routing


class MixtureBlock(MixtureFeedForward):
    """A gate, a bank, and what follows: stands where a layer's feed-forward block stood.

    Args:
        gate: over D features or token ids.
        experts: with norms of their own ("after_norm"), or without.
        norm: "before_norm": the layer's norm; None: the experts have theirs.
        dropout: "before_norm": behind the mixture.
        route_padding: padding is routed like other tokens.
    """

    def __init__(
        self,
        gate: Gate,
        experts: BlockExperts,
        norm: nn.LayerNorm | None = None,
        dropout: float = 0.0,
        route_padding: bool = False,
    ):
        nn.Module.__init__(self)  # the experts are given, not made anew
        self.moe = _BlockMoE(gate, experts)
        self.norm, self.dropout, self.route_padding = norm, nn.Dropout(dropout), route_padding

    def forward(self, x: Tensor, keys: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Routing]:
        """a (B, S, D), token ids (B, S), real tokens (B, S) -> y (B, S, D), Routing of the tokens that were routed."""
        where = None if self.route_padding else seen
        y, routing = super().forward(x, keys, where)
        if self.norm is not None:
            y = self.norm(x + self.dropout(y))
        elif isinstance(self.moe.gate, _Without):  # who has no expert left skips the block
            has_expert = (routing.weights != 0).any(1)
            where = torch.ones_like(keys, dtype=torch.bool) if where is None else where
            where = where.flatten().masked_scatter(where.flatten(), has_expert).view(where.shape)
        return (y if where is None else torch.where(where.unsqueeze(-1), y, x)), routing


def _bank(layer: nn.Module, neurons: Tensor, mix: str) -> BlockExperts:
    first, second = layer.intermediate.dense, layer.output.dense
    neurons = neurons.to(first.weight.device)
    n_experts = len(neurons)
    w2 = second.weight.T[neurons]  # (E, W, D)
    if mix == "before_norm":
        times = torch.bincount(neurons.flatten(), minlength=first.out_features)
        w2 = w2 * (n_experts / times[neurons]).unsqueeze(-1)
    weights = (first.weight[neurons].transpose(1, 2), first.bias[neurons], w2, second.bias.expand(n_experts, -1))
    after = {"norm": layer.output.LayerNorm, "dropout": layer.output.dropout.p} if mix == "after_norm" else {}
    return BlockExperts(weights, layer.intermediate.intermediate_act_fn, **after)


@torch.no_grad()
def become_mixture(
    model: nn.Module,
    importance: Sequence[Tensor],
    make_gate: Callable[[int], Gate],
    *,
    expert_width: int | None = None,
    shared: int | None = None,
    mix: str = "after_norm",
    route_padding: bool = False,
) -> nn.Module:
    """A copy of the model, in its mode, with a mixture in every layer; its other weights are the teacher's.

    Args:
        model: with an ``encoder`` in `check_layout`'s shape.
        importance: L tensors (F,).
        make_gate: index of the layer -> its gate; E is what it says.
        expert_width, shared: see `widths`.
        mix: see the module's text.
        route_padding: see `MixtureBlock`.

    Raises:
        ValueError: importance of another number of layers or neurons; as `widths`; an unknown ``mix``.
    """
    check_name("mix", mix, MIXES)
    check_layout(model.encoder)
    layers = model.encoder.encoder.layer
    sizes = [layer.intermediate.dense.out_features for layer in layers]
    if [len(each) for each in importance] != sizes:
        found = [len(each) for each in importance]
        raise ValueError(f"importance is of layers with {found} neurons, the encoder's have {sizes}")
    student = copy.deepcopy(model)
    for index, layer in enumerate(student.encoder.encoder.layer):
        gate = make_gate(index)
        neurons = split_neurons(importance[index], gate.n_experts, expert_width, shared)
        experts = _bank(layer, neurons, mix)
        outside = {} if mix == "after_norm" else {"norm": layer.output.LayerNorm, "dropout": layer.output.dropout.p}
        layer.mixture = MixtureBlock(gate, experts, route_padding=route_padding, **outside).train(layer.training)
        del layer.intermediate, layer.output
    return student.to(next(model.parameters()).device)


class _Without(Gate):
    """A gate one of whose experts is not there: the others take over its weight in their proportions."""

    def __init__(self, gate: Gate, expert: int):
        super().__init__(gate.n_experts, gate.k, gate.in_features)
        self.gate, self.expert, self.gate_input = gate, expert, gate.gate_input

    def forward(self, x: Tensor | None = None) -> Routing:
        routing = self.gate(x)
        left = routing.weights.clone()
        left[:, self.expert] = 0
        mass, rest = routing.weights.sum(1, keepdim=True), left.sum(1, keepdim=True)
        return Routing(torch.where(rest > 0, left * mass / rest.clamp(min=1e-30), 0.0), routing.losses, routing.details)


@contextmanager
def switched_off(model: nn.Module, layer: int, expert: int) -> Iterator[None]:
    """Inside the block one expert is gone: its tokens go to their other experts, or keep the output of attention.

    Args:
        model: with an ``encoder`` of mixtures.
        layer, expert: counted from 0.

    Raises:
        ValueError: there is no such expert.
    """
    mixtures = [each.mixture for each in model.encoder.encoder.layer]
    if not 0 <= layer < len(mixtures) or not 0 <= expert < mixtures[layer].moe.experts.n_experts:
        raise ValueError(f"no expert {expert} in layer {layer}: {len(mixtures)} layers, counted from 0")
    gates = mixtures[layer].moe.mixture.gates
    before = gates[0]
    try:
        gates[0] = _Without(before, expert).train(before.training)
        yield
    finally:
        gates[0] = before
