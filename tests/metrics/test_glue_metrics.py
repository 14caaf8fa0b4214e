"""Scores of text tasks against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_lab.datasets.glue import load_task, metrics_of, task_names
from moe_lab.metrics.glue import METRICS, score
from moe_lab.metrics.squad import exact, normal_form, squad_score, word_f1

LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 0])
FOUND = np.array([1, 1, 0, 1, 0, 0, 0, 0])  # TP 2, FN 1, FP 1, TN 4


def test_values_by_hand():
    assert score("sst2", FOUND, LABELS) == {"accuracy": 6 / 8}
    assert score("mrpc", FOUND, LABELS) == pytest.approx({"accuracy": 6 / 8, "f1": 2 * 2 / (2 * 2 + 1 + 1)})
    # (2 * 4 - 1 * 1) / sqrt(3 * 3 * 5 * 5)
    assert score("cola", FOUND, LABELS) == pytest.approx({"matthews": 7 / 15})


def test_the_papers_metrics_in_the_order_to_choose_by():
    assert {name: metrics_of(name) for name in task_names()} == {
        "planted-sentences": ("accuracy",),
        "sst2": ("accuracy",),
        "cola": ("matthews",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
    }
    assert {metric for name in task_names() for metric in metrics_of(name)} == set(METRICS)


def test_perfect_inverted_and_constant_predictions():
    assert score("qqp", LABELS, LABELS) == {"accuracy": 1, "f1": 1}
    assert score("cola", LABELS, LABELS)["matthews"] == pytest.approx(1)
    assert score("cola", 1 - LABELS, LABELS)["matthews"] == pytest.approx(-1)
    nothing = np.zeros(8, dtype=int)
    assert score("cola", nothing, LABELS) == {"matthews": 0}
    assert score("mrpc", nothing, LABELS) == {"accuracy": 5 / 8, "f1": 0}
    assert score("mrpc", nothing, nothing) == {
        "accuracy": 1,
        "f1": 0,
    }  # no class 1 anywhere: undefined, 0 by convention


def test_a_task_says_its_metrics_itself_and_three_classes_have_an_accuracy():
    task = load_task("planted-sentences", n_train=10, n_valid=5, n_test=20)
    assert score(task, task.test.label, task.test.label) == {"accuracy": 1}
    assert score("mnli", np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == {"accuracy": 0.75}


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "message"),
    [
        ("sts", FOUND, LABELS, "unknown task"),
        ("sst2", FOUND[:3], LABELS, "3 predictions for 8 labels"),
        ("sst2", FOUND[:0], LABELS[:0], "0 predictions"),
        ("sst2", np.zeros((8, 2), dtype=int), LABELS, "take the argmax"),
        ("sst2", np.full(8, 0.7), LABELS, "take the argmax"),
        ("qqp", FOUND + 1, LABELS, "two classes"),
    ],
)
def test_what_cannot_be_scored_is_refused(name: str, predictions, labels, message: str):
    with pytest.raises(ValueError, match=message):
        score(name, predictions, labels)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a an the", ""),
        ("U.S.A.", "usa"),  # punctuation goes before words are told apart
        ("theatre and an-other", "theatre and another"),
        ("the-end", "theend"),
        ("l'été – “quoted”", "lété – “quoted”"),  # only ASCII punctuation
        ("\tA\nnew  line ", "new line"),
        ("", ""),
    ],
)
def test_normal_forms(text: str, normal: str):
    assert normal_form(text) == normal
    assert normal_form(normal) == normal


def test_one_answer_by_hand():
    assert exact("The Tower.", "tower") == 1 and exact("tower", "towers") == 0
    # found: big red tower; wanted: tower in paris. One in common: P 1/3, R 1/3
    assert word_f1("a big red tower", "tower in Paris") == pytest.approx(1 / 3)
    # a word counts as often as it occurs on both sides: common = 2 of 3 and 2 of 2
    assert word_f1("no no no", "no no") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert word_f1("owl", "bee") == 0
    assert (word_f1("", ""), word_f1("", "owl"), word_f1("owl", ""), word_f1("the", "")) == (1, 0, 0, 1)


def test_the_best_of_several_answers_counts_for_each_score_on_its_own():
    # exact with the second; F1 1 with it too. Against "the cat sat": 2 * 1/1 * 1/2 / (3/2) = 2/3 alone
    assert squad_score(["cat"], [["the cat sat", "cat"]]) == {
        "f1": 1,
        "exact": 1,
        "f1_answered": 1,
        "exact_answered": 1,
    }
    assert squad_score(["cat"], [["the cat sat", "dog"]])["f1"] == pytest.approx(2 / 3)


def test_no_answer_is_right_where_there_is_none_and_wrong_elsewhere():
    scores = squad_score(["", "owl", "", "cat"], [[], [], ["cat"], ["cat sat"]])
    assert scores == pytest.approx(
        {
            "f1": (1 + 0 + 0 + 2 / 3) / 4,
            "exact": 1 / 4,
            "f1_answered": (0 + 2 / 3) / 2,
            "exact_answered": 0,
            "impossible_found": 1 / 2,
        }
    )


def test_answers_that_are_only_articles_and_signs_are_left_out():
    assert squad_score([""], [["the", "..."]])["impossible_found"] == 1  # nothing is left of them
    assert squad_score([""], [["the", "owl"]])["f1"] == 0
    assert squad_score(["the"], [[]])["exact"] == 1  # "the" says nothing, as the official script has it


def test_everything_unanswered_scores_the_share_of_impossible_questions():
    answers = [[], ["a cat"], [], ["owl"], ["bee"]]
    scores = squad_score([""] * 5, answers)
    assert math.isclose(scores["f1"], 2 / 5) and scores["f1"] == scores["exact"]


def test_questions_without_predictions_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        squad_score(["owl"], [["owl"], []])
    with pytest.raises(ValueError, match="0 predictions for 0"):
        squad_score([], [])
