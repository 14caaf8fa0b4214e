"""What a transformer costs, counted from its sizes; and how much sooner one training run reaches a loss than another.

Legend: d width, F hidden width of a feed-forward layer, V vocabulary, L layers, L_m those with a mixture, N experts, T
context, M and S tokens of source and target, k-bar mean number of experts that run on a token. Multiply-add = 2 FLOPs.

    attention          8 d^2 + 4 T d                   per token and layer: query, key, value, out; Q K' and A V
    feed-forward       4 d F                           per token, in the L - L_m layers without a mixture
    mixture            2 d N + k-bar_l 4 d F           per token: router, experts; k-bar_l *measured* in layer l
    head               2 d V                           per token
    cross-attention    4 d^2 + 4 M d, and 4 d^2        per target token, and per source token (key, value); each layer
    training           3 x forward                     the backward pass computes two products for each of the forward

EvoMoE, section on efficiency. Left out, as there: embeddings, norms, activations, softmaxes, the losses, the weighted
sum of expert outputs (2 k-bar d), second routers (the noise of a noisy top-k, the light router of StableMoE) and the
optimiser, which pays for *all* parameters: FLOPs are not seconds.

T is what a plain kernel executes, the full square; a kernel that skips the masked half needs T/2. A token that a full
expert drops costs nothing, as in `experts.dispatch`: k-bar is below 1 there. (Libraries with slots of fixed capacity
execute the empty ones, too.)

Speed-ups: L* = final loss of the base run, n_X the first x (steps, FLOPs, seconds) at which run X is down to L*;

    s = n_base / n_X
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_lab.models.language import TransformerSize

Experts = float | Sequence[float]
"""Mean experts per token: of all mixtures, or one number for each."""


def _experts_of_mixtures(size: TransformerSize, n_experts: int, experts: Experts, router: bool) -> list[float]:
    """k-bar_l of the L_m mixtures; ValueError for numbers that cannot be meant."""
    mixtures = size.layers // size.moe_every if size.moe_every else 0
    values = [experts] * mixtures if np.ndim(experts) == 0 else list(experts)
    if len(values) != mixtures:
        raise ValueError(f"{len(values)} numbers of experts per token for {mixtures} mixtures")
    if mixtures and router and n_experts < 1:
        raise ValueError(
            f"moe_every={size.moe_every} puts routers into {mixtures} layers: give n_experts (router=False for a hash, "
            "moe_every=0 for a dense model)"
        )
    most = n_experts or math.inf
    for value in values:
        if not 0 <= value <= most:
            raise ValueError(f"experts per token must be in [0, {most}], got {value}")
    return [float(value) for value in values]


def _stack(
    size: TransformerSize, n_experts: int, experts: Experts, router: bool, tokens: float, routed: float, context: float
) -> float:
    """All blocks without cross-attention: ``tokens`` pass, ``routed`` of them through mixtures."""
    d, expert = size.width, 4 * size.width * size.feed_forward
    values = _experts_of_mixtures(size, n_experts, experts, router)
    gate = 2 * d * n_experts if router else 0
    attention = size.layers * (8 * d**2 + 4 * context * d)
    return tokens * (attention + (size.layers - len(values)) * expert) + routed * sum(gate + k * expert for k in values)


def language_flops(
    size: TransformerSize,
    *,
    n_experts: int = 0,
    experts_per_token: Experts = 1.0,
    router: bool = True,
    context: float | None = None,
    head_share: float = 1.0,
) -> float:
    """Forward FLOPs per token of a `LanguageModel`, GPT or masked.

    Args:
        size: without mixtures if ``size.moe_every`` is 0; the arguments about experts then do not matter.
        n_experts: N.
        experts_per_token: k-bar, or k-bar_l from the bottom up. With padding, which is not routed: per position.
        router: False for gates without a matrix (hash; the one expert of EvoMoE's first phase).
        context: T, ``size.length`` by default: sequences as long as the model allows, all T^2 products. A kernel that
            skips what causality masks needs T/2.
        head_share: share of tokens whose logits are needed. `LanguageModel` computes all of them; a masked model needs
            those of the hidden tokens only.

    Raises:
        ValueError: mixtures with a router but without ``n_experts``; more experts per token than there are; a list of
            another length than there are mixtures.
    """
    context = size.length if context is None else context
    body = _stack(size, n_experts, experts_per_token, router, 1, 1, context)
    return float(body + 2 * size.width * size.vocabulary * head_share)


def classifier_flops(
    size: TransformerSize,
    *,
    tokens: float,
    n_classes: int,
    n_experts: int = 0,
    experts_per_token: Experts = 1.0,
    router: bool = True,
    real_tokens: float | None = None,
) -> float:
    """Forward FLOPs of a `Classifier` for one sequence: a hidden layer and ``n_classes`` logits behind the mean.

    Args:
        size, n_experts, experts_per_token, router: see `language_flops`; experts per *real* token.
        tokens: positions with padding, as long as the longest sequence of the batch: attention and dense layers pay for
            all of them.
        n_classes: of the output layer.
        real_tokens: those that are routed; all by default.

    Raises:
        ValueError: see `language_flops`.
    """
    routed = tokens if real_tokens is None else real_tokens
    body = _stack(size, n_experts, experts_per_token, router, tokens, routed, tokens)
    return float(body + 2 * size.width * (size.width + n_classes))


def translation_flops(
    size: TransformerSize,
    *,
    source_tokens: float,
    target_tokens: float,
    n_experts: int = 0,
    source_experts: Experts = 1.0,
    target_experts: Experts = 1.0,
    router: bool = True,
    real_source: float | None = None,
    real_target: float | None = None,
) -> float:
    """Forward FLOPs of a `Translator` for one padded pair, with teacher forcing.

    Args:
        size, n_experts, router: see `language_flops`; ``size`` is that of either side.
        source_tokens, target_tokens: M and S with padding; logits are computed at all S positions.
        source_experts, target_experts: experts per *real* token in the encoder and the decoder, a number or one for
            each mixture.
        real_source, real_target: tokens that are routed; all by default.

    Raises:
        ValueError: see `language_flops`.
    """
    m, s, d = source_tokens, target_tokens, size.width
    encoder = _stack(size, n_experts, source_experts, router, m, m if real_source is None else real_source, m)
    decoder = _stack(size, n_experts, target_experts, router, s, s if real_target is None else real_target, s)
    cross = size.layers * (s * (4 * d**2 + 4 * m * d) + m * 4 * d**2)
    return float(encoder + decoder + cross + s * 2 * d * size.vocabulary)


def training_flops(forward: float) -> float:
    """FLOPs of forward and backward, 3 x ``forward``: every layer learns, nothing is computed twice."""
    return 3 * forward


def first_crossing(x: Sequence[float], y: Sequence[float], target: float) -> float:
    """The x at which the curve is down to ``target`` for the first time.

    Args:
        x: (n,) increasing: steps, FLOPs, seconds.
        y: (n,) loss. Its running minimum is read, linear between points; points that are not finite are left out.
        target: loss to reach.

    Returns:
        x, between two points as a rule; the first x if the curve starts at or below the target; inf if it never comes
        down to it.

    Raises:
        ValueError: lengths differ, or x does not increase.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x and y must be two lists of one length, got shapes {x.shape} and {y.shape}")
    if (np.diff(x) <= 0).any():
        raise ValueError("x must increase from point to point")
    finite = np.isfinite(y)
    x, lowest = x[finite], np.minimum.accumulate(y[finite])
    reached = np.flatnonzero(lowest <= target)
    if len(reached) == 0:
        return math.inf
    last = int(reached[0])
    if last == 0:
        return float(x[0])
    above, below = lowest[last - 1], lowest[last]
    return float(x[last - 1] + (above - target) / (above - below) * (x[last] - x[last - 1]))


def speedup(
    x_base: Sequence[float],
    y_base: Sequence[float],
    x: Sequence[float],
    y: Sequence[float],
    target: float | None = None,
) -> float:
    """n_base / n_X: how many times less x a run needs than the base run, above 1 if it needs less.

    Args:
        x_base, y_base: curve of the base, see `first_crossing`.
        x, y: curve of the run.
        target: loss to reach; by default the *last* of the base, not its lowest, which is a lucky evaluation.

    Returns:
        The ratio; 0 if the run never reaches the target; inf if it does and the base does not.

    Raises:
        ValueError: no target is given and the base has no finite end; the run starts at the target with x = 0, so that
            there is no ratio; see also `first_crossing`.
    """
    if target is None:
        if len(y_base) == 0 or not math.isfinite(y_base[-1]):
            raise ValueError("the base run has no finite final loss: give a target")
        target = y_base[-1]
    base, own = first_crossing(x_base, y_base, target), first_crossing(x, y, target)
    if math.isinf(own):
        return 0.0
    if own <= 0:
        raise ValueError(f"the run starts at or below the target {target} at x = {own}: no ratio")
    return base / own
