"""``python -m moe_lab.bench cpu [--tables NAME ...] ...`` and ``python -m moe_lab.bench gpu ...``; see ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_lab.bench import cpu, gpu, gpu_scattermoe
from moe_lab.bench.cpu import CpuBenchConfig
from moe_lab.bench.frame import KernelFrame, add_turns, given_frame
from moe_lab.bench.gpu import GpuBenchConfig


def _subcommand(commands, name: str, title: str, tables: Mapping[str, tuple]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=title,
        description="Tables:\n" + "\n".join(f"  {table:9} {about[0]}" for table, about in tables.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tables", nargs="+", metavar="NAME", default=[], help=f"of {', '.join(tables)} (default: all, minutes)"
    )
    return parser


def _cpu_options(parser: argparse.ArgumentParser) -> None:
    default = CpuBenchConfig()
    parser.add_argument("--threads", type=int, help="of PyTorch (default: the project's choice)")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="turns of each case (default %(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="timed steps per turn (default %(default)s)")
    parser.add_argument("--batch", type=int, default=default.batch, help="rows per step (default %(default)s)")
    parser.add_argument("--k", type=int, default=default.k, help="(default %(default)s)")
    parser.add_argument("--embedding-updates", choices=("dense", "lazy"), default=default.embedding_updates)


def _gpu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1; cpu: a dry run with tiny sizes")
    add_turns(parser, None)
    parser.add_argument("--side-by-side", type=int, default=200, help="trials: of a stack (default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="exits: images per call")
    parser.add_argument("--trial-gates", nargs="+", default=[], metavar="GATE", help="trials: these gates only")
    parser.add_argument("--trial-epochs", type=int, default=8, help="trials: of each (default %(default)s)")
    parser.add_argument("--alone", type=int, default=2, help="trials: how many one at a time (default %(default)s)")
    parser.add_argument("--scattermoe", type=Path, metavar="FOLDER", help="moe: a clone of shawntan/scattermoe")


def _cpu(given: dict) -> tuple[CpuBenchConfig, list[str]]:
    command = []
    for name, value in given.items():
        if value not in (None, []):
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return CpuBenchConfig(**given | {"tables": tuple(given["tables"])}), command


def _gpu(given: dict) -> GpuBenchConfig:
    frame, closer = given_frame(given), given_frame(given, KernelFrame)
    if given["scattermoe"]:
        gpu_scattermoe.add_path(given["scattermoe"])
    trials = {name: given[name] for name in ("side_by_side", "trial_epochs", "alone")}
    trials["trial_gates"] = tuple(given["trial_gates"])
    config = GpuBenchConfig(tuple(given["tables"]), given["device"], **trials)
    batches = {"batches": tuple(given["batches"])} if given["batches"] else {}
    return dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, **closer),
        gates=dataclasses.replace(config.gates, **closer),
        exits=dataclasses.replace(config.exits, **batches, **frame),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.bench", description="Measured, not tested.")
    commands = parser.add_subparsers(dest="what", required=True)
    parsers = {
        "cpu": _subcommand(commands, "cpu", "training speed of each gate, and what early exits save", cpu.TABLES),
        "gpu": _subcommand(commands, "gpu", "the MoE layer, gates, early exits and trials on one GPU", gpu.TABLES),
    }
    _cpu_options(parsers["cpu"])
    _gpu_options(parsers["gpu"])
    given = vars(parser.parse_args(arguments))
    what, command = given.pop("what"), ["python", "-m", "moe_lab.bench"]
    try:
        if what == "cpu":
            config, options = _cpu(given)
            command += [what, *options]
        else:
            config = _gpu(given)
            command += sys.argv[1:] if arguments is None else arguments
    except ValueError as error:
        parsers[what].error(str(error))
    try:
        (cpu if what == "cpu" else gpu).run(config, command=shlex.join(command))
    except gpu.TablesFailed as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
