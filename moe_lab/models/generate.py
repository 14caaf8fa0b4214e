"""Tokens out of trained models: sampling (GPT) and beam search (translation).

Legend: B batch, P prompt, S sequence so far, M source, V vocabulary, K beam, A sentences not yet decided, C candidates,
L longest translation, y tokens, y_l token l, alpha the exponent of the length penalty.

    sample         y ~ softmax(z / temperature) over the top_k largest logits z;   temperature 0: argmax z
    beam search    score(y) = sum_{l=1..n} log p(y_l | y_<l, source) / n^alpha,    n tokens with </s>, without <s>

In every step of beam search each of K prefixes is extended by every token. Those of the K best extensions that end in
</s> are finished: of each sentence the finished hypothesis with the best score so far is kept. The K best of the others
are the next prefixes, so finishing takes no place away. A sentence is decided when K hypotheses have finished, or when
none of its prefixes can win any more (log p <= 0: no score exceeds the sum so far / max_length^alpha).

K = 1 is greedy decoding. With K so large that nothing is ever left out the result is the best of all sentences of at
most max_length tokens. A K between may miss it, and more is not always better.

Where we differ: GNMT (Wu et al. 2016, eq. 14) divides by ((5 + n) / 6)^alpha, which is milder for short sentences; the
plain power, with 1 as default, is fairseq's. GNMT's coverage penalty is left out.

Keys and values are not cached: every step reads the whole prefix again, O(n^2) positions for n tokens. Only the output
layer is spared, it sees the last position alone.

Rows of a batch do not influence one another as long as the gates route each token by itself. Expert choice, and a
capacity that holds in evaluation, compare tokens across the batch; Embedding, attention and all other gates do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.datasets.tokens import END, MASK, PAD, START, UNKNOWN
from moe_lab.models.language import LanguageModel, Translator
from moe_lab.modes import evaluating


def sample(
    model: LanguageModel,
    prompt: Tensor,
    n_new: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    forbidden: Sequence[int] = (PAD, START, MASK, UNKNOWN),
) -> Tensor:
    """Continue each prompt by ``n_new`` tokens.

    A model knows positions 0 .. length - 1 only. Once the text is longer, each step sees the last ``size.length``
    tokens, and their positions start from 0 again, as in the windows it was trained on.

    Args:
        model: causal.
        prompt: (B, P) int64, P >= 1, on the model's device; all real tokens, no padding.
        n_new: tokens to add.
        temperature: divides the logits: below 1 sharper, above 1 flatter, 0 always the most probable token.
        top_k: draw from so many most probable tokens only; None: from all.
        generator: of the draws, on the model's device; None: the global one. Not used at temperature 0.
        forbidden: ids that are never drawn; () allows all. </s> is allowed, and does not end a text.

    Returns:
        (B, P + n_new) int64: the prompt and what follows.

    Raises:
        ValueError: negative temperature, ``top_k`` or ``n_new``; an empty prompt; a model that is not causal; nothing
            left to draw.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, got {top_k}")
    if n_new < 0:
        raise ValueError(f"n_new must be 0 or more, got {n_new}")
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt must be (rows, tokens) with one token or more, e.g. a full stop; got {tuple(prompt.shape)}"
        )
    if not model.causal:
        raise ValueError("only a causal model predicts the next token: build LanguageModel with causal=True")
    if len(set(forbidden)) >= model.size.vocabulary:
        raise ValueError(f"all {model.size.vocabulary} tokens are forbidden")
    tokens = prompt
    with evaluating(model):
        for _ in range(n_new):
            context = tokens[:, -model.size.length :]
            hidden, _ = model.body(model.embedding(context), context)
            logits = model.embedding.logits(hidden[:, -1]).float()
            logits[:, list(forbidden)] = -math.inf
            tokens = torch.cat((tokens, _draw(logits, temperature, top_k, generator)), 1)
    return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    token = None
    if top_k is not None:
        logits, token = logits.topk(min(top_k, logits.shape[-1]))
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature then gives -inf, never inf
    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
    return drawn if token is None else token.gather(-1, drawn)


