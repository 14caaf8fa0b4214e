"""Text tasks for fine-tuning: the seven GLUE tasks of COMET-BERT, and one that needs no download.

COMET (KDD 2023), supplement, section on BERT: CoLA, SST-2, MRPC, QQP, MNLI, QNLI, RTE, scored on the official dev sets.

    name    rows of train / dev         text                  label 0, 1, (2)                          metrics
    cola          8,551 / 1,043         one sentence          not acceptable, acceptable               matthews
    sst2         67,349 / 872           one sentence          negative, positive                       accuracy
    mrpc          3,668 / 408           two sentences         no paraphrase, paraphrase                accuracy, f1
    qqp         363,846 / 40,430        two questions         not the same, the same                   accuracy, f1
    mnli        392,702 / 9,815, 9,832  premise, hypothesis   entailment, neutral, contradiction       accuracy
    qnli        104,743 / 5,463         question, sentence    entailment (answered), not               accuracy
    rte           2,490 / 277           two sentences         entailment, not                          accuracy

The labels of the official test sets were never published: the dev set is our test set, and a part of train, drawn
stratified by label, is held out for validation. Texts stay texts here; a tokenizer belongs to the model that reads
them. Which file has which columns: `moe_lab.datasets.glue_files`.

Where we differ: the papers choose the best epoch and the best of a hundred trials *on the dev set* that they report;
with a validation set of its own the reported number is not the best of many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_lab.datasets.glue_files import FORMATS, read_pair
from moe_lab.datasets.planted_sentences import DOMAINS, planted_sentences
from moe_lab.datasets.splits import generators, stratified_split, thin
from moe_lab.names import check_name

PLANTED = "planted-sentences"
_PLANTED_ROWS = {"n_train": 4000, "n_valid": 500, "n_test": 1000}
_MOST_VALID = 2000  # and never more than a tenth of train: RTE has 2,490 rows in all


@dataclass(frozen=True, eq=False)
class TextRows:
    """N texts, or pairs of texts, with a label.

    Attributes:
        first: N texts.
        second: N texts that belong to them; None for tasks on single sentences.
        label: (N,) int64, 0 .. n_classes - 1.
        domain: (N,) int64, which of several planted vocabularies a row was written with; None for real data.
    """

    first: list[str]
    second: list[str] | None
    label: np.ndarray
    domain: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {len(column) for column in (self.first, self.second, self.label, self.domain) if column is not None}
        if len(lengths) != 1:
            raise ValueError(f"first, second, label and domain must have the same number of rows, got {lengths}")

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: np.ndarray) -> TextRows:
        """The rows of these indices, in their order."""
        index = np.asarray(index, dtype=np.int64)
        return TextRows(
            [self.first[i] for i in index],
            None if self.second is None else [self.second[i] for i in index],
            self.label[index],
            None if self.domain is None else self.domain[index],
        )


@dataclass(frozen=True, eq=False)
class TextTask:
    """A task: what to learn from, what to choose by, what to report.

    Attributes:
        name: as given to `load_task`.
        train, valid, test: rows. For GLUE: most of the official train set, the rest of it, the official dev set.
        n_classes: of the label; 1 would mean a regression (none of these tasks is one).
        metrics: names for `moe_lab.metrics.glue.score`; the first is the one to choose by.
        title: to be read by people.
    """

    name: str
    train: TextRows
    valid: TextRows
    test: TextRows
    n_classes: int
    metrics: tuple[str, ...]
    title: str


def task_names() -> list[str]:
    """Every name that `load_task` takes, the embedded one first."""
    return [PLANTED, *FORMATS]


def metrics_of(name: str) -> tuple[str, ...]:
    """The metrics of a task, without loading it.

    Raises:
        ValueError: unknown name, with the nearest one.
    """
    check_name("task", name, task_names())
    return ("accuracy",) if name == PLANTED else FORMATS[name].metrics


def load_task(
    name: str,
    seed: int = 0,
    *,
    n_train: int | None = None,
    n_valid: int | None = None,
    n_test: int | None = None,
    mismatched: bool = False,
) -> TextTask:
    """A task by name. The same arguments give the same rows on every machine.

    Args:
        name: one of `task_names()`.
        seed: of the validation rows and of every choice of fewer rows; of the planted sentences.
        n_train: so many rows of what validation leaves of train; None: all (planted: 4,000).
        n_valid: rows of train held out, at least 1; None: 2,000, or a tenth of train if that is less (planted: 500).
        n_test: so many rows of the dev set, drawn at random; None: all, in the official order (planted: 1,000).
        mismatched: test MNLI on the dev set from other genres than those of train.

    Raises:
        ValueError: unknown name, with the nearest one; more rows than there are; ``mismatched`` for another task than
            MNLI; a file that is not in the official format.
        DatasetNotFound: files that are not in the cache, with the command that gets them.
    """
    check_name("task", name, task_names())
    if mismatched and name != "mnli":
        raise ValueError(f"mismatched=True is for 'mnli'; {name!r} has one dev set")
    if name == PLANTED:
        return _planted(seed, n_train, n_valid, n_test)
    form = FORMATS[name]
    train, dev = (TextRows(*columns) for columns in read_pair(name, mismatched))
    hold_out, choose = generators(seed, 2)
    n_valid = min(_MOST_VALID, len(train) // 10) if n_valid is None else n_valid
    if not 1 <= n_valid < len(train):
        raise ValueError(f"n_valid={n_valid}: must be between 1 and {len(train) - 1:,}, one less than train has rows")
    fit, valid, _ = stratified_split(train.label, n_valid, 0, hold_out)
    test = dev if n_test is None else dev.take(thin("n_test", choose.permutation(len(dev)), n_test))
    title = form.title + (", mismatched" if mismatched else "")
    return TextTask(
        name, train.take(thin("n_train", fit, n_train)), train.take(valid), test, len(form.labels), form.metrics, title
    )


def _planted(seed: int, n_train: int | None, n_valid: int | None, n_test: int | None) -> TextTask:
    """The rows of `planted_sentences`, no sentence twice; as many as asked for."""
    asked = {"n_train": n_train, "n_valid": n_valid, "n_test": n_test}
    sizes = {key: _PLANTED_ROWS[key] if value is None else value for key, value in asked.items()}
    for key, value in sizes.items():
        if value < 1:
            raise ValueError(f"{key}={value}: must be at least 1")
    texts, label, domain = planted_sentences(seed, n=sum(sizes.values()))
    rows = TextRows(texts, None, label, domain)
    cuts = np.split(np.arange(len(rows)), np.cumsum([sizes["n_train"], sizes["n_valid"]]))
    title = f"planted judgements of {len(DOMAINS)} kinds of things"
    return TextTask(PLANTED, *map(rows.take, cuts), 2, metrics_of(PLANTED), title)
