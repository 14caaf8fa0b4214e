"""The command line: `moe-lab list | run | sweep | report | data`.

Exit codes: 0 all went well; 1 something ran and failed; 2 refused before anything ran; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from moe_lab import __version__, notebook_parameters
from moe_lab.notebook_catalogue import HEADLINE, PROFILES, Notebook, find_notebooks, nearest, select_notebook

_EPILOG = """examples:
  moe-lab list
  moe-lab run 03 -p gate comet -p seed 1 --profile quick
  moe-lab run --headline
  moe-lab sweep 03 -p gate comet,topk -p seed 0,1,2
  moe-lab report
  moe-lab data fetch ml-100k
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and do; returns the exit code."""
    sys.stdout.reconfigure(line_buffering=True)  # so that lines and progress bars keep their order in a log file
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except ValueError as problem:
        print(f"moe-lab: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmoe-lab: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `moe-lab list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """Adds the nearest name when a command or a choice is misspelt."""

    def error(self, message: str):
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        super().error(message + (nearest(found[1], re.findall(r"[\w-]+", found[2])) if found else ""))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moe-lab",
        description="Run the notebooks of moe_lab with other parameters, and see what came out.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe_lab {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("list", help="the notebooks, their parameters and defaults")
    command.set_defaults(action=_list)

    command = commands.add_parser("run", help="run notebooks, with parameters", allow_abbrev=False)
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="number (03) or name (comet_recommender)")
    command.add_argument("--headline", action="store_true", help=f"the headline notebooks: {', '.join(HEADLINE)}")
    command.add_argument("--all", action="store_true", help="all notebooks, in reading order")
    _add_parameters(command, "value")
    command.set_defaults(action=_run)

    command = commands.add_parser("sweep", help="run one notebook with all combinations of values", allow_abbrev=False)
    command.add_argument("notebook", metavar="NOTEBOOK")
    _add_parameters(command, "value,value,...")
    command.set_defaults(action=_sweep)

    command = commands.add_parser("report", help="write one HTML report of what was run")
    command.set_defaults(action=_report)

    command = commands.add_parser("data", help="data sets: what there is, download, verify")
    data = command.add_subparsers(metavar="COMMAND", required=True)
    data.add_parser("list", help="data sets and where they are").set_defaults(action=_data_list)
    fetch = data.add_parser("fetch", help="download one data set")
    fetch.add_argument("name", metavar="NAME")
    fetch.add_argument("--mirror", metavar="URL", help="a server with copies, asked before the official ones")
    fetch.set_defaults(action=_data_fetch)
    data.add_parser("check", help="compare what is here with the checksums").set_defaults(action=_data_check)
    return parser


def _add_parameters(command: argparse.ArgumentParser, value: str) -> None:
    command.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        dest="parameters",
        metavar=("NAME", value),
        help="change a parameter",
    )
    command.add_argument("--profile", choices=PROFILES, help="the same as -p profile, where a notebook has one")


def _list(_: argparse.Namespace) -> int:
    for notebook in _notebooks():
        print(f"{notebook.number}  {notebook.title}   ({notebook.name})")
        if notebook.summary:
            print(f"    {notebook.summary}")
        if notebook.reproduces:
            print(f"    Reproduces: {notebook.reproduces}")
        for parameter in notebook.parameters.values():
            text = parameter.help or " | ".join(parameter.choices)
            print(f"      -p {parameter.name} {parameter.default!r:<12} {text}".rstrip())
    return 0


def _run(arguments: argparse.Namespace) -> int:
    known = _notebooks()
    ways = [bool(arguments.notebooks), arguments.headline, arguments.all]
    if sum(ways) != 1:
        raise ValueError("Say what to run, in one way: notebook numbers (moe-lab run 03 04), --headline, or --all.")
    specs = arguments.notebooks or (HEADLINE if arguments.headline else [notebook.number for notebook in known])
    chosen = list(dict.fromkeys(select_notebook(spec, known).number for spec in specs))
    notebooks = [notebook for notebook in known if notebook.number in chosen]
    return _execute([(notebook, arguments.parameters) for notebook in notebooks], arguments.profile)


def _sweep(arguments: argparse.Namespace) -> int:
    if not arguments.parameters:
        raise ValueError("A sweep needs values: moe-lab sweep 03 -p gate comet,topk -p seed 0,1,2")
    notebook = select_notebook(arguments.notebook, _notebooks())
    combinations = notebook_parameters.cartesian(arguments.parameters)
    return _execute([(notebook, values) for values in combinations], arguments.profile)


def _execute(jobs: list[tuple[Notebook, list[tuple[str, str]]]], profile: str | None) -> int:
    """Check all jobs, then run all: nothing runs if one is refused."""
    if profile and not any("profile" in notebook.parameters for notebook, _ in jobs):
        raise ValueError(f"--profile {profile}: none of the chosen notebooks has a profile; leave it out.")
    checked = []
    for notebook, given in jobs:
        with_profile = [*given, ("profile", profile)] if profile and "profile" in notebook.parameters else given
        checked.append((notebook, notebook_parameters.check_parameters(notebook, with_profile)))
    from moe_lab.notebook_batch import run_batch  # imports papermill and Jupyter: a second that `list` need not wait

    return run_batch(checked)


def _report(_: argparse.Namespace) -> int:
    from moe_lab.report import write_report

    print(f"Report: {write_report()}")
    return 0


def _data_list(_: argparse.Namespace) -> int:
    from moe_lab.datasets import commands

    return commands.list_command()


def _data_fetch(arguments: argparse.Namespace) -> int:
    from moe_lab.datasets import commands

    return commands.fetch_command(arguments.name, arguments.mirror)


def _data_check(_: argparse.Namespace) -> int:
    from moe_lab.datasets import commands

    return commands.check_command()


def _notebooks() -> list[Notebook]:
    notebooks = find_notebooks()
    if not notebooks:
        raise ValueError("No notebooks found. Run moe-lab from a checkout of the project, installed with `make run`.")
    return notebooks
