"""What an encoder costs per token, counted from its sizes: FLOPs of a forward pass, and weights that take part in it.

Legend: d width, F hidden neurons of the teacher, W of an expert, S tokens of the sequence, E experts, k-bar_l mean
number of experts that run on a token in layer l (measured), K trees or selectors. Multiply-add = 2 FLOPs.

    attention       8 d^2 + 4 S d               query, key, value, out; Q K' and A V; per layer
    feed-forward    4 d F                       a layer without a mixture
    mixture         gate + k-bar_l 4 d W        E k-bar_l terms, one for each expert that runs
    gate            2 d outputs                 outputs: E top-k and softmax; (2 E - 1) K COMET (splits, leaves);
                                                (ceil(log2 E) + 1) K DSelect-k; 0 hash, static gates
    head            2 d Y + 2 d^2 (pooler)      per *sentence*

Left out, as in `moe_lab.metrics.flops`: embeddings (a table is read, not multiplied), norms, activations, softmaxes,
pooling, and the weighted sum of expert outputs. A test compares with PyTorch's own counter.

Active parameters of a token: weights and biases of everything that is computed with for it. An expert that does not run
is not counted, nor is the embedding table (three rows of it are read).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moe_lab.bert.mixture import MixtureBlock
from moe_lab.gates.base import Affine


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gate_outputs(gate: nn.Module) -> int:
    """Numbers that a gate computes from a token's features; 0 for hash and static gates."""
    maps = [module for module in gate.modules() if isinstance(module, Affine) and module.weight is not None]
    return sum(module.weight.shape[0] for module in maps)


def _gate_size(gate: nn.Module) -> int:
    return sum(_size(module) for module in gate.modules() if isinstance(module, Affine))


def _layers(encoder: nn.Module, experts_per_token: Sequence[float] | None) -> list[tuple[nn.Module, float]]:
    layers = list(encoder.encoder.layer)
    values = [1.0] * len(layers) if experts_per_token is None else list(experts_per_token)
    if len(values) != len(layers):
        raise ValueError(f"{len(values)} numbers of experts per token for {len(layers)} layers")
    return list(zip(layers, values, strict=True))


def flops_per_token(encoder: nn.Module, length: float, experts_per_token: Sequence[float] | None = None) -> float:
    """Forward FLOPs of the layers for one token of a sequence of ``length`` tokens without padding.

    Args:
        encoder: with or without mixtures.
        length: S.
        experts_per_token: k-bar_l of every layer, upwards; None: 1. Layers without a mixture do not look at theirs.
    """
    total = 0.0
    for layer, experts in _layers(encoder, experts_per_token):
        d = layer.attention.output.dense.out_features
        total += 8 * d**2 + 4 * length * d
        mixture: MixtureBlock | None = getattr(layer, "mixture", None)
        if mixture is None:
            total += 4 * d * layer.intermediate.dense.out_features
        else:
            total += 2 * d * gate_outputs(mixture.moe.gate) + experts * 4 * d * mixture.moe.experts.w1.shape[2]
    return total


def head_flops(model: nn.Module) -> float:
    """FLOPs per sentence of a `SentenceClassifier`'s pooler and head."""
    d = model.head.in_features
    return 2.0 * d * model.head.out_features + (2.0 * d * d if model.pool == "cls" else 0.0)


def active_parameters(model: nn.Module, experts_per_token: Sequence[float] | None = None) -> float:
    """Parameters that one token is computed with, without embedding tables; arguments as in `flops_per_token`."""
    total = float(_size(model.head) + _size(model.encoder.embeddings.LayerNorm))
    if model.pool == "cls":
        total += _size(model.encoder.pooler)
    for layer, experts in _layers(model.encoder, experts_per_token):
        total += _size(layer.attention)
        if hasattr(layer, "mixture"):
            bank = layer.mixture.moe.experts
            total += _gate_size(layer.mixture.moe.gate) + experts * _size(bank) / bank.n_experts
            total += _size(layer.mixture.norm) if layer.mixture.norm is not None else 0
        else:
            total += _size(layer.intermediate) + _size(layer.output)
    return total
