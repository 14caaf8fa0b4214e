"""Several notebooks one after the other, with a line for each and a summary; used by `moe-lab run` and `sweep`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moe_lab.notebook_catalogue import Notebook
from moe_lab.notebook_runner import Outcome, run_notebook
from moe_lab.paths import runs_dir


def run_batch(jobs: Sequence[tuple[Notebook, Mapping[str, Any]]]) -> int:
    """Run (notebook, changed parameters) pairs; a failure does not keep the others from running, Ctrl-C does.

    Returns:
        0 if all finished, 1 if one failed, 130 after Ctrl-C.
    """
    outcomes = []
    for notebook, values in jobs:
        changed = " ".join(f"{name}={value!r}" for name, value in values.items())
        print(f"{notebook.number} {notebook.title}  {changed}".rstrip())
        try:
            outcome = run_notebook(notebook, values)
        except KeyboardInterrupt:  # outside a cell: while the kernel starts or stops
            print("moe-lab: stopped between cells.", file=sys.stderr)
            return _summary(outcomes, len(jobs), stopped=True)
        outcomes.append(outcome)
        if outcome.error:
            print(f"\n{notebook.name}: {outcome.status}\n\n{outcome.error}\n", file=sys.stderr)
        print(f"   {outcome.status} in {outcome.seconds:.0f} s: {outcome.path}")
        if outcome.status == "interrupted":
            return _summary(outcomes, len(jobs), stopped=True)
    return _summary(outcomes, len(jobs))


def _summary(outcomes: list[Outcome], n_jobs: int, stopped: bool = False) -> int:
    finished = sum(outcome.status == "finished" for outcome in outcomes)
    if finished == n_jobs:
        return 0
    print(f"{finished} of {n_jobs} notebooks finished.", file=sys.stderr)
    print(
        f"Kept: the cells that finished, in {runs_dir() / 'notebooks'}, and the Results saved under {runs_dir()}: "
        "a finished Result is found again and not computed twice.",
        file=sys.stderr,
    )
    return 130 if stopped else 1
