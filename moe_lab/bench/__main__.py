"""``python -m moe_lab.bench cpu [--tables NAME ...] [--threads N] [--rounds N] [--steps N] ...``; see ``--help``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from moe_lab.bench.cpu import TABLES, CpuBenchConfig, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    default = CpuBenchConfig()
    parser = argparse.ArgumentParser(prog="python -m moe_lab.bench", description="Measured, not tested.")
    cpu = parser.add_subparsers(dest="what", required=True).add_parser(
        "cpu",
        help="training speed of each gate, and what early exits save",
        description="Tables:\n" + "\n".join(f"  {name:9} {title}" for name, (title, *_) in TABLES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cpu.add_argument(
        "--tables", nargs="+", metavar="NAME", default=[], help=f"of {', '.join(TABLES)} (default: all, minutes)"
    )
    cpu.add_argument("--threads", type=int, help="of PyTorch (default: the project's choice)")
    cpu.add_argument("--rounds", type=int, default=default.rounds, help="turns of each case (default %(default)s)")
    cpu.add_argument("--steps", type=int, default=default.steps, help="timed steps per turn (default %(default)s)")
    cpu.add_argument("--batch", type=int, default=default.batch, help="rows per step (default %(default)s)")
    cpu.add_argument("--k", type=int, default=default.k, help="(default %(default)s)")
    cpu.add_argument("--embedding-updates", choices=("dense", "lazy"), default=default.embedding_updates)
    given = vars(parser.parse_args(arguments))
    command = ["python", "-m", "moe_lab.bench", given.pop("what")]
    for name, value in given.items():
        if value not in (None, []):
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    try:
        config = CpuBenchConfig(**given | {"tables": tuple(given["tables"])})
    except ValueError as error:
        cpu.error(str(error))
    run(config, command=shlex.join(command))


if __name__ == "__main__":
    main()
