"""Sentence pairs for translation; both languages share one vocabulary.

    source  tokens </s>                   target  <s> tokens </s>            padded behind

``planted-pairs`` (embedded) is a made-up language that English phrases are translated into by rule: words have their
own translations, but the order is another one and endings must agree, so it takes composition, not a table of
sentences.

    the big owls see an old fox    ->    zi-owlu gra   zo-foxa mil   se-zi      (subject, object, verb)

    noun phrase: article-noun, adjective behind; the article is zi- for many, zo- for one, the noun ends in -u or -a for
    many and one; the verb comes last and carries the subject's article behind it.

``multi30k``: English to German image descriptions, the official 29,000 / 1,014 / 1,000 pairs.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import official_file
from moe_lab.datasets.sentences import padded
from moe_lab.datasets.splits import generators
from moe_lab.datasets.tokens import Tokenizer, train_tokenizer

_ADJECTIVES = {"old": "mil", "red": "tur", "big": "gra", "shy": "pel", "wet": "nos", "odd": "dri"}
_NOUNS = {
    "owl": "owl",
    "fox": "fox",
    "cat": "mur",
    "dog": "bal",
    "hen": "kik",
    "bee": "zum",
    "cow": "lod",
    "ant": "pik",
}
_VERBS = {"see": "se", "hear": "he", "like": "ama", "fear": "tim", "find": "tro", "help": "jut"}

_N_SENTENCES = (2 * len(_NOUNS) * (1 + len(_ADJECTIVES))) ** 2 * len(_VERBS)

Pairs = list[tuple[str, str]]


def _phrase(rng: np.random.Generator) -> tuple[str, str, str]:
    """English, made-up, and the article that the verb has to agree with."""
    many = bool(rng.random() < 0.5)
    noun, adjective = str(rng.choice(tuple(_NOUNS))), str(rng.choice(tuple(_ADJECTIVES)))
    with_adjective = bool(rng.random() < 0.6)
    plural = "es" if noun.endswith("x") else "s"
    words = ["the" if many else "a", *([adjective] if with_adjective else []), noun + plural if many else noun]
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    article = "zi" if many else "zo"
    foreign = f"{article}-{_NOUNS[noun]}{'u' if many else 'a'}" + (
        f" {_ADJECTIVES[adjective]}" if with_adjective else ""
    )
    return " ".join(words), foreign, article


def planted_pair(rng: np.random.Generator) -> tuple[str, str]:
    """An English sentence and its translation."""
    (subject, foreign_subject, article), (object_, foreign_object, _) = _phrase(rng), _phrase(rng)
    verb = str(rng.choice(tuple(_VERBS)))
    ending = "" if article == "zi" else "s"
    return f"{subject} {verb}{ending} {object_}", f"{foreign_subject} {foreign_object} {_VERBS[verb]}-{article}"


def paired(name: str, splits: dict[str, Pairs], tokenizer: Tokenizer, length: int) -> Dataset:
    """A data set of kind "pairs"; info has the test sentences as text (``references``)."""
    arrays = [
        {
            "source": padded([tokenizer.encode(source) for source, _ in splits[split]], length, end=True),
            "target": padded([tokenizer.encode(target) for _, target in splits[split]], length, start=True, end=True),
        }
        for split in ("train", "valid", "test")
    ]
    texts = {split: list(zip(*splits[split], strict=True)) for split in ("valid", "test")}
    info = {
        "n_tokens": tokenizer.n_tokens,
        "tokenizer": tokenizer,
        "length": length,
        "sources": {split: list(both[0]) for split, both in texts.items()},
        "references": {split: list(both[1]) for split, both in texts.items()},
    }
    return Dataset(name, "pairs", *arrays, info=info)


def planted_pairs(
    seed: int = 0, *, n_train: int = 2000, n_valid: int = 200, n_test: int = 300, length: int = 48
) -> Dataset:
    """The made-up language, characters; no sentence of validation or test is in train."""
    (rng,) = generators(seed, 1)
    wanted, found = n_train + n_valid + n_test, {}
    if wanted > _N_SENTENCES // 2:
        raise ValueError(f"the made-up language has too few sentences, {_N_SENTENCES:,}, for {wanted:,}; ask for fewer")
    while len(found) < wanted:
        source, target = planted_pair(rng)
        found.setdefault(source, target)
    pairs = list(found.items())
    cut = n_train, n_train + n_valid
    splits = {"train": pairs[: cut[0]], "valid": pairs[cut[0] : cut[1]], "test": pairs[cut[1] :]}
    tokenizer = train_tokenizer("characters", [" ".join(pair) for pair in splits["train"]])
    return paired("planted-pairs", splits, tokenizer, length)


def _lines(name: str) -> list[str]:
    with gzip.open(official_file("multi30k", f"multi30k/{name}.gz"), "rt", encoding="utf-8") as file:
        return [line.strip() for line in file]


def _aligned(split: str) -> Pairs:
    english, german = _lines(f"{split}.en"), _lines(f"{split}.de")
    if len(english) != len(german):
        raise ValueError(f"multi30k {split}: {len(english)} English and {len(german)} German lines do not match")
    return list(zip(english, german, strict=True))


def multi30k(seed: int = 0, *, length: int = 48, n_tokens: int = 8192, n_train: int | None = None) -> Dataset:
    """English to German; byte pairs trained on both sides of the training pairs.

    Args:
        seed: of the choice of training pairs, if there are fewer than all.
        length: in tokens; longer sentences are cut off.
        n_tokens: of the joint vocabulary.
        n_train: use only so many pairs.
    """
    splits = {"train": _aligned("train"), "valid": _aligned("val"), "test": _aligned("test_2016_flickr")}
    if n_train is not None:
        (rng,) = generators(seed, 1)
        splits["train"] = [splits["train"][i] for i in rng.permutation(len(splits["train"]))[:n_train]]
    texts: Sequence[str] = [text for pair in splits["train"] for text in pair]
    return paired("multi30k", splits, train_tokenizer("bpe", texts, n_tokens), length)
