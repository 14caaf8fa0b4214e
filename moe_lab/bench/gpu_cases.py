"""The tables of the MoE layer on one GPU, with the options for looking closer.

    python -m moe_lab.bench.gpu_cases --json report.json                  # the three rows of `gpu_problem.SHAPES`
    python -m moe_lab.bench.gpu_cases --parts                             # where the time of our layer goes
    python -m moe_lab.bench.gpu_cases --tune --rows 0                     # tries block shapes for each kernel first
    python -m moe_lab.bench.gpu_cases --scattermoe FOLDER                 # ScatterMoE beside it, from a clone
    python -m moe_lab.bench.gpu_cases --tokens 64 --width 16 --hidden 32 --experts 4 --k 2 --device cpu

What is computed: `gpu_problem`; the cases, and what a row says: `gpu_moe`. With ``--bias`` the package's reference path
(`combine_experts`) runs as well. ``python -m moe_lab.bench gpu`` records the same tables in a Result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lab.bench import gpu_scattermoe
from moe_lab.bench.device import circumstances
from moe_lab.bench.gpu_moe import choose, measure
from moe_lab.bench.gpu_problem import SHAPES, Problem, Shape
from moe_lab.bench.gpu_stages import measure_stages
from moe_lab.bench.gpu_tuning import tune
from moe_lab.bench.tables import render_all
from moe_lab.names import check_name
from moe_lab.runtime import pick_device


@dataclass(frozen=True)
class MoeBench:
    """What to time of the MoE layer.

    Attributes:
        shapes: one table for each.
        cases: only these, see `gpu_moe.moe_cases`; empty: all that can run.
        activation: "gelu" or "relu".
        bias: layers with biases, as `MLPExperts` has them.
        skew: of `Problem`: uneven routing.
        dtype: "bfloat16" or "float32".
        compiled: also the cases with torch.compile.
        tune: choose the kernels' block shapes first, for each shape.
        parts: also time the stages of our layer.
        rounds, steps: each case gets ``rounds`` turns of ``steps`` timed steps.
        seed: of inputs, parameters and routing.

    Raises:
        ValueError: unknown activation or dtype, or too few steps for quartiles.
    """

    shapes: tuple[Shape, ...] = SHAPES
    cases: tuple[str, ...] = ()
    activation: str = "gelu"
    bias: bool = False
    skew: float = 0.0
    dtype: str = "bfloat16"
    compiled: bool = True
    tune: bool = False
    parts: bool = False
    rounds: int = 5
    steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("activation", self.activation, ("gelu", "relu"))
        check_name("dtype", self.dtype, ("bfloat16", "float32"))
        if self.rounds * self.steps < 2:
            raise ValueError("quartiles need at least two timed steps: raise rounds or steps")


def tuned_rows(tuned: dict[str, dict]) -> list[dict]:
    """What `tune` gives, as rows: kernel and its choice, then what could not run and why."""
    rows = [{"kernel": name, **choice} for name, choice in tuned.items() if name != "failed"]
    return rows + [{"kernel": name, "failed": why} for name, why in tuned.get("failed", {}).items()]


def moe_tables(config: MoeBench, device: torch.device) -> Iterator[tuple[str, list[dict]]]:
    """For each shape, as soon as it is measured: ("tuned", rows), ("moe", rows), ("stages", rows); see `MoeBench`."""
    for shape in config.shapes:
        problem = Problem(
            shape, device, getattr(torch, config.dtype), activation=config.activation, bias=config.bias,
            skew=config.skew, seed=config.seed,
        )  # fmt: skip
        cases = choose(problem, config.compiled, config.cases)  # an unknown name is noticed before minutes of tuning
        if config.tune:
            yield "tuned", tuned_rows(tune(problem))
        yield "moe", measure(problem, cases, rounds=config.rounds, n_steps=config.steps)
        if config.parts:
            yield "stages", measure_stages(problem, config.rounds, config.steps)


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    default = MoeBench()
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.bench.gpu_cases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help="with the four other sizes: this one row only")
    parser.add_argument("--rows", type=int, nargs="+", choices=range(len(SHAPES)), help="of the three (default: all)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these (default: all that can run)")
    parser.add_argument("--activation", choices=("gelu", "relu"), default=default.activation)
    parser.add_argument("--bias", action="store_true", help="layers with biases, as MLPExperts has them")
    parser.add_argument("--skew", type=float, default=default.skew, help="uneven routing (default 0: uniform)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=default.dtype)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="turns of each case (default %(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="timed steps per turn (default %(default)s)")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--parts", action="store_true", help="also time the stages of our layer")
    parser.add_argument("--tune", action="store_true", help="choose the kernels' block shapes first, per row")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--scattermoe", type=Path, metavar="FOLDER", help="that holds the package scattermoe")
    parser.add_argument("--json", type=Path, help="where to write everything")
    given = parser.parse_args(arguments)
    sizes = [getattr(given, field.name) for field in dataclasses.fields(Shape)]
    if any(sizes) and not all(sizes):
        parser.error("give all of --tokens --width --hidden --experts --k, or none")
    shapes = (Shape(*sizes),) if all(sizes) else tuple(SHAPES[i] for i in given.rows or range(len(SHAPES)))
    names = {field.name for field in dataclasses.fields(MoeBench)} - {"shapes", "cases"}
    config = MoeBench(shapes, tuple(given.cases), **{name: getattr(given, name) for name in names})
    if given.scattermoe:
        gpu_scattermoe.add_path(given.scattermoe)
    device = pick_device(given.device)
    command = shlex.join(
        ["python", "-m", "moe_lab.bench.gpu_cases", *(sys.argv[1:] if arguments is None else arguments)]
    )
    where = circumstances(device) | {"scattermoe": gpu_scattermoe.version()}
    report: dict = {"command": command, "environment": where, "tables": []}
    print(command, where, sep="\n")
    for name, rows in moe_tables(config, device):
        report["tables"].append({"table": name, "rows": rows})
        print(render_all(rows) if rows else f"{name}: nothing, Triton cannot run here", flush=True)
        if given.json:  # after each table: what was measured survives a time limit
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
