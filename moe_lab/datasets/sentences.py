"""Sentences with a label, for fine-tuning; padded at the end.

``planted-judgements`` (embedded): sentences of the four little languages of `moe_lab.datasets.planted_text`; in half of
them something is wrong: the sum, an ending, a bracket, a letter of the echo. Label 1: all right. ``domain`` says which
language. ``sst2``: film reviews, label 1 for positive; the official dev set is our test set (test labels were never
published), and a part of train is held out for validation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.glue_files import read_pair
from moe_lab.datasets.planted_text import DOMAINS, spoil, write_sentence
from moe_lab.datasets.splits import generators, stratified_split
from moe_lab.datasets.tokens import END, PAD, START, Tokenizer, train_tokenizer


def padded(encoded: Sequence[Sequence[int]], length: int, *, start: bool = False, end: bool = False) -> torch.Tensor:
    """(N, length) int64 of token ids, cut off at ``length``, padded behind; with <s> before or </s> behind each.

    A sentence that is cut off keeps its </s>, so that every row ends as a sentence does.
    """
    rows = torch.full((len(encoded), length), PAD)
    room = length - start - end
    if room < 1:
        raise ValueError(f"length {length} leaves no room for a token")
    for row, ids in zip(rows, encoded, strict=True):
        whole = [START] * start + list(ids[:room]) + [END] * end
        row[: len(whole)] = torch.tensor(whole, dtype=torch.int64)
    return rows


def labelled(
    name: str, texts: dict[str, list[str]], labels: dict[str, np.ndarray], tokenizer: Tokenizer, length: int, **info
) -> Dataset:
    """A data set of kind "sentences" from texts and labels per split."""
    splits = [
        {
            "tokens": padded([tokenizer.encode(text) for text in texts[split]], length),
            "label": torch.from_numpy(np.asarray(labels[split], dtype=np.int64)),
        }
        for split in ("train", "valid", "test")
    ]
    facts = {"n_tokens": tokenizer.n_tokens, "tokenizer": tokenizer, "length": length, "n_classes": 2, **info}
    return Dataset(name, "sentences", *splits, info=facts)


def planted_judgements(
    seed: int = 0, *, n_train: int = 4000, n_valid: int = 500, n_test: int = 1000, length: int = 48
) -> Dataset:
    """Right or wrong? Characters; see the module's text."""
    write, split = generators(seed, 2)
    n = n_train + n_valid + n_test
    domain = write.permutation(np.arange(n) % len(DOMAINS))
    label = write.permutation(np.arange(n) % 2)
    texts = [write_sentence(int(d), write) for d in domain]
    texts = [text if good else spoil(text, int(d), write) for text, d, good in zip(texts, domain, label, strict=True)]
    rows = dict(zip(("train", "valid", "test"), stratified_split(label, n_valid, n_test, split), strict=True))
    chosen = {name: [texts[i] for i in index] for name, index in rows.items()}
    tokenizer = train_tokenizer("characters", [write_alphabet()])
    data = labelled(
        "planted-judgements", chosen, {name: label[i] for name, i in rows.items()}, tokenizer, length, domains=DOMAINS
    )
    for name, index in rows.items():
        data.splits[name]["domain"] = torch.from_numpy(domain[index])
    return data


def write_alphabet() -> str:
    """Every character that the little languages have, so that the vocabulary does not depend on the sample."""
    return "abcdefghijklmnopqrstuvwxyz0123456789()[]{}+=|. "


def sst2(
    seed: int = 0, *, length: int = 48, n_tokens: int = 8192, n_valid: int = 2000, n_train: int | None = None
) -> Dataset:
    """SST-2: 65,349 / 2,000 / 872 sentences, byte pairs trained on the training sentences.

    Args:
        seed: of the validation rows.
        length: in tokens; longer sentences are cut off.
        n_tokens: of the vocabulary.
        n_valid: rows of the official train set held out.
        n_train: use only so many of the rest.
    """
    (texts, _, labels), (test_texts, _, test_labels) = read_pair("sst2")
    (rng,) = generators(seed, 1)
    fit_rows, valid_rows, _ = stratified_split(labels, n_valid, 0, rng)
    fit_rows = rng.permutation(fit_rows)[:n_train]
    chosen = {
        "train": [texts[i] for i in fit_rows],
        "valid": [texts[i] for i in valid_rows],
        "test": test_texts,
    }
    of_split = {"train": labels[fit_rows], "valid": labels[valid_rows], "test": test_labels}
    return labelled("sst2", chosen, of_split, train_tokenizer("bpe", chosen["train"], n_tokens), length)
