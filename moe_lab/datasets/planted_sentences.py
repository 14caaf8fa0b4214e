"""Little reviews that need no download: good or bad? In English words, so that any tokenizer can read them.

What is planted. A review is about a thing of one ``domain`` (films, food, rooms, phones), and whether it is praise
depends on three things that a bag of words does not show:

    what a word is worth   six adjectives are praise in two domains and blame in the others, one for each way to choose
                           two of four: "a quiet room" is good, "a quiet film" is not. Ten mean the same everywhere.
    negation               "is not good" is bad, "is never dull" is good
    what counts            "A but B": B; "although A , B": B; "A although B": A. The other half says the opposite.

Measured with 4,000 sentences (seed 0): a linear model gets 0.54 of the test sentences right by words, 0.69 by words and
pairs of neighbours; a transformer of two layers, width 64, 0.97 after 14 epochs, half a minute on one CPU core.
Labels and domains are balanced; no sentence occurs twice, not even across splits. What a word is worth is planted, not
English: "a warm phone" is blame here by decree.

Experts could specialise by the kind of token (nouns, which name the domain; judgements; the small words that turn a
judgement round) or by domain: which of them does a gate find?
"""

from __future__ import annotations

import numpy as np

from moe_lab.datasets.splits import generators

DOMAINS = ("films", "food", "rooms", "phones")

_NOUNS = (
    ("film", "plot", "scene", "actor", "music"),
    ("soup", "bread", "coffee", "salad", "cake"),
    ("room", "bed", "kitchen", "garden", "view"),
    ("phone", "screen", "camera", "battery", "case"),
)
_PRAISE = ("good", "great", "fine", "lovely", "nice")
_BLAME = ("bad", "poor", "awful", "dull", "weak")
WORTH = {  # praise (1) or blame (0) about films, food, rooms, phones
    "rich": (1, 1, 0, 0),
    "strange": (1, 0, 1, 0),
    "dark": (1, 0, 0, 1),
    "warm": (0, 1, 1, 0),
    "light": (0, 1, 0, 1),
    "quiet": (0, 0, 1, 1),
}
_VERBS = ("is", "was")
_PLAIN = ("", "very", "really")
_TURNING = ("not", "never")
_ARTICLES = ("the", "this", "our")
_WITHIN_DOMAIN = 0.4  # share of judgements by one of the six words of `WORTH`
_TURNED = 0.3  # share of clauses with a negation
_FRAMES = ("{a} .", "{a} .", "{a} .", "{b} but {a} .", "although {b} , {a} .", "{a} although {b} .")


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _clause(good: int, domain: int, rng: np.random.Generator) -> str:
    """ "the soup is not dark": praise if ``good``, else blame."""
    turned = bool(rng.random() < _TURNED)
    word_is_good = good != turned
    if rng.random() < _WITHIN_DOMAIN:
        words = tuple(word for word, worth in WORTH.items() if worth[domain] == word_is_good)
    else:
        words = _PRAISE if word_is_good else _BLAME
    degree = _pick(rng, _TURNING if turned else _PLAIN)
    parts = (_pick(rng, _ARTICLES), _pick(rng, _NOUNS[domain]), _pick(rng, _VERBS), degree, _pick(rng, words))
    return " ".join(part for part in parts if part)


def planted_sentences(seed: int = 0, *, n: int = 5500) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reviews, their labels and their domains, in random order.

    Args:
        seed: of everything.
        n: number of reviews, at least 1, all different.

    Returns:
        n texts of 5 to 13 words and signs; (n,) int64 label, 1 for praise; (n,) int64 domain, 0 .. 3. Labels and
        domains are balanced to within one row each.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    order, write = generators(seed, 2)
    kind = order.permutation(np.arange(n) % (2 * len(DOMAINS)))
    label, domain = kind % 2, kind // 2
    texts: dict[str, None] = {}
    for good, about in zip(label.tolist(), domain.tolist(), strict=True):
        while True:
            text = _pick(write, _FRAMES).format(a=_clause(good, about, write), b=_clause(1 - good, about, write))
            if text not in texts:
                break
        texts[text] = None
    return list(texts), label.astype(np.int64), domain.astype(np.int64)
