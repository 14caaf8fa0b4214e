"""SQuAD v2.0 (Rajpurkar, Jia, Liang, ACL 2018): questions about a paragraph; half of dev has no answer in it.

COMET (KDD 2023), supplement: the question-answering task of COMET-BERT, scored by F1 and exact match on the dev set.

The official JSON: {"version": "v2.0", "data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question",
"is_impossible", "answers": [{"text", "answer_start"}], "plausible_answers": [...]}]}]}]}. 130,319 questions about 442
articles in train, 11,873 about 35 in dev, where several people answered each. Plausible answers to impossible questions
are traps, not answers, and are not read. Contexts are kept as they are: offsets count their leading white space. The
test set was never published: dev is our test set. Validation is held out by whole articles: a paragraph is asked about
several times, and must not be on both sides.

Characters to tokens and back: `moe_lab.datasets.squad_spans`. EM and F1: `moe_lab.metrics.squad`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe_lab.datasets.cache import official_file
from moe_lab.datasets.splits import generators

VERSION = "v2.0"


@dataclass(frozen=True)
class Answer:
    """``text`` is ``context[start : start + len(text)]``, without white space at its ends."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The place after its last character."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        id: the official one.
        title: of the article.
        question, context: texts.
        answers: one in train, several in dev, none if ``is_impossible``.
        is_impossible: the paragraph does not answer the question.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    is_impossible: bool


@dataclass(frozen=True, eq=False)
class SquadTask:
    """Train and validation: parts of the official train set, by article. Test: the official dev set."""

    train: list[Question]
    valid: list[Question]
    test: list[Question]
    title: str = "SQuAD v2.0"
    metrics: tuple[str, ...] = ("f1", "exact")


def _answer(context: str, text: str, start: int) -> Answer:
    """White space at its ends taken off. ValueError if it is empty, or not at this place of the context."""
    stripped = text.strip()
    answer = Answer(stripped, start + len(text) - len(text.lstrip()))
    if not stripped or context[answer.start : answer.end] != stripped:
        raise ValueError(f"the answer {text!r} is not at character {start} of its context")
    return answer


def read_squad(path: Path) -> list[Question]:
    """All questions of an official file, in its order.

    Raises:
        ValueError: not JSON (cut short, empty), another version, a field that is missing, an answer that is not
            where it is said to be, an impossible question with answers or a possible one without. Names file and
            question.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"{path}: not JSON, or cut short ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r}, expected SQuAD {VERSION!r}")
    found, where = [], "its top level"
    try:
        for article in content["data"]:
            where = f"article {article['title']!r}"
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for row in paragraph["qas"]:
                    where = f"question {row['id']!r}"
                    impossible = bool(row["is_impossible"])
                    answers = tuple(_answer(context, a["text"], a["answer_start"]) for a in row["answers"])
                    if impossible == bool(answers):
                        raise ValueError(f"is_impossible is {impossible}, but there are {len(answers)} answers")
                    found.append(
                        Question(row["id"], article["title"], row["question"].strip(), context, answers, impossible)
                    )
    except KeyError as error:
        raise ValueError(f"{path}, {where}: no field {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}, {where}: not of the official format ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}, {where}: {error}") from error
    if not found:
        raise ValueError(f"{path}: no questions")
    return found


def _fewer(what: str, rows: list[Question], n: int | None, order: list[int]) -> list[Question]:
    if n is None:
        return rows
    if not 1 <= n <= len(rows):
        raise ValueError(f"{what}={n}: must be between 1 and the {len(rows):,} questions there are (None takes all)")
    return [rows[i] for i in order[:n]]


def load_squad(
    seed: int = 0, *, n_train: int | None = None, n_valid: int = 2000, n_test: int | None = None
) -> SquadTask:
    """SQuAD v2.0 from the cache.

    Args:
        seed: of the articles held out and of every choice of fewer questions.
        n_train, n_test: so many questions, drawn at random; None: all, in the official order.
        n_valid: articles are held out until they hold at least so many questions; then exactly so many are drawn.

    Raises:
        DatasetNotFound: not in the cache, with the command that gets it.
        ValueError: `read_squad`; more questions than there are, or validation that leaves nothing to train on.
    """
    train, dev = (read_squad(official_file("squad-v2", f"squad-v2/{part}-v2.0.json")) for part in ("train", "dev"))
    articles, *orders = generators(seed, 4)
    titles = list(dict.fromkeys(row.title for row in train))
    per_title = {title: 0 for title in titles}
    for row in train:
        per_title[row.title] += 1
    held: set[str] = set()
    for index in articles.permutation(len(titles)):
        if sum(per_title[title] for title in held) >= n_valid:
            break
        held.add(titles[index])
    fit, valid = [r for r in train if r.title not in held], [r for r in train if r.title in held]
    if not fit:
        raise ValueError(f"n_valid={n_valid} takes all {len(titles)} articles and leaves none to train on")
    sizes = (("n_train", fit, n_train), ("n_valid", valid, n_valid), ("n_test", dev, n_test))
    return SquadTask(
        *(
            _fewer(what, rows, n, rng.permutation(len(rows)).tolist())
            for (what, rows, n), rng in zip(sizes, orders, strict=True)
        )
    )
