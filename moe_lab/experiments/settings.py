"""What configs of experiments share: profiles by name, data by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from moe_lab.datasets import Dataset, load
from moe_lab.names import check_name


def profile_settings(
    cls: type, profiles: Mapping[str, Mapping[str, Any]], name: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a profile, some of them changed.

    Args:
        cls: the config, a dataclass.
        profiles: name -> fields that differ from the defaults.
        name: of the profile.
        changes: field -> value.

    Raises:
        ValueError: unknown profile or field, with the nearest valid name.
    """
    check_name("profile", name, profiles)
    for key in changes:
        check_name(f"field of {cls.__name__}", key, cls.__dataclass_fields__)
    return {**profiles[name], **changes}


def part_of(config: Any, kind: type) -> Any:
    """The fields that a config inherits from ``kind``, one of its bases: what several runs share."""
    return kind(**{each.name: getattr(config, each.name) for each in fields(kind)})


@lru_cache(maxsize=2)
def _load(name: str, seed: int, options: tuple[tuple[str, Any], ...]) -> Dataset:
    return load(name, seed=seed, **dict(options))


def load_of_kind(config: Any, kind: str, what: str) -> Dataset:
    """The data of a config with ``dataset``, ``data_seed`` and ``data_options``; runs of one process share them.

    Args:
        config: of the experiment.
        kind: of the data set that it needs.
        what: what needs it, for the error: "a language model".

    Raises:
        ValueError: the data set is of another kind.
        DatasetNotFound: it is not in the cache; the message says how to fetch it.
    """
    data = _load(config.dataset, config.data_seed, tuple(sorted(config.data_options.items())))
    if data.kind != kind:
        raise ValueError(f"{what} needs a data set of kind {kind!r}; {config.dataset!r} has {data.kind!r}")
    return data
