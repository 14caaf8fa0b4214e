"""Corpora for language models: one long text, cut into windows.

    row i of a split = tokens i S .. i S + S of it (S + 1 tokens: inputs are the first S, targets the last S)

so every token but the first is a target once. Splits are contiguous, as in public code for these corpora: the first
``train_share`` of the text, then half of the rest each for validation and test. A tokenizer sees the training text
only. Byte pairs of a large text take a minute of all cores: they are kept in the cache, under a checksum of the text.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from moe_lab.atomic import atomic_file
from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import official_file
from moe_lab.datasets.planted_text import DOMAINS
from moe_lab.datasets.planted_text import planted_text as make_planted_text
from moe_lab.datasets.tokens import BytePairs, Tokenizer, train_tokenizer
from moe_lab.paths import data_dir

_LONG = 5_000_000  # characters from which byte pairs are kept: seconds
_FORMAT = 1  # of kept tokens: another number when `BytePairs.train` or `encode` give others
SPLITS = ("train", "valid", "test")


def windows(ids: np.ndarray, length: int) -> torch.Tensor:
    """(N, length + 1) int64 rows of a sequence (n,), N = (n - 1) // length; what does not fill a row is left out.

    Raises:
        ValueError: the sequence is shorter than one row.
    """
    n_rows = (len(ids) - 1) // length
    if length < 1 or n_rows < 1:
        raise ValueError(
            f"{len(ids)} tokens do not fill one window of {length} + 1; take a shorter length or more text"
        )
    start = length * np.arange(n_rows)[:, None]
    return torch.from_numpy(np.asarray(ids, dtype=np.int64)[start + np.arange(length + 1)])


def _tokens(kind: str, parts: Sequence[str], n_tokens: int) -> tuple[Tokenizer, list[np.ndarray]]:
    """A tokenizer of the first part, and the ids of all."""
    learned = train_tokenizer(kind, parts[:1], n_tokens)
    return learned, [np.asarray(learned.encode(part)) for part in parts]


def kept_tokens(parts: Sequence[str], n_tokens: int) -> tuple[BytePairs, list[np.ndarray]]:
    """Byte pairs learned from the first part, and the ids of all; of a long text from the cache, or put there.

    A cache that cannot be written to is no error, and a file in it that cannot be read is made anew.
    """
    if sum(map(len, parts)) < _LONG:
        return _tokens("bpe", parts, n_tokens)
    digest = hashlib.sha256(json.dumps([_FORMAT, version("tokenizers"), n_tokens, *parts]).encode()).hexdigest()
    path = data_dir() / "tokens" / f"{digest[:16]}.npz"
    with suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error), np.load(path) as kept:
        return BytePairs(str(kept["tokenizer"])), [kept[f"ids{index}"] for index in range(len(parts))]
    learned, ids = _tokens("bpe", parts, n_tokens)
    smallest = np.uint16 if learned.n_tokens <= 2**16 else np.int64
    arrays = {f"ids{index}": of_part.astype(smallest) for index, of_part in enumerate(ids)}
    with suppress(OSError), atomic_file(path) as file:
        np.savez_compressed(file, tokenizer=np.array(learned.description), **arrays)
    return learned, ids


def corpus(
    name: str,
    text: str,
    *,
    length: int,
    tokenizer: str,
    n_tokens: int,
    train_share: float = 0.9,
    labels: np.ndarray | None = None,
) -> Dataset:
    """A text as a data set of kind "text".

    Args:
        name: of the data set.
        text: all of it.
        length: S.
        tokenizer: "characters" or "bpe".
        n_tokens: vocabulary of "bpe".
        train_share: of the text.
        labels: one number per character (characters only): becomes ``domain``.
    """
    if not 0 < train_share < 1:
        raise ValueError(f"train_share must be between 0 and 1, got {train_share}")
    if labels is not None and tokenizer != "characters":
        raise ValueError("labels belong to characters: tokenizer must be 'characters'")
    first = int(train_share * len(text))
    second = first + (len(text) - first) // 2
    ranges = dict(zip(SPLITS, (slice(0, first), slice(first, second), slice(second, None)), strict=True))
    parts = [text[part] for part in ranges.values()]
    learned, ids = kept_tokens(parts, n_tokens) if tokenizer == "bpe" else _tokens(tokenizer, parts, n_tokens)
    splits = []
    for part, of_part in zip(ranges.values(), ids, strict=True):
        arrays = {"tokens": windows(of_part, length)}
        if labels is not None:
            arrays["domain"] = windows(labels[part], length)
        splits.append(arrays)
    info = {"n_tokens": learned.n_tokens, "tokenizer": learned, "length": length}
    return Dataset(name, "text", *splits, info=info | ({} if labels is None else {"domains": DOMAINS}))


def planted_text(seed: int = 0, *, n_characters: int = 200_000, length: int = 64) -> Dataset:
    """Four little languages in turn, see `moe_lab.datasets.planted_text`; ``domain`` is the planted expert."""
    text, domain = make_planted_text(seed, n_characters=n_characters)
    return corpus(
        "planted-text", text, length=length, tokenizer="characters", n_tokens=0, train_share=0.8, labels=domain
    )


def tiny_shakespeare(
    seed: int = 0, *, length: int = 64, tokenizer: str = "characters", n_tokens: int = 2048
) -> Dataset:
    """1.1 million characters of Shakespeare; the seed changes nothing, the text is what it is."""
    text = official_file("tiny-shakespeare", "tinyshakespeare.txt").read_text(encoding="utf-8")
    return corpus("tiny-shakespeare", text, length=length, tokenizer=tokenizer, n_tokens=n_tokens)


def text_file(
    seed: int = 0, *, path: str = "", length: int = 256, tokenizer: str = "bpe", n_tokens: int = 8192
) -> Dataset:
    """Your own text: one UTF-8 file, or a folder whose ``*.txt`` files are read in the order of their names.

    Raises:
        ValueError: no path, nothing there, or nothing in it.
    """
    if not path:
        raise ValueError("text-file needs path=..., a text file or a folder of .txt files")
    root = Path(path).expanduser()
    files = sorted(root.rglob("*.txt")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"no text at {root}: give a UTF-8 file, or a folder with .txt files")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not text.strip():
        raise ValueError(f"{root} holds no text")
    return corpus("text-file", text, length=length, tokenizer=tokenizer, n_tokens=n_tokens)
