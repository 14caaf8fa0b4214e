"""`load`: from a name to a `Dataset`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from moe_lab.datasets import cache
from moe_lab.datasets.base import Dataset
from moe_lab.datasets.books import books
from moe_lab.datasets.cifar import cifar_10, cifar_10_lt, cifar_100, cifar_100_lt
from moe_lab.datasets.digits import digits_mixture, multidigits
from moe_lab.datasets.exit_images import moved_digits, planted_difficulty
from moe_lab.datasets.jester import jester
from moe_lab.datasets.mnist import mnist, multifashion, multimnist
from moe_lab.datasets.mnist_svhn import mnist_svhn
from moe_lab.datasets.movielens import ml_1m, ml_100k
from moe_lab.datasets.pairs import multi30k, planted_pairs
from moe_lab.datasets.planted_clusters import planted_clusters
from moe_lab.datasets.planted_recommender import planted_recommender
from moe_lab.datasets.python_code import python_code
from moe_lab.datasets.registry import DATASETS
from moe_lab.datasets.sentences import planted_judgements, sst2
from moe_lab.datasets.svhn import svhn
from moe_lab.datasets.text import planted_text, text_file, tiny_shakespeare
from moe_lab.names import unknown_name

BUILDERS: dict[str, Callable[..., Dataset]] = {
    "planted-recommender": planted_recommender,
    "planted-clusters": planted_clusters,
    "multidigits": multidigits,
    "digits-mixture": digits_mixture,
    "planted-text": planted_text,
    "planted-judgements": planted_judgements,
    "planted-pairs": planted_pairs,
    "text-file": text_file,
    "moved-digits": moved_digits,
    "planted-difficulty": planted_difficulty,
    "ml-100k": ml_100k,
    "ml-1m": ml_1m,
    "jester": jester,
    "books": books,
    "multimnist": multimnist,
    "multifashion": multifashion,
    "mnist-svhn": mnist_svhn,
    "mnist": mnist,
    "svhn": svhn,
    "cifar-10": cifar_10,
    "cifar-100": cifar_100,
    "cifar-10-lt": cifar_10_lt,
    "cifar-100-lt": cifar_100_lt,
    "tiny-shakespeare": tiny_shakespeare,
    "python-code": python_code,
    "sst2": sst2,
    "multi30k": multi30k,
}


def names() -> list[str]:
    """Every name that `load` takes, embedded data first."""
    return list(DATASETS)


def available(name: str) -> bool:
    """Embedded, or its files are in the cache."""
    return cache.is_available(_known(name))


def load(name: str, seed: int = 0, **options: Any) -> Dataset:
    """Build a data set. The same name, seed and options give the same tensors on every machine.

    Args:
        name: one of `names()`.
        seed: of everything random in it: negatives, pairs, splits, planted structure.
        options: keywords of the function that builds it, e.g. ``n_train=2000`` (see `options_of`).

    Raises:
        ValueError: unknown name or option, with the nearest valid one; a value out of range.
        DatasetNotFound: real data that is not in the cache, with the command that gets it.
    """
    valid = options_of(name)
    for option in options:
        if option not in valid:
            raise unknown_name(f"option of {name!r}", option, valid)
    return BUILDERS[name](seed, **options)


def options_of(name: str) -> dict[str, Any]:
    """The options of a data set and their defaults."""
    parameters = inspect.signature(BUILDERS[_known(name)]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "seed"}


def _known(name: str) -> str:
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    return name
