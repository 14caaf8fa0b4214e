"""The views of notebook 11 show what the Results say, mark what is wrong, follow their sliders, and are quick."""

from types import SimpleNamespace

import pytest
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.sentences import GAP, GuessReplay, TranslationReplay, compared, wrapped

ROWS = [
    (
        "the owls see a fox",
        "zi-owlu zo-foxa se-zi",
        {"dense": "zi-owlu zo-foxa se-zi", "hash": "zi-owlu zo-mura se-zi"},
    ),
    ("a cat hears a dog", "zo-mura zo-bala he-zo", {"dense": "zo-bala he-zo", "hash": "zo-mura he-zo"}),
    ("a hen", "zo-kika", {"dense": "zo-kika", "hash": "zo-kika"}),
]


def translated(gate, rows=ROWS):
    found = [{"source": s, "reference": r, "hypothesis": by_gate[gate]} for s, r, by_gate in rows]
    return SimpleNamespace(curves={"translations": found})


def guessed(place=1, truth="b"):
    top = [["b", 0.7], ["c", 0.2], [" ", 0.1]]
    row = {"pieces": ["a", "▢", "c"], "hidden": [{"at": place, "truth": truth, "top": top}]}
    return SimpleNamespace(curves={"guesses": [row, {"pieces": ["x"], "hidden": []}]})


@pytest.fixture
def replay():
    return TranslationReplay({gate: translated(gate) for gate in ("dense", "hash")})


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def marked(figure):
    return [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "words", "marks"),
    [
        ("a b c", "a b c", "a b c", (0, 0, 0)),
        ("a b c", "a x c", "a x c", (0, 1, 0)),
        ("a b c", "a c", f"a {GAP} c", (0, 1, 0)),
        ("a c", "a b c", "a b c", (0, 1, 0)),
        ("a b c", "", GAP, (1,)),
        ("", "a", "a", (1,)),
        ("a b", "b a", f"b a {GAP}", (1, 0, 1)),
    ],
)
def test_words_are_compared_with_the_reference(reference, hypothesis, words, marks):
    assert compared(reference.split(), hypothesis.split()) == (words.split(), [bool(mark) for mark in marks])


def test_long_sentences_are_broken_between_words():
    assert wrapped(["aaa", "bb", "c", "dddddddd", "e"], 6) == [[0, 1], [2], [3], [4]]
    assert wrapped([], 5) == [[]]


def test_every_gate_has_a_line_and_wrong_words_are_marked(replay):
    figure = replay.view(0)
    assert {"source", "reference", "dense", "hash", "owls", "zo-mura"} <= set(texts(figure))
    assert texts(figure).count("right") == texts(figure).count("wrong") == 1
    assert [word for word in marked(figure) if "-" in word] == ["zo-mura"]
    assert GAP in marked(replay.view(1))
    assert [word for word in marked(replay.view(2)) if "-" in word] == []


def test_the_kind_of_error_is_written_if_somebody_knows_it():
    replay = TranslationReplay({"hash": translated("hash")}, lambda reference, hypothesis: f"{len(hypothesis)} letters")
    assert "21 letters" in texts(replay.view(0)) and "right" in texts(replay.view(2))


def test_the_hardest_is_one_that_somebody_gets_right(replay):
    assert replay.hardest() == 0  # both are wrong in sentence 1, nobody in sentence 2
    only = TranslationReplay({"dense": translated("dense")})
    assert only.hardest() == 1


def test_a_sentence_after_the_last_is_the_last(replay):
    assert replay.n_sentences == 3 and texts(replay.view(99)) == texts(replay.view(2))


def test_runs_without_translations_or_of_other_sentences_are_refused():
    with pytest.raises(ValueError, match="kept_translations > 0"):
        TranslationReplay({"dense": SimpleNamespace(curves={})})
    with pytest.raises(ValueError, match="'hash' translated other sentences than 'dense'"):
        TranslationReplay({"dense": translated("dense"), "hash": translated("hash", ROWS[1:])})
    with pytest.raises(ValueError, match="no Results"):
        TranslationReplay({})


def test_guesses_stand_below_the_sentence_and_the_truth_is_bold():
    figure = GuessReplay({"dense": guessed()}).view("dense")
    assert {"▢", "place 1 (hidden)", "b", "70%", "␣", "10%"} <= set(texts(figure))
    assert {"b", "70%"} <= set(marked(figure)) and "20%" not in marked(figure)
    assert not any(text.startswith("truth") for text in texts(figure))


def test_a_truth_that_nobody_guessed_is_written_and_so_is_what_was_shown():
    figure = GuessReplay({"dense": guessed(place=2, truth="z")}).view("dense")
    assert {"truth: z", "place 2 (shown: c)"} <= set(texts(figure))


def test_guesses_follow_gate_and_sentence():
    replay = GuessReplay({"dense": guessed(), "hash": guessed(truth="c")})
    assert replay.n_sentences == 2
    assert marked(replay.view("dense")) != marked(replay.view("hash"))
    assert texts(replay.view("dense", 7)) == texts(replay.view("dense", 1)) == ["x"]
    with pytest.raises(ValueError, match="was it pre-trained"):
        GuessReplay({"dense": SimpleNamespace(curves={"guesses": []})})


def test_replay_is_quick_enough_for_a_slider(replay):
    guesses = GuessReplay({"dense": guessed()})
    assert plain_figures(lambda: replay.view(0)) < IN_TIME
    assert plain_figures(lambda: guesses.view("dense")) < IN_TIME
