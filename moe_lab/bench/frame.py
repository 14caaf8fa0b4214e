"""What the measurements on one GPU share: the frame of a table, its options on a command line, and the report.

The report is JSON, written after every table, so that what was measured survives a time limit:
``{"command", "environment", "tables": [{"table": name, "rows": [...]}, ...]}``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe_lab.bench.device import circumstances
from moe_lab.bench.tables import render_all
from moe_lab.names import check_name

DTYPES = ("bfloat16", "float32")
Sizes = TypeVar("Sizes")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How a table is measured, whatever it is about.

    Attributes:
        dtype: of the tokens or images, of `DTYPES`.
        compiled: also the cases with torch.compile.
        rounds, steps: each case gets ``rounds`` turns of ``steps`` timed steps.
        seed: of everything that is drawn.

    Raises:
        ValueError: unknown dtype, or too few steps for quartiles.
    """

    dtype: str = "bfloat16"
    compiled: bool = True
    rounds: int = 5
    steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("dtype", self.dtype, DTYPES)
        if self.rounds * self.steps < 2:
            raise ValueError("quartiles need at least two timed steps: raise rounds or steps")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch knows it."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True, kw_only=True)
class KernelFrame(Frame):
    """A `Frame` around kernels of ours.

    Attributes:
        tune: choose the kernels' block shapes first, for each problem.
        parts: also time the parts of our path.
    """

    tune: bool = False
    parts: bool = False


def command_parser(module: str, about: str) -> argparse.ArgumentParser:
    """For ``python -m moe_lab.bench.<module>``; ``about`` is its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m moe_lab.bench.{module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_turns(parser: argparse.ArgumentParser, default: Frame | None) -> None:
    """--rounds, --steps, --no-compile; also --tune and --parts for a `KernelFrame`. None: many tables, each its own."""
    for name, about in (("rounds", "turns of each case"), ("steps", "timed steps per turn")):
        own = None if default is None else getattr(default, name)
        shown = "each table's own" if own is None else own
        parser.add_argument(f"--{name}", type=int, default=own, help=f"{about} (default: {shown})")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave torch.compile out")
    if default is None or isinstance(default, KernelFrame):
        which = "moe, gates: " if default is None else ""
        parser.add_argument("--tune", action="store_true", help=f"{which}choose the kernels' block shapes first")
        parser.add_argument("--parts", action="store_true", help=f"{which}also time the parts of ours")


def add_frame(parser: argparse.ArgumentParser, default: Frame) -> None:
    """Every field of the frame, --cases, --device and --json."""
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these (default: all that can run)")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype)
    parser.add_argument("--device", default="auto")
    add_turns(parser, default)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--json", type=Path, help="where to write everything")


def given_frame(given: Mapping[str, Any], of: type[Frame] = Frame) -> dict[str, Any]:
    """What the command line says of a frame's fields; what it does not say is left out."""
    return {field.name: given[field.name] for field in dataclasses.fields(of) if given.get(field.name) is not None}


def add_sizes(parser: argparse.ArgumentParser, known: Sequence[Any]) -> None:
    """An option for each field of the sizes, and --rows to choose among the known ones."""
    fields = [field.name for field in dataclasses.fields(known[0])]
    for name in fields:
        parser.add_argument(f"--{name}", type=int, help="with all other sizes: this one row only")
    rows = range(len(known))
    parser.add_argument("--rows", type=int, nargs="+", choices=rows, help=f"of the {len(known)} (default: all)")


def given_sizes(
    parser: argparse.ArgumentParser, given: argparse.Namespace, known: Sequence[Sizes]
) -> tuple[Sizes, ...]:
    """The sizes to measure; leaves through ``parser.error`` if some are missing or impossible."""
    kind = type(known[0])
    fields = [field.name for field in dataclasses.fields(kind)]
    sizes = [getattr(given, name) for name in fields]
    if all(size is None for size in sizes):
        return tuple(known[row] for row in given.rows or range(len(known)))
    if None in sizes:
        parser.error(f"give all of {' '.join(f'--{name}' for name in fields)}, or none")
    try:
        return (kind(*sizes),)
    except ValueError as error:
        parser.error(str(error))


class Report:
    """The tables of one command: printed as they come, and written after each of them.

    Args:
        module: of ``python -m moe_lab.bench.<module>``.
        arguments: of the command; None: those of this process.
        device: where it runs.
        path: of the JSON; None: nowhere.
        more: to be added to the environment.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] | None,
        device: torch.device,
        path: Path | None = None,
        more: Mapping[str, Any] | None = None,
    ):
        command = ["python", "-m", f"moe_lab.bench.{module}", *(sys.argv[1:] if arguments is None else arguments)]
        environment = circumstances(device) | dict(more or {})
        self.content: dict[str, Any] = {"command": shlex.join(command), "environment": environment, "tables": []}
        self.path = path
        print(self.content["command"], environment, sep="\n", flush=True)

    def add(self, table: str, rows: list[dict]) -> None:
        """Print the rows and write all tables so far."""
        self.content["tables"].append({"table": table, "rows": rows})
        print(render_all(rows) if rows else f"{table}: nothing, Triton cannot run here", flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1))
