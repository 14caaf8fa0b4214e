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

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lab.bench import gpu_scattermoe
from moe_lab.bench.frame import (
    KernelFrame,
    Report,
    add_frame,
    add_sizes,
    command_parser,
    given_frame,
    given_sizes,
)
from moe_lab.bench.gpu_moe import choose, measure
from moe_lab.bench.gpu_problem import SHAPES, Problem, Shape
from moe_lab.bench.gpu_stages import measure_stages
from moe_lab.bench.gpu_tuning import tune, tuned_rows
from moe_lab.names import check_name
from moe_lab.runtime import pick_device

ACTIVATIONS = ("gelu", "relu")


@dataclass(frozen=True)
class MoeBench(KernelFrame):
    """What to time of the MoE layer.

    Attributes:
        shapes: one table for each.
        cases: only these, see `gpu_moe.moe_cases`; empty: all that can run.
        activation: "gelu" or "relu".
        bias: layers with biases, as `MLPExperts` has them.
        skew: of `Problem`: uneven routing.

    Raises:
        ValueError: also an unknown activation.
    """

    shapes: tuple[Shape, ...] = SHAPES
    cases: tuple[str, ...] = ()
    activation: str = "gelu"
    bias: bool = False
    skew: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("activation", self.activation, ACTIVATIONS)

    def problem(self, shape: Shape, device: torch.device) -> Problem:
        """What is computed at one of the ``shapes``."""
        how = {name: getattr(self, name) for name in ("activation", "bias", "skew", "seed")}
        return Problem(shape, device, self.torch_dtype, **how)


def moe_tables(config: MoeBench, device: torch.device) -> Iterator[tuple[str, list[dict]]]:
    """For each shape, as soon as it is measured: ("tuned", rows), ("moe", rows), ("stages", rows); see `MoeBench`."""
    for shape in config.shapes:
        problem = config.problem(shape, device)
        about = dataclasses.asdict(shape)
        cases = choose(problem, config.compiled, config.cases)  # an unknown name is noticed before minutes of tuning
        if config.tune:
            yield "tuned", [row | about for row in tuned_rows(tune(problem))]
        yield "moe", measure(problem, cases, rounds=config.rounds, n_steps=config.steps)
        if config.parts:
            yield "stages", measure_stages(problem, config.rounds, config.steps)


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    default = MoeBench()
    parser = command_parser("gpu_cases", __doc__)
    add_sizes(parser, SHAPES)
    parser.add_argument("--activation", choices=ACTIVATIONS, default=default.activation)
    parser.add_argument("--bias", action="store_true", help="layers with biases, as MLPExperts has them")
    parser.add_argument("--skew", type=float, default=default.skew, help="uneven routing (default 0: uniform)")
    parser.add_argument("--scattermoe", type=Path, metavar="FOLDER", help="that holds the package scattermoe")
    add_frame(parser, default)
    given = parser.parse_args(arguments)
    shapes = given_sizes(parser, given, SHAPES)
    own = {name: getattr(given, name) for name in ("activation", "bias", "skew")}
    try:
        config = MoeBench(shapes, tuple(given.cases), **own, **given_frame(vars(given), KernelFrame))
        if given.scattermoe:
            gpu_scattermoe.add_path(given.scattermoe)
    except ValueError as error:
        parser.error(str(error))
    device = pick_device(given.device)
    report = Report("gpu_cases", arguments, device, given.json, {"scattermoe": gpu_scattermoe.version()})
    for table, rows in moe_tables(config, device):
        report.add(table, rows)
    return report.content


if __name__ == "__main__":
    main()
