"""Exact match and F1 of answers, as SQuAD v2.0 counts them.

    normal form   lower case; ASCII punctuation deleted; the words a, an, the deleted; one space between words
    exact         1 if the normal forms are equal
    F1            2 P R / (P + R) over the words of the normal forms, each as often as it occurs

Of several official answers the best counts, for each of the two on its own. Official answers whose normal form is empty
are left out. A question without an answer has the answer "": predicting nothing (or "the") scores 1 on both, anything
else 0; and predicting nothing where there is an answer scores 0.

No library computes this without bringing a framework or a download: torchmetrics has v1.1 only, `evaluate` loads the
official script over the network. So it is here, written from the definition.

Where we differ: shares in [0, 1]; the official script prints percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normal_form(text: str) -> str:
    """Punctuation goes first: "the-end" becomes the word "theend", whose article stays."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, answer: str) -> float:
    """1 or 0."""
    return float(normal_form(prediction) == normal_form(answer))


def word_f1(prediction: str, answer: str) -> float:
    """In [0, 1]; without words on one side: 1 if the other has none either."""
    found, wanted = normal_form(prediction).split(), normal_form(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def squad_score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over questions.

    Args:
        predictions: N texts; "" says that there is no answer.
        answers: the official answers of each question; none for an impossible one.

    Returns:
        ``f1`` and ``exact`` of all; ``f1_answered`` and ``exact_answered`` of the questions that have an answer;
        ``impossible_found``, the share of the impossible ones that were left unanswered (their f1 and exact). Of a kind
        that does not occur there is no number.

    Raises:
        ValueError: no questions, or lengths that differ.
    """
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions for {len(answers)} questions; give one for each, at least one"
        )
    rows = []
    for prediction, official in zip(predictions, answers, strict=True):
        wanted = [answer for answer in official if normal_form(answer)]
        pairs = [(word_f1(prediction, answer), exact(prediction, answer)) for answer in wanted or [""]]
        rows.append((bool(wanted), max(f1 for f1, _ in pairs), max(em for _, em in pairs)))

    def means(chosen: list[tuple[bool, float, float]]) -> tuple[float, float]:
        return sum(row[1] for row in chosen) / len(chosen), sum(row[2] for row in chosen) / len(chosen)

    scores = dict(zip(("f1", "exact"), means(rows), strict=True))
    if answered := [row for row in rows if row[0]]:
        scores |= zip(("f1_answered", "exact_answered"), means(answered), strict=True)
    if impossible := [row for row in rows if not row[0]]:
        scores["impossible_found"] = means(impossible)[1]
    return scores
