"""How every check answers."""

from __future__ import annotations

from typing import Any


def verdict(answer: Any, problem: str, praise: str) -> bool:
    """Print what a check found, and return whether the answer is right.

    Args:
        answer: what the reader gave; None means not tried yet.
        problem: what is wrong, empty when nothing is.
        praise: what the right answer shows.
    """
    if answer is None:
        print("Not answered yet.")
        return False
    print(f"Not yet: {problem}" if problem else f"Right. {praise}")
    return not problem
