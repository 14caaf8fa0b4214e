"""Text to token ids and back: characters (nothing to learn, nothing to install) or byte pairs trained on a corpus.

Ids 0 to 4 are special in both: padding, start, end, mask, unknown. Characters that were not in the training text become
<unk>; byte pairs know every text, since they begin with the 256 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from moe_lab.names import check_name

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<unk>")
PAD, START, END, MASK, UNKNOWN = range(len(SPECIAL))
KINDS = ("characters", "bpe")
_BETWEEN_LINES = re.compile(r"(?<=\S\n)(?=\S)")


class Characters:
    """One id per character.

    Args:
        alphabet: the characters that have an id, in the order of their ids.
    """

    kind = "characters"

    def __init__(self, alphabet: Sequence[str]):
        self.alphabet = tuple(alphabet)
        self._id = {character: len(SPECIAL) + index for index, character in enumerate(self.alphabet)}

    @classmethod
    def train(cls, texts: Iterable[str]) -> Characters:
        """The characters of these texts, sorted."""
        return cls(sorted(set().union(*texts)))

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary, special ids included."""
        return len(SPECIAL) + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        return [self._id.get(character, UNKNOWN) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; padding, start and end vanish, a mask and what is unknown become visible signs."""
        signs = {MASK: "▢", UNKNOWN: "\N{REPLACEMENT CHARACTER}"}
        return "".join(
            self.alphabet[id_ - len(SPECIAL)] if id_ >= len(SPECIAL) else signs.get(id_, "") for id_ in map(int, ids)
        )


class BytePairs:
    """Byte-level byte-pair encoding (Sennrich et al. 2016), by the `tokenizers` library.

    Args:
        description: its JSON.
    """

    kind = "bpe"

    def __init__(self, description: str):
        from tokenizers import Tokenizer

        self.description = description
        self._tokenizer = Tokenizer.from_str(description)

    @classmethod
    def train(cls, texts: Iterable[str], n_tokens: int = 4096) -> BytePairs:
        """Learn merges until there are ``n_tokens`` ids, 261 or more (a small text gives fewer merges)."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if n_tokens < 256 + len(SPECIAL):
            raise ValueError(
                f"byte pairs need at least {256 + len(SPECIAL)} ids (256 bytes, special ids), got {n_tokens}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=n_tokens,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary, special ids included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end; a long text piece by piece, on all cores: see `pieces`."""
        parts = pieces(text)
        if len(parts) == 1:
            return self._tokenizer.encode(text).ids
        return [id_ for encoding in self._tokenizer.encode_batch(parts) for id_ in encoding.ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids vanish."""
        return self._tokenizer.decode([int(id_) for id_ in ids])


def pieces(text: str, at_least: int = 100_000) -> list[str]:
    """A text cut between two lines, pieces but the last at least so many characters long.

    The line before ends with a letter or sign, the one behind begins with one: there, byte-level byte pairs cut anyway,
    so pieces have the ids of the whole. (A cut behind a blank line would join its line breaks to one token.)
    """
    cuts = [0]
    while (found := _BETWEEN_LINES.search(text, cuts[-1] + at_least)) is not None:
        cuts.append(found.start())
    return [text[first:last] for first, last in pairwise([*cuts, len(text)])]


Tokenizer = Characters | BytePairs


def train_tokenizer(kind: str, texts: Sequence[str], n_tokens: int = 4096) -> Tokenizer:
    """ "characters" or "bpe" of these texts.

    Raises:
        ValueError: unknown kind, with the nearest one; no text at all.
    """
    check_name("tokenizer", kind, KINDS)
    if not any(texts):
        raise ValueError("the corpus is empty: nothing to make a vocabulary from")
    return Characters.train(texts) if kind == "characters" else BytePairs.train(texts, n_tokens)
