"""The error for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: str, valid: Iterable[str]) -> ValueError:
    """The error for a misspelt name: the nearest valid one, then all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {what} {name!r}{hint} Valid: {', '.join(valid) or 'none'}")


def check_name(what: str, name: str, valid: Iterable[str]) -> None:
    """Raise `unknown_name` unless the name is valid."""
    valid = tuple(valid)
    if name not in valid:
        raise unknown_name(what, name, valid)
