"""Text that needs no download: four little languages whose sentences take turns, so that it is known who should be
asked.

What is planted: each sentence belongs to one of four domains, which share the alphabet but not the rules.

    0  sums       "(17+5)=22."          the answer follows from the question
    1  sentences  "two old owls see a fox."   number agreement between article, noun and verb
    2  brackets   "[(){}]."             whatever was opened last must be closed first
    3  echoes     "abda|adba."          the second half is the first one backwards

A character's ``domain`` is the planted expert. Domains alternate at random, so a model has to find out from the text
which rules hold just now; a character that could begin any sentence cannot be predicted well by anybody: the loss has a
floor above zero. The same seed gives the same text on every machine and Python version.
"""

from __future__ import annotations

import numpy as np

from moe_lab.datasets.splits import generators

DOMAINS = ("sums", "sentences", "brackets", "echoes")

_ADJECTIVES = ("old", "red", "big", "shy", "wet", "odd")
_NOUNS = ("owl", "fox", "cat", "dog", "hen", "bee")
_VERBS = ("see", "hear", "like", "fear", "find")
_MANY = ("two", "six", "ten", "all")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _sum(rng: np.random.Generator) -> str:
    a, b = (int(value) for value in rng.integers(0, 50, 2))
    return f"({a}+{b})={a + b}."


def _noun_phrase(rng: np.random.Generator) -> tuple[str, bool]:
    many = bool(rng.random() < 0.5)
    words = [str(rng.choice(_MANY)) if many else "a"]
    if rng.random() < 0.5:
        words.append(str(rng.choice(_ADJECTIVES)))
    noun = str(rng.choice(_NOUNS))
    if words[-1] == "a" and noun == "owl":
        words[-1] = "an"
    elif words[0] == "a" and len(words) > 1 and words[1][0] in "aeiou":
        words[0] = "an"
    plural = "es" if noun.endswith("x") else "s"
    return " ".join((*words, noun + plural if many else noun)), many


def _sentence(rng: np.random.Generator) -> str:
    subject, many = _noun_phrase(rng)
    verb = str(rng.choice(_VERBS)) + ("" if many else "s")
    return f"{subject} {verb} {_noun_phrase(rng)[0]}."


def _brackets(rng: np.random.Generator) -> str:
    text, opened = [], []
    length = int(rng.integers(2, 9))
    for _ in range(length):
        if opened and rng.random() < 0.45:
            text.append(_PAIRS[opened.pop()])
        else:
            opened.append(str(rng.choice(tuple(_PAIRS))))
            text.append(opened[-1])
    return "".join(text + [_PAIRS[bracket] for bracket in reversed(opened)]) + "."


def _echo(rng: np.random.Generator) -> str:
    letters = "".join(rng.choice(tuple("abcd"), int(rng.integers(2, 8))))
    return f"{letters}|{letters[::-1]}."


_MAKERS = (_sum, _sentence, _brackets, _echo)


def write_sentence(domain: int, rng: np.random.Generator) -> str:
    """A sentence of one domain, full stop included."""
    return _MAKERS[domain](rng)


def spoil(sentence: str, domain: int, rng: np.random.Generator) -> str:
    """The sentence with one mistake that breaks the rule of its domain, of about the same length."""
    body = sentence[:-1]
    if domain == 0:
        question, answer = body.split("=")
        wrong = int(answer) + int(rng.choice((-10, -2, -1, 1, 2, 10)))
        return f"{question}={abs(wrong) if abs(wrong) != int(answer) else int(answer) + 1}."
    if domain == 1:
        words = body.split()
        place = next(i for i, word in enumerate(words) if word.removesuffix("s") in _VERBS)
        verb = words[place]
        words[place] = verb.removesuffix("s") if verb.endswith("s") else verb + "s"
        return " ".join(words) + "."
    place = int(rng.integers(len(body)))
    if domain == 2:
        choices = [bracket for bracket in "()[]{}" if bracket != body[place]]
    else:
        place = int(rng.integers(body.index("|") + 1, len(body)))
        choices = [letter for letter in "abcd" if letter != body[place]]
    return body[:place] + str(rng.choice(choices)) + body[place + 1 :] + "."


def planted_text(seed: int = 0, *, n_characters: int = 200_000) -> tuple[str, np.ndarray]:
    """The text and the domain of each of its characters.

    Args:
        seed: of sentences and of their order.
        n_characters: length, at least 1.

    Returns:
        text of exactly that length; (n_characters,) int64 in 0 .. 3.
    """
    if n_characters < 1:
        raise ValueError(f"n_characters must be at least 1, got {n_characters}")
    (rng,) = generators(seed, 1)
    sentences, domains, total = [], [], 0
    while total < n_characters:
        domain = int(rng.integers(len(DOMAINS)))
        sentences.append(write_sentence(domain, rng))
        domains.append(np.full(len(sentences[-1]), domain))
        total += len(sentences[-1])
    return "".join(sentences)[:n_characters], np.concatenate(domains)[:n_characters].astype(np.int64)
