"""The view of notebook 07 shows what the Results say, follows its sliders, and is quick."""

from types import SimpleNamespace

import pytest
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.bert import SentenceReplay, wrapped

ROWS = [
    {
        "pieces": ["[CLS]", "good", "##ness", "[SEP]"],
        "label": 1,
        "probability": [0.1, 0.9],
        "expert": [[0, 1, 1, 0], [2, 2, 2, 2]],
        "weight": [[1.0] * 4] * 2,
        "without": [[[0.1, 0.9], [0.7, 0.3], [0.1, 0.9]], [[0.1, 0.9], [0.1, 0.9], [0.2, 0.8]]],
    },
    {
        "pieces": ["[CLS]", "bad", "[SEP]"],
        "label": 0,
        "probability": [0.8, 0.2],
        "expert": [[0, 0, 0], [1, 1, 1]],
        "weight": [[1.0] * 3] * 2,
        "without": [[[0.75, 0.25], [0.8, 0.2], [0.8, 0.2]], [[0.8, 0.2], [0.8, 0.2], [0.8, 0.2]]],
    },
]


def result(rows=ROWS):
    return SimpleNamespace(curves={"sentences": rows})


@pytest.fixture
def replay():
    return SentenceReplay({"comet": result()}, ("blame", "praise"))


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_lines_are_broken_between_pieces():
    lines = wrapped(["aaaa", "b", "cc"], 0.8)
    assert [[index for index, *_ in line] for line in lines] == [[0, 1], [2]]
    assert all(line[0][1] == 0.0 for line in lines)
    assert wrapped([], 1.0) == [[]]
    assert [len(line) for line in wrapped(["x" * 40, "y"], 1.0)] == [1, 1]  # a long piece has a line of its own


def test_every_token_has_its_expert_in_every_layer(replay):
    found = texts(replay.view("comet", 0, layer=1, expert=0))
    assert {"[CLS]", "good", "##ness", "layer 0", "layer 1", "true: praise"} <= set(found)
    assert [found.count(expert) for expert in "012"] == [2, 2, 4]
    assert "layer 1 without expert 0 (0 of 4 tokens)" in found


def test_tokens_of_the_missing_expert_are_marked_and_the_prediction_changes(replay):
    figure = replay.view("comet", 0, layer=0, expert=1)
    found = texts(figure)
    assert found.count("(1)") == 2 and "1" not in found
    assert {"praise  90.0%", "blame  70.0%", "layer 0 without expert 1 (2 of 4 tokens)"} <= set(found)
    (boxes,) = [each for each in figure.axes[0].collections if len(each.get_paths()) == 8]
    assert sum(tuple(color) == (1, 1, 1, 1) for color in boxes.get_facecolors()) == 2


def test_what_is_too_large_is_the_last(replay):
    assert texts(replay.view("comet", 9, 9, 9)) == texts(replay.view("comet", 1, 1, 2))
    assert (replay.n_sentences, replay.n_layers, replay.n_experts) == (2, 2, 3)


def test_sentences_are_named_by_their_words(replay):
    assert replay.texts == ["goodness", "bad"]


def test_the_most_hurt_is_found(replay):
    assert replay.most_hurt("comet") == (0, 0, 1)


def test_results_without_sentences_are_refused():
    with pytest.raises(ValueError, match="'comet' has kept no sentences; run a student with watched_sentences > 0"):
        SentenceReplay({"comet": SimpleNamespace(curves={})})
    with pytest.raises(ValueError, match="no Results"):
        SentenceReplay({})


def test_replay_is_quick_enough_for_a_slider_with_a_long_sentence():
    n = 40
    row = ROWS[0] | {"pieces": ["word"] * n, "expert": [[i % 3 for i in range(n)]] * 2}
    replay = SentenceReplay({"comet": result([row])})

    assert plain_figures(lambda: replay.view("comet")) < IN_TIME
