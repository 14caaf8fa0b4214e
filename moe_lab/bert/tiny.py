"""A BERT that needs no download: random weights, and a vocabulary made of the texts it will read. For tests and quick
runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moe_lab.bert.encoder import require_transformers

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_tokenizer(texts: Iterable[str], most_words: int = 2000) -> Any:
    """A WordPiece tokenizer: the most frequent words of the texts whole, all others from their characters.

    Every word of the texts can be written, and the same texts give the same ids on every machine.
    """
    tokenizer = require_transformers().BertTokenizer
    before = tokenizer(vocab={token: index for index, token in enumerate(_SPECIAL)}).backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        pieces = before.pre_tokenizer.pre_tokenize_str(before.normalizer.normalize_str(text))
        words.update(piece for piece, _ in pieces)
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))[:most_words]
    vocabulary = dict.fromkeys([*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *frequent])
    return tokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, model_max_length=64)


def tiny_encoder(
    texts: Iterable[str],
    seed: int = 0,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 2,
    hidden: int = 64,
    length: int = 64,
    dropout: float = 0.1,
) -> tuple[nn.Module, Any]:
    """A randomly initialised BERT in eval mode, and its tokenizer.

    Args:
        texts: of which the vocabulary is made.
        seed: of the weights; the global generator is left as it was.
        layers, width, heads, hidden: L, D, heads, F.
        length: longest sequence.
        dropout: in training.
    """
    transformers = require_transformers()
    tokenizer = tiny_tokenizer(texts)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        # 0.02 is for wide layers: with a width of 32 nothing would come through them
        initializer_range=0.5 / width**0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = transformers.BertModel(config)
    return encoder.eval(), tokenizer
