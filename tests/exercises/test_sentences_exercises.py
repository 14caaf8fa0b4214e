"""Checks of notebook 11 accept a right answer and say what is wrong with others."""

import numpy as np
import pytest
import torch

from moe_lab.datasets.tokens import MASK, SPECIAL
from moe_lab.exercises import sentences
from moe_lab.experiments.evomoe_masked import MaskedConfig

PRETRAINED = MaskedConfig(gate="dense")
NOUNS = {"owl": "owl", "fox": "fox", "cat": "mur", "dog": "bal", "hen": "kik", "bee": "zum", "cow": "lod", "ant": "pik"}
ADJECTIVES = {"old": "mil", "red": "tur", "big": "gra", "shy": "pel", "wet": "nos", "odd": "dri"}
VERBS = {"see": "se", "hear": "he", "like": "ama", "fear": "tim", "find": "tro", "help": "jut"}
# Halfway b f and b g look better than a c, the prefix of greedy decoding; then they split up.
WORSE = {
    (): {"a": 0.51, "b": 0.49},
    ("a",): {"c": 0.4, "d": 0.3, "e": 0.3},
    ("b",): {"f": 0.5, "g": 0.5},
    ("b", "f"): {word: 0.25 for word in "hijk"},
    ("b", "g"): {word: 0.25 for word in "hijk"},
}


def load(table, frequency, chosen, n_experts, *, mask=0.8, random=0.1):
    tokens = (1 - chosen * (mask + random)) * frequency
    tokens[MASK] += chosen * mask
    tokens[len(SPECIAL) :] += chosen * random / (len(table) - len(SPECIAL))
    return torch.bincount(table, weights=tokens, minlength=n_experts)


def translate(english):
    words = english.split()
    verb = next(i for i, word in enumerate(words) if word.removesuffix("s") in VERBS)

    def phrase(part):
        many = part[0] == "the"
        noun = part[-1].removesuffix("es" if part[-1] == "foxes" else "s")
        return " ".join(
            [f"{'zi' if many else 'zo'}-{NOUNS[noun]}{'u' if many else 'a'}", *map(ADJECTIVES.get, part[1:-1])]
        )

    article = "zi" if words[0] == "the" else "zo"
    return f"{phrase(words[:verb])} {phrase(words[verb + 1 :])} {VERBS[words[verb].removesuffix('s')]}-{article}"


def interval(first, second, *, paired=True, n=2000):
    rng = np.random.default_rng(1)
    rows = rng.integers(len(first), size=(n, len(first)))
    others = rows if paired else rng.integers(len(first), size=rows.shape)
    return np.quantile(np.asarray(second)[others].mean(1) - np.asarray(first)[rows].mean(1), [0.025, 0.975])


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (sentences.check_load, (load,)),
        (sentences.check_control, (MaskedConfig(gate="dense", pretrain=False, tune_steps=700), PRETRAINED)),
        (sentences.check_translate, (translate,)),
        (sentences.check_interval, (interval,)),
        (sentences.check_wider, (WORSE,)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


def no_mask(table, frequency, chosen, n_experts):
    return torch.bincount(table, weights=frequency, minlength=n_experts)


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (sentences.check_load, (None,), "Not answered yet"),
        (sentences.check_load, (lambda *a: [1.0],), "4 here; you give 1"),
        (sentences.check_load, (lambda *a: 2 * load(*a),), "yours to 2.000"),
        (sentences.check_load, (no_mask,), "Three things happen"),
        (sentences.check_load, (lambda *a: load(*a, mask=1.0, random=0.0),), "Three things happen"),
        (sentences.check_control, (None, PRETRAINED), "Not answered yet"),
        (sentences.check_control, (PRETRAINED, PRETRAINED), "pretrain=False"),
        (
            sentences.check_control,
            (MaskedConfig(gate="dense", pretrain=False, tune_steps=700, batch_size=64), PRETRAINED),
            "batch_size must be that of the other run",
        ),
        (
            sentences.check_control,
            (MaskedConfig(gate="dense", pretrain=False), PRETRAINED),
            "takes 700 steps in all, your control 400",
        ),
        (sentences.check_translate, (None,), "Not answered yet"),
        (sentences.check_translate, (lambda text: translate(text).replace("zi-", "zo-"),), "you say"),
        (sentences.check_interval, (None,), "Not answered yet"),
        (sentences.check_interval, (lambda a, b: interval(a, b, paired=False),), "draw the sentences once"),
        (sentences.check_interval, (lambda a, b: interval(b, a),), "second minus first"),
        (sentences.check_interval, (lambda a, b: interval(a, b) * 2 - np.mean(b - a),), "wide, about"),
        (sentences.check_wider, (None,), "Not answered yet"),
        (sentences.check_wider, ({(): {"a": 0.6, "b": 0.4}},), "beam 1 finds a (0.6), beam 2 a (0.6)"),
        (sentences.check_wider, ({(): {"a": 0.6, "b": 0.6}},), "must not be negative and sum to 1"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out


def test_the_table_model_is_searched_like_a_translator():
    table = {
        (): {"a": 0.6, "b": 0.4},
        ("a",): {"x": 0.55, "y": 0.45},
        ("b",): {"x": 0.9, sentences.STOP: 0.1},
    }
    assert sentences.translate_by_table(table, 1) == (("a", "x"), pytest.approx(0.33))
    assert sentences.translate_by_table(table, 2) == (("b", "x"), pytest.approx(0.36))
    assert sentences.translate_by_table({(): {sentences.STOP: 1.0}}, 3) == ((), 1.0)
