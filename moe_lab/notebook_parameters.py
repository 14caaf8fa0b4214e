"""Parameters from a command line: text to values of the right type, refused with the nearest name if wrong.

The type is that of the default in the notebook's `parameters` cell, so "1.5" for `seed = 0` is refused before a kernel
starts, and "2" for `gamma = 1.0` becomes 2.0.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from moe_lab.notebook_catalogue import Notebook, Parameter, nearest

_LARGEST = 2**63  # what a seed can be


def parse_value(text: str, parameter: Parameter) -> Any:
    """Turn text into a value of the default's type.

    A default of None accepts any literal, and takes what is none as a string (a bound makes it a number, alternatives
    one of them). Containers are checked for their own type, not for that of their elements.

    Raises:
        ValueError: the text has another type, is not among the allowed values, or beyond a bound.
    """
    default = parameter.default
    if parameter.choices and text not in parameter.choices:
        allowed, hint = ", ".join(parameter.choices), nearest(text, parameter.choices)
        raise ValueError(f"{parameter.name}={text!r} is not allowed; one of: {allowed}.{hint}")
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is int and abs(value) >= _LARGEST:
        raise ValueError(f"{parameter.name}={text} is too large; numbers must stay below 2**63.")
    if parameter.bound and value is not None:
        if not isinstance(value, int | float):
            raise ValueError(f"{parameter.name}={text!r} is not a number; it must be {parameter.bound}.")
        if not parameter.within(value):
            raise ValueError(f"{parameter.name}={text} is not allowed; it must be {parameter.bound}.")
    if default is None or (type(value) is type(default) and _is_finite(value)):
        return value
    raise ValueError(
        f"{parameter.name}={text!r} is not {_described(default)}. The default is {default!r}; give one of that kind."
    )


def check_parameters(notebook: Notebook, given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Check names and types of `-p name value` pairs against one notebook.

    Returns:
        Values by name, those that equal the default left out: they change nothing, and the run has the same name.

    Raises:
        ValueError: unknown name (with the nearest), wrong type, or a name given twice.
    """
    values = {}
    for name, text in given:
        if name not in notebook.parameters:
            known = ", ".join(notebook.parameters) or "it has none"
            raise ValueError(
                f"Notebook {notebook.name} has no parameter {name!r}."
                f"{nearest(name, notebook.parameters)} Its parameters: {known}."
            )
        if name in values:
            raise ValueError(f"Parameter {name!r} is given twice; to run several values use `moe-lab sweep`.")
        values[name] = parse_value(text, notebook.parameters[name])
    return {name: value for name, value in values.items() if value != notebook.parameters[name].default}


def split_values(text: str) -> list[str]:
    """Split at commas outside brackets and quotes: `comet,topk` gives two values, `[1,2],[3]` too.

    Raises:
        ValueError: a value between commas is empty.
    """
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            values.append("")
            continue
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        depth += (letter in "([{") - (letter in ")]}")
        values[-1] += letter
    if any(not value.strip() for value in values):
        raise ValueError(f"{text!r} has an empty value; give values separated by single commas, like comet,topk.")
    return [value.strip() for value in values]


def cartesian(grid: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """All combinations of a sweep: [("gate", "comet,topk"), ("seed", "0,1")] gives four lists of (name, text)."""
    axes = [[(name, value) for value in split_values(text)] for name, text in grid]
    return [list(combination) for combination in itertools.product(*axes)]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _described(default: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a finite number"}
    return names.get(type(default), f"a {type(default).__name__}")
