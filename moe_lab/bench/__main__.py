"""``python -m moe_lab.bench cpu [--threads N] [--rounds N] [--steps N] [--embedding-updates dense|lazy] [--k N]``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from moe_lab.bench.cpu import CpuBenchConfig, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    default = CpuBenchConfig()
    parser = argparse.ArgumentParser(prog="python -m moe_lab.bench", description="Measured, not tested.")
    cpu = parser.add_subparsers(dest="what", required=True).add_parser("cpu", help="training speed of each gate")
    cpu.add_argument("--threads", type=int, help="of PyTorch (default: the project's choice)")
    cpu.add_argument("--rounds", type=int, default=default.rounds, help="turns of each case (default %(default)s)")
    cpu.add_argument("--steps", type=int, default=default.steps, help="timed steps per turn (default %(default)s)")
    cpu.add_argument("--batch", type=int, default=default.batch, help="rows per step (default %(default)s)")
    cpu.add_argument("--k", type=int, default=default.k, help="(default %(default)s)")
    cpu.add_argument("--embedding-updates", choices=("dense", "lazy"), default=default.embedding_updates)
    given = vars(parser.parse_args(arguments))
    what = given.pop("what")
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None]
    command = shlex.join(["python", "-m", "moe_lab.bench", what, *" ".join(options).split()])
    run(CpuBenchConfig(**given), command=command)


if __name__ == "__main__":
    main()
