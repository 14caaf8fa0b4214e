"""The official files of the GLUE tasks, column by column: tables of tabs, never quoted.

    cola  CoLA.zip                       no header; source, label, the authors' star, sentence
    sst2  SST-2.zip                      sentence, label (the registry's stand-ins: another order, or ``content``)
    mrpc  msr_paraphrase_train.txt       Quality, #1 ID, #2 ID, #1 String, #2 String; begins with a byte order mark
          mrpc_dev_ids.tsv               no header; the two ids of each pair of train that GLUE took for its dev set
    qqp   QQP-clean.zip                  id, qid1, qid2, question1, question2, is_duplicate; a few rows are broken
    mnli  MNLI.zip                       index ... sentence1, sentence2, label1 ... gold_label: 12 columns in train, 16
                                         in dev, so columns are found by name
    qnli  QNLIv2.zip                     index, question, sentence, label
    rte   RTE.zip                        index, sentence1, sentence2, label

A quotation mark is a character like any other: read as csv usually is, half of a table can vanish into one field. A row
that lacks fields is an error that names its line, except in QQP, where questions with line breaks have left such rows:
they are skipped, as everybody does. The archives' test.tsv have no labels and are not read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_lab.datasets.cache import archive_member, official_file, stand_ins

Columns = tuple[list[str], "list[str] | None", np.ndarray]
"""first, second, label: what `moe_lab.datasets.glue.TextRows` holds."""


@dataclass(frozen=True)
class Format:
    """One task's table.

    Attributes:
        title: to be read by people.
        archive: as the registry names it; empty for MRPC, which comes as single files.
        texts: column of the first text, and of the second if there is one. Alternatives are separated by "|".
        label: its column.
        labels: what stands in it, in the order of the classes.
        metrics: names for `moe_lab.metrics.glue.score`.
        header: the columns of a table that does not name them itself.
        broken_rows: skip rows that lack fields instead of refusing the file.
    """

    title: str
    archive: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    header: tuple[str, ...] = ()
    broken_rows: bool = False


_ENTAILMENT = ("entailment", "not_entailment")

FORMATS: dict[str, Format] = {
    "sst2": Format("SST-2, sentiment", "SST-2.zip", ("sentence|content",), "label", ("0", "1"), ("accuracy",)),
    "cola": Format(
        "CoLA, acceptability",
        "CoLA.zip",
        ("sentence",),
        "label",
        ("0", "1"),
        ("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    "mrpc": Format("MRPC, paraphrase", "", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1")),
    "qqp": Format(
        "QQP, the same question",
        "QQP-clean.zip",
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        ("accuracy", "f1"),
        broken_rows=True,
    ),
    "mnli": Format(
        "MNLI, inference",
        "MNLI.zip",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
    ),
    "qnli": Format(
        "QNLI, is the question answered", "QNLIv2.zip", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)
    ),
    "rte": Format("RTE, entailment", "RTE.zip", ("sentence1", "sentence2"), "label", _ENTAILMENT, ("accuracy",)),
}


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row. utf-8-sig: with or without a byte order mark."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for fields in reader:
            if fields:
                yield reader.line_num, fields


def _place(path: Path, header: list[str], column: str) -> int:
    for name in column.split("|"):
        if name in header:
            return header.index(name)
    raise ValueError(f"{path}: no column {column.replace('|', ' or ')!r}; its first line is {header}")


def read_rows(path: Path, form: Format, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and the fields of these columns, white space stripped.

    Raises:
        ValueError: an empty file, one without these columns, a row that lacks fields (unless the format allows it).
    """
    lines = _lines(path)
    try:
        header = list(form.header) if form.header else next(lines)[1]
    except StopIteration:
        raise ValueError(f"{path}: the file is empty") from None
    places = [_place(path, header, column) for column in columns]
    for number, fields in lines:
        if len(fields) < len(header) and form.broken_rows:
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}). Is the "
                "file cut short or another one? `moe-lab data check` compares it with the official one."
            )
        yield number, [fields[place].strip() for place in places]


def read_table(path: Path, form: Format, *also: str) -> tuple[Columns, list[tuple[str, ...]]]:
    """The texts and labels of a table, and the columns ``also``, one tuple per row.

    Raises:
        ValueError: as `read_rows`; no rows; a label that is none of the format's.
    """
    n_texts = len(form.texts)
    texts: list[list[str]] = [[] for _ in range(n_texts)]
    labels, others = [], []
    number_of = {label: number for number, label in enumerate(form.labels)}
    for number, (label, *fields) in read_rows(path, form, form.label, *form.texts, *also):
        if not label and form.broken_rows:
            continue
        if label not in number_of:
            raise ValueError(f"{path}, line {number}: label {label!r}, expected one of {', '.join(form.labels)}")
        for column, text in zip(texts, fields[:n_texts], strict=True):
            column.append(text)
        labels.append(number_of[label])
        others.append(tuple(fields[n_texts:]))
    if not labels:
        raise ValueError(f"{path}: no rows")
    return (texts[0], texts[1] if n_texts > 1 else None, np.array(labels, dtype=np.int64)), others


def _read_mrpc() -> tuple[Columns, Columns]:
    """The original train file, cut into GLUE's train and dev set by the list of ids."""
    form = FORMATS["mrpc"]
    path, list_path = (
        official_file("mrpc", f"mrpc/{name}") for name in ("msr_paraphrase_train.txt", "mrpc_dev_ids.tsv")
    )
    dev_ids = set()
    for number, fields in _lines(list_path):
        if len(fields) != 2:
            raise ValueError(f"{list_path}, line {number}: {len(fields)} fields, expected the two ids of a pair")
        dev_ids.add(tuple(field.strip() for field in fields))
    (first, second, label), ids = read_table(path, form, "#1 ID", "#2 ID")
    is_dev = np.array([pair in dev_ids for pair in ids])
    if len(dev_ids) == 0 or is_dev.sum() != len(dev_ids):
        raise ValueError(
            f"{path}: has {is_dev.sum()} of the {len(dev_ids)} pairs in {list_path.name}: they do not belong together"
        )

    def part(chosen: np.ndarray) -> Columns:
        rows = np.flatnonzero(chosen)
        return [first[i] for i in rows], [second[i] for i in rows], label[rows]

    return part(~is_dev), part(is_dev)


def read_pair(name: str, mismatched: bool = False) -> tuple[Columns, Columns]:
    """The official train and dev set of one of `FORMATS`, from the cache.

    Raises:
        DatasetNotFound: not in the cache.
        ValueError: not in the official format; says which line and what was expected.
    """
    if name == "mrpc":
        return _read_mrpc()
    form = FORMATS[name]
    dev = ("dev_mismatched" if mismatched else "dev_matched") if name == "mnli" else "dev"
    paths = stand_ins(name) or [archive_member(name, form.archive, f"{part}.tsv") for part in ("train", dev)]
    train_path, dev_path = paths
    return read_table(train_path, form)[0], read_table(dev_path, form)[0]
