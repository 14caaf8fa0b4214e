"""Errors in the made-up language are told apart by its grammar."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets.pairs import planted_pair
from moe_lab.metrics.planted_pairs import KINDS, Phrase, error_kinds, parse

RIGHT = "zi-owlu gra zo-foxa mil se-zi"


@given(st.integers(0, 10_000))
def test_every_planted_sentence_is_parsed_and_has_no_error(seed):
    sentence = planted_pair(np.random.default_rng(seed))[1]
    assert parse(sentence) is not None and error_kinds(sentence, sentence) == ()


def test_parts_are_named():
    found = parse(RIGHT)
    assert found.subject == Phrase("zi", "owl", "u", "gra") and found.object == Phrase("zo", "fox", "a", "mil")
    assert (found.verb, found.agrees) == ("se", "zi")
    assert parse("zo-pika zo-zuma he-zo").subject == Phrase("zo", "pik", "a", "")


@pytest.mark.parametrize(
    ("hypothesis", "kinds"),
    [
        (RIGHT, ()),
        ("", ("no sentence",)),
        ("zi-owlu gra zo-foxa mil", ("no sentence",)),
        ("zi-owlu gra mil zo-foxa se-zi", ("no sentence",)),
        ("zi-owla gra zo-foxa mil se-zi", ("agreement",)),
        ("zi-owlu gra zo-foxa mil se-zo", ("agreement",)),
        ("zo-owlu gra zo-foxa mil se-zo", ("agreement", "number")),
        ("zo-owla gra zo-foxa mil se-zo", ("number",)),
        ("zi-owlu gra zi-foxu mil se-zi", ("number",)),
        ("zi-foxu gra zo-owla mil se-zi", ("swapped",)),
        ("zi-owlu mil zo-foxa gra se-zi", ("swapped",)),
        ("zo-foxa mil zi-owlu gra se-zo", ("number", "swapped")),
        ("zi-owlu zo-foxa mil se-zi", ("adjective",)),
        ("zi-owlu gra zo-foxa mil he-zi", ("verb",)),
        ("zi-owlu gra zo-fura mil se-zi", ("noun",)),
        ("zi-foxu mil zo-owla mil se-zi", ("swapped", "adjective")),
        ("zi-owlu gra zi-foxa gra ama-zo", ("agreement", "number", "adjective", "verb")),
    ],
)
def test_kinds_by_hand(hypothesis, kinds):
    assert error_kinds(RIGHT, hypothesis) == kinds
    assert set(kinds) <= set(KINDS)


def test_an_adjective_that_moved_to_the_other_noun_is_swapped():
    assert error_kinds("zi-owlu gra zo-foxa se-zi", "zi-owlu zo-foxa gra se-zi") == ("swapped",)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_two_different_sentences_differ_in_something(first, second):
    a, b = (planted_pair(np.random.default_rng(seed))[1] for seed in (first, second))
    kinds = error_kinds(a, b)
    assert bool(kinds) == (a != b) and "agreement" not in kinds


def test_a_reference_that_is_no_sentence_is_refused():
    with pytest.raises(ValueError, match="not a sentence"):
        error_kinds("the owls see a fox", RIGHT)
