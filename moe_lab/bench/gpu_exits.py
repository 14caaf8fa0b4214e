"""What early exits save on one GPU, beside the fastest full network of the same precision.

    python -m moe_lab.bench.gpu_exits --json report.json      # batches of 1, 64, 512 and 4096, bfloat16
    python -m moe_lab.bench.gpu_exits --tune                  # also: each threshold of taking rows out
    python -m moe_lab.bench.gpu_exits --device cpu            # a dry run with a tiny network

The network and its images are planted: `gpu_exits_planted`. Images that are timed are not those that
`FastPredictor` learns from. The cases, and what a row says: `gpu_exits_cases`. If the device is lost, what was measured
is written, and the command ends. ``python -m moe_lab.bench gpu`` records the same tables in a Result.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from moe_lab.bench.frame import Frame, Report, add_frame, command_parser, given_frame
from moe_lab.bench.gpu_exits_cases import DeviceLost, cases, measure, tune
from moe_lab.bench.gpu_exits_planted import TINY, PlantedNetwork, Size
from moe_lab.names import check_name
from moe_lab.runtime import pick_device


@dataclass(frozen=True, kw_only=True)
class ExitsBench(Frame):
    """What to time of stopping early.

    Attributes:
        size: of the network.
        batches: images per call, a table for each.
        ratio: of multiply-adds, full network / mean spent.
        cases: only these, see `gpu_exits_cases`; empty: all that can run.
        tune: also each threshold of taking rows out.

    Raises:
        ValueError: also a batch below 1.
    """

    size: Size = field(default_factory=Size)
    batches: tuple[int, ...] = (1, 64, 512, 4096)
    ratio: float = 2.05
    cases: tuple[str, ...] = ()
    tune: bool = False
    rounds: int = 7
    steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batches, default=1) < 1:
            raise ValueError(f"batches are at least 1, got {self.batches}")


def exits_tables(config: ExitsBench, device: torch.device) -> Iterator[tuple[str, list[dict]]]:
    """For each batch size, as soon as it is measured: ("exits", rows), ("exits_tuned", rows); see `ExitsBench`.

    Raises:
        ValueError: an unknown case, or a ratio that no distribution of exits gives.
        DeviceLost: after the rows that were measured until then.
    """
    planted = PlantedNetwork(config.size, config.ratio, device, config.torch_dtype, config.seed)
    image, _ = planted.images(1, 0)
    for name in config.cases:
        check_name("case", name, tuple(cases(planted, image, image, compiled=config.compiled)))
    return _tables(config, planted)


def _tables(config: ExitsBench, planted: PlantedNetwork) -> Iterator[tuple[str, list[dict]]]:
    frame = {"rounds": config.rounds, "n_steps": config.steps, "compiled": config.compiled}
    for batch in config.batches:
        name = "exits"
        try:
            yield name, measure(planted, batch, only=config.cases, **frame)
            if config.tune:
                name = "exits_tuned"
                yield name, tune(planted, batch, **frame)
        except DeviceLost as lost:
            yield name, lost.rows
            raise


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    default = ExitsBench()
    parser = command_parser("gpu_exits", __doc__)
    for each in dataclasses.fields(Size):
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=int, help="of the network; on a CPU a tiny one")
    parser.add_argument("--batches", type=int, nargs="+", help="images per call (default 1 64 512 4096; CPU: 1 32)")
    parser.add_argument("--ratio", type=float, default=default.ratio, help="of multiply-adds (default %(default)s)")
    parser.add_argument("--tune", action="store_true", help="also each threshold of taking rows out")
    add_frame(parser, default)
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    usual = (TINY, (1, 32)) if device.type == "cpu" else (default.size, default.batches)
    wanted = {each.name: getattr(given, each.name) for each in dataclasses.fields(Size)}
    try:
        config = ExitsBench(
            size=dataclasses.replace(usual[0], **{k: v for k, v in wanted.items() if v is not None}),
            batches=tuple(given.batches or usual[1]),
            ratio=given.ratio,
            cases=tuple(given.cases),
            tune=given.tune,
            **given_frame(vars(given)),
        )
        tables = exits_tables(config, device)
    except ValueError as error:
        parser.error(str(error))
    report = Report("gpu_exits", arguments, device, given.json, {"size": dataclasses.asdict(config.size)})
    try:
        for table, rows in tables:
            report.add(table, rows)
    except DeviceLost as lost:
        print(lost, file=sys.stderr, flush=True)
        sys.exit(1)
    return report.content


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code != 1:
            raise
        os._exit(1)  # the device is lost: to free its memory on the way out would end in an abort
