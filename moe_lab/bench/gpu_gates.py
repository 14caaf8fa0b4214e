"""The tables of COMET's gate on one GPU, with the options for looking closer.

    python -m moe_lab.bench.gpu_gates --json report.json                   # both rows of `SHAPES`, bfloat16
    python -m moe_lab.bench.gpu_gates --tune --parts                       # block shapes first; where the time goes
    python -m moe_lab.bench.gpu_gates --sharpness 1 100                    # also splits that are nearly all decided
    python -m moe_lab.bench.gpu_gates --tokens 64 --width 16 --experts 8 --k 2 --device cpu --no-compile

What is computed: `gpu_gates_problem`; the cases, and what a row says: `gpu_gates_cases`. ``sharpness`` multiplies the
parameters of the splits: 1 is the start of training, where no weight is 0; at 100 most trees are decided, and the
kernels leave out the subtrees that no token of a block reaches. ``python -m moe_lab.bench gpu`` records the same tables
in a Result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_lab.bench.frame import (
    DTYPES,
    KernelFrame,
    Report,
    add_frame,
    add_sizes,
    command_parser,
    given_frame,
    given_sizes,
)
from moe_lab.bench.gpu_gates_cases import choose, measure
from moe_lab.bench.gpu_gates_parts import measure_parts, tune
from moe_lab.bench.gpu_gates_problem import SHAPES, Problem, Shape
from moe_lab.bench.gpu_tuning import tuned_rows
from moe_lab.names import check_name
from moe_lab.runtime import pick_device


@dataclass(frozen=True, kw_only=True)
class GatesBench(KernelFrame):
    """What to time of COMET's gate: a table for each shape and sharpness.

    Attributes:
        shapes: sizes.
        cases: only these, see `gpu_gates_cases`; empty: all that can run.
        sharpness: factors on the parameters of the splits.
        parameters: their dtype, "bfloat16" or "float32"; None: that of x.

    Raises:
        ValueError: also an unknown dtype of parameters.
    """

    shapes: tuple[Shape, ...] = SHAPES
    cases: tuple[str, ...] = ()
    sharpness: tuple[float, ...] = (1.0, 100.0)
    parameters: str | None = None
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters is not None:
            check_name("dtype of parameters", self.parameters, DTYPES)


def gates_tables(config: GatesBench, device: torch.device) -> Iterator[tuple[str, list[dict]]]:
    """For each shape and sharpness: ("gates_tuned", rows), ("gates", rows), ("gates_parts", rows); see `GatesBench`."""
    parameters = None if config.parameters is None else getattr(torch, config.parameters)
    for shape in config.shapes:
        for sharpness in config.sharpness:
            dtypes = config.torch_dtype, parameters
            problem = Problem(shape, device, *dtypes, sharpness=sharpness, seed=config.seed)
            about = dataclasses.asdict(shape) | {"sharpness": sharpness}
            cases = choose(problem, config.compiled, config.cases)  # an unknown name is noticed before tuning
            if config.tune:
                yield "gates_tuned", [row | about for row in tuned_rows(tune(problem))]
            yield "gates", measure(problem, cases, rounds=config.rounds, n_steps=config.steps)
            if config.parts:
                yield "gates_parts", [row | about for row in measure_parts(problem, config.rounds, config.steps)]


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    parser = command_parser("gpu_gates", __doc__)
    add_sizes(parser, SHAPES)
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1.0], help="a table for each (default: 1)")
    parser.add_argument("--parameters", choices=DTYPES, help="their dtype (default: that of x)")
    add_frame(parser, GatesBench())
    given = parser.parse_args(arguments)
    shapes = given_sizes(parser, given, SHAPES)
    try:
        config = GatesBench(
            shapes=shapes,
            cases=tuple(given.cases),
            sharpness=tuple(given.sharpness),
            parameters=given.parameters,
            **given_frame(vars(given), KernelFrame),
        )
    except ValueError as error:
        parser.error(str(error))
    device = pick_device(given.device)
    report = Report("gpu_gates", arguments, device, given.json)
    for table, rows in gates_tables(config, device):
        report.add(table, rows)
    return report.content


if __name__ == "__main__":
    main()