def beam_search(
    model: Translator,
    source: Tensor,
    *,
    beam: int = 5,
    max_length: int,
    length_penalty: float = 1.0,
    start: int = START,
    end: int = END,
    pad: int = PAD,
) -> Tensor:
    """Translate each sentence; deterministic. The encoder runs once.

    Args:
        model: trained on targets ``<s> tokens </s>``.
        source: (B, M) int64, padded behind, on the model's device.
        beam: K; 1 is greedy.
        max_length: tokens of a translation at most, </s> included; the model's ``size.length`` at most.
        length_penalty: alpha; 0 compares probabilities, which favours short sentences, 1 means per token.
        start, end, pad: ids of <s>, </s> and padding. <s> and padding are never generated.

    Returns:
        (B, L) int64, L <= max_length: tokens and </s>, without <s>, padded behind. A sentence of which no hypothesis
        finished in time is its most probable prefix of max_length tokens, without </s>.

    Raises:
        ValueError: ``beam`` or ``max_length`` below 1, ``max_length`` above the model's length, a negative penalty, ids
            that are not distinct, or a source without a token.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if not 1 <= max_length <= model.size.length:
        raise ValueError(f"max_length must be between 1 and the model's length {model.size.length}, got {max_length}")
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must be 0 or more, got {length_penalty}")
    if len({start, end, pad}) < 3:
        raise ValueError(f"start, end and pad must be three ids, got {start}, {end}, {pad}")
    if source.dim() != 2 or not bool((source != pad).any(1).all()):
        raise ValueError(
            "source must be (sentences, tokens), each with a real token (</s> is one); "
            f"got shape {tuple(source.shape)}{', a row of it is padding only' if source.dim() == 2 else ''}"
        )
    with evaluating(model):
        return _search(model, source, beam, max_length, length_penalty, start, end, pad)


def _search(
    model: Translator, source: Tensor, beam: int, max_length: int, alpha: float, start: int, end: int, pad: int
) -> Tensor:
    """As `beam_search`, arguments checked."""
    device, n = source.device, len(source)
    seen = source != pad
    memory, _ = model.encode(source, seen)
    best, best_score = source.new_full((n, max_length), pad), torch.full((n,), -math.inf, device=device)
    n_finished = torch.zeros(n, dtype=torch.int64, device=device)
    active = torch.arange(n, device=device)  # (A,) rows of source
    prefix = source.new_full((n, beam, 1), start)  # (A, K, 1 + length)
    sums = torch.full((n, beam), -math.inf, device=device)  # (A, K), in falling order
    sums[:, 0] = 0.0  # all K prefixes are <s>: extend one of them only
    for length in range(1, max_length + 1):
        if not len(active):
            break
        # The prefixes of one step are equally long: there is no padding among them.
        rows = active.repeat_interleave(beam)
        log_p = _next_log_p(model, prefix.flatten(0, 1), memory[rows], seen[rows])
        log_p[:, [start, pad]] = -math.inf
        n_tokens = log_p.shape[-1]
        totals = (sums.flatten().unsqueeze(1) + log_p).view(len(active), -1)
        value, index = totals.topk(2 * beam)  # (A, C): K at most end in </s>, so K prefixes or more are among them
        token = index % n_tokens
        origin = (index // n_tokens).unsqueeze(-1).expand(-1, -1, length)
        candidate = torch.cat((prefix.gather(1, origin), token.unsqueeze(-1)), -1)
        ends = token == end

        finished = ends & (value > -math.inf)
        finished[:, beam:] = False
        score, which = (value / length**alpha).masked_fill(~finished, -math.inf).max(1)
        better = score > best_score[active]
        best_score[active[better]] = score[better]
        best[active[better], :length] = candidate[better, which[better], 1:]
        n_finished[active] += finished.sum(1)

        going_on = ends.long().argsort(dim=1, stable=True)[:, :beam]
        sums = value.gather(1, going_on)
        prefix = candidate.gather(1, going_on.unsqueeze(-1).expand(-1, -1, length + 1))
        can_win = sums[:, 0] / max_length**alpha > best_score[active]
        undecided = can_win & (n_finished[active] < beam)
        active, sums, prefix = active[undecided], sums[undecided], prefix[undecided]
    if len(active):
        cut_off = best_score[active] == -math.inf
        best[active[cut_off]] = prefix[cut_off, 0, 1:]
    return best[:, : int((best != pad).any(0).sum())]


def _next_log_p(model: Translator, prefix: Tensor, memory: Tensor, memory_seen: Tensor) -> Tensor:
    """prefix (N, S), memory (N, M, D), memory_seen (N, M) -> (N, V) log-probabilities of the token after the prefix."""
    hidden, _ = model.decoder(model.embedding(prefix), prefix, None, memory, memory_seen)
    return model.embedding.logits(hidden[:, -1]).float().log_softmax(-1)
