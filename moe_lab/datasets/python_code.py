"""Running text that is a click away and has more to learn than Shakespeare: 40 million characters of Python.

The modules of four pure-Python packages in fixed versions, as PyPI has them, without their tests: algebra (SymPy),
graphs (NetworkX), the web (Django), arrays (JAX). Files follow each other in the order of a checksum of their names, so
that each package is in each split; a split begins in the middle of a file.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cache import official_file
from moe_lab.datasets.registry import SOURCES
from moe_lab.datasets.text import corpus


def modules_of(wheel: Path) -> dict[str, str]:
    """Path within the wheel -> text, for every module that is no test and not empty."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") and "tests" not in name.split("/")]
        texts = {name: archive.read(name).decode("utf-8") for name in names}
    return {name: text for name, text in texts.items() if text.strip()}


def python_code(seed: int = 0, *, length: int = 256, tokenizer: str = "bpe", n_tokens: int = 4096) -> Dataset:
    """Source code of SymPy, NetworkX, Django and JAX; the seed changes nothing, the text is what it is.

    Raises:
        DatasetNotFound: a package is not in the cache; the message says how to fetch it.
    """
    modules: dict[str, str] = {}
    for file in SOURCES["python-code"].files:
        modules |= modules_of(official_file("python-code", file.path))
    ordered = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest())
    text = "\n".join(modules[name] for name in ordered)
    return corpus("python-code", text, length=length, tokenizer=tokenizer, n_tokens=n_tokens)
