"""BLEU by hand, its limits, its signature; ids back to text."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets.sentences import padded
from moe_lab.datasets.tokens import END, PAD, SPECIAL, START, BytePairs, Characters
from moe_lab.metrics.translation import corpus_bleu, detokenised

WORDS = st.lists(st.sampled_from(["owl", "fox", "sees", "the", "old"]), min_size=4, max_size=9).map(" ".join)


def test_bleu_by_hand():
    # the cat sat on the mat: 5 of 6 words ("the" counts once), 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples.
    score, _ = corpus_bleu(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_what_is_too_short_pays_and_what_is_too_long_does_not_gain():
    short, _ = corpus_bleu(["a b c d"], ["a b c d e"])
    assert short == pytest.approx(100 * math.exp(1 - 5 / 4))
    long, _ = corpus_bleu(["a b c d e"], ["a b c d"])
    assert long == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_counts_are_added_over_the_corpus_and_scores_are_not_averaged():
    hypotheses, references = ["a b c d e f g h", "x y z w"], ["a b c d e f g h", "p q r s"]
    both, _ = corpus_bleu(hypotheses, references)
    assert both == pytest.approx(100 * (8 / 12 * 7 / 10 * 6 / 8 * 5 / 6) ** 0.25)
    assert both > 0.5 * sum(corpus_bleu([h], [r])[0] for h, r in zip(hypotheses, references, strict=True))


@given(st.lists(WORDS, min_size=1, max_size=5), st.randoms())
def test_the_right_text_has_100_and_the_order_of_sentences_is_nothing(sentences, random):
    assert corpus_bleu(sentences, sentences)[0] == pytest.approx(100)
    wrong = [sentence + " fox" for sentence in sentences]
    score, _ = corpus_bleu(wrong, sentences)
    assert 0 <= score <= 100
    order = random.sample(range(len(sentences)), len(sentences))
    shuffled, _ = corpus_bleu([wrong[i] for i in order], [sentences[i] for i in order])
    assert shuffled == pytest.approx(score)


def test_case_counts_and_nothing_right_or_nothing_at_all_is_0():
    assert corpus_bleu(["The old owl sees"], ["the old owl sees"])[0] < 100
    assert corpus_bleu(["x"], ["a b c d"])[0] == 0
    assert corpus_bleu([""], ["a b c d"])[0] == 0


def test_three_words_are_too_few_for_a_corpus_but_not_for_a_sentence():
    assert corpus_bleu(["a b c"], ["a b c"])[0] == 0
    assert corpus_bleu(["a b c", "a b c d"], ["a b c", "a b c d"])[0] == pytest.approx(100)


def test_the_signature_says_how_it_was_computed():
    _, signature = corpus_bleu(["a b c d"], ["a b c d"])
    assert re.fullmatch(r"nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:[\d.]+", signature)


def test_bleu_explains_mistakes():
    for hypotheses, references in ((["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="one reference per hypothesis"):
            corpus_bleu(hypotheses, references)


@pytest.mark.parametrize("tokenizer", [Characters.train(["an old owl"]), BytePairs.train(["an old owl"] * 9, 270)])
def test_ids_become_text_again_up_to_the_first_end(tokenizer):
    texts = ["an owl", "", "old old owl"]
    encoded = [tokenizer.encode(text) for text in texts]
    assert detokenised(padded(encoded, 14, start=True, end=True), tokenizer) == texts
    assert detokenised(padded(encoded, 14, end=True), tokenizer) == texts
    assert detokenised(padded(encoded, 14), tokenizer) == texts  # cut off: no </s>
    o, x = tokenizer.encode("o")[0], len(SPECIAL)
    rows = torch.tensor([[START, o, END, x, END], [END, o, o, o, o], [o, END, PAD, o, o], [PAD, PAD, PAD, PAD, PAD]])
    assert detokenised(rows, tokenizer) == ["o", "", "o", ""]
    assert detokenised(rows[:0], tokenizer) == []
