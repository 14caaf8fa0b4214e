"""What is wrong with a translation into the made-up language of `planted-pairs`, told by its grammar.

    zi-owlu gra   zo-foxa mil   se-zi        subject, object (article-noun + ending, perhaps an adjective), verb-article

    no sentence   two noun phrases and a verb cannot be found in it
    agreement     a grammatical error, whatever was to be said: zi- with -a, zo- with -u, or the verb does not carry the
                  subject's article
    number        the article of a noun phrase says one for many, or many for one
    swapped       both nouns stand at the other's place, or both adjectives (one may be absent)
    noun          another noun, and not by a swap
    adjective     another one, one too many or too few, and not by a swap
    verb          another verb

A wrong translation has one kind of error or several; only "no sentence" stands alone.

Taught in notebook 11.
"""

from __future__ import annotations

import re
from typing import NamedTuple

KINDS = ("no sentence", "agreement", "number", "swapped", "noun", "adjective", "verb")
GRAMMAR, WORDS = ("agreement", "number", "swapped"), ("noun", "adjective", "verb")

_PHRASE = r"(z[io])-([a-z]+)([ua])(?: ([a-z]+))?"
_SENTENCE = re.compile(rf"{_PHRASE} {_PHRASE} ([a-z]+)-(z[io])")
_ENDINGS = {"zi": "u", "zo": "a"}


class Phrase(NamedTuple):
    """``zi-owlu gra`` is Phrase("zi", "owl", "u", "gra"); without adjective that is ""."""

    article: str
    noun: str
    ending: str
    adjective: str


class Sentence(NamedTuple):
    """``se-zi`` at the end is verb "se", agrees "zi"."""

    subject: Phrase
    object: Phrase
    verb: str
    agrees: str


def parse(sentence: str) -> Sentence | None:
    """The parts of a sentence, words known or not; None if it is not built like one."""
    match = _SENTENCE.fullmatch(sentence)
    if match is None:
        return None
    parts = [part or "" for part in match.groups()]
    return Sentence(Phrase(*parts[:4]), Phrase(*parts[4:8]), *parts[8:])


def error_kinds(reference: str, hypothesis: str) -> tuple[str, ...]:
    """Which of `KINDS` a translation shows, in that order; () for the reference itself.

    Args:
        reference: a right sentence.
        hypothesis: the translation.

    Raises:
        ValueError: the reference is no sentence of the language.
    """
    right, said = parse(reference), parse(hypothesis)
    if right is None:
        raise ValueError(f"{reference!r} is not a sentence of the made-up language")
    if said is None:
        return ("no sentence",)
    phrases = (said.subject, said.object)
    agree = all(_ENDINGS[phrase.article] == phrase.ending for phrase in phrases)
    found = {
        "agreement": not agree or said.agrees != said.subject.article,
        "number": [phrase.article for phrase in phrases] != [right.subject.article, right.object.article],
        "verb": said.verb != right.verb,
    }
    for part in ("noun", "adjective"):
        wanted = getattr(right.subject, part), getattr(right.object, part)
        given = getattr(said.subject, part), getattr(said.object, part)
        if given != wanted:
            found["swapped" if given == wanted[::-1] else part] = True
    return tuple(kind for kind in KINDS if found.get(kind))
