"""What early exits save on one GPU, beside the fastest full network of the same precision.

    python -m moe_lab.bench.gpu_exits --json report.json      # batches of 1, 64, 512 and 4096, bfloat16
    python -m moe_lab.bench.gpu_exits --tune                  # also: each threshold of taking rows out
    python -m moe_lab.bench.gpu_exits --device cpu            # a dry run with a tiny network

The network and its images are planted: `gpu_exits_planted`. Images that are timed are not those that
`FastPredictor` learns from.

    full, ...        the network without exits: one head, no gate
    masked           every block, every head, every gate, then the decision (`predict_masked`)
    plain            `predict`: waits for the device and takes rows out at every exit
    fast, ...        `FastPredictor`

"in time": rows leave before the next block, never one block late; "graph": a CUDA graph; "compiled": through
`torch.compile`. Every call is timed by the clock on the wall from its start until the device has finished; a step is
several calls with other images; cases take turns and medians are shown. ``speed_up``: over the fastest full network.
``reached``: that divided by the ratio of multiply-adds of these images. ``again``: samples per call for which the plan
had no room. Before anything is timed, each case's answers are compared with `predict_masked` (the full network's own
with its eager form): ``other_exits`` and ``other_labels`` are shares, ``difference`` the largest of a probability; a
case that differs by more than rounding is not timed. A case that fails costs only itself, unless it leaves the device
unusable: then what was measured is written, and the command ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_lab.bench.device import captured, circumstances
from moe_lab.bench.gpu_exits_planted import TINY, PlantedNetwork, Size
from moe_lab.bench.tables import render_all
from moe_lab.bench.timing import take_turns
from moe_lab.exits import Prediction
from moe_lab.exits.fast_predict import THRESHOLDS, FastPredictor
from moe_lab.exits.plan import plan_rows
from moe_lab.names import check_name
from moe_lab.runtime import pick_device

Answer = Callable[[Tensor], Tensor | Prediction]

_MOST_OTHER_EXITS, _MOST_DIFFERENCE = 0.002, 0.05  # what bfloat16 may do; wrong rows differ by more


class DeviceLost(RuntimeError):
    """The device answers nothing more in this process; ``rows``: what was found of each case until then."""

    def __init__(self, rows: list[dict], reason: object):
        super().__init__(f"the device is lost to this process, nothing more can be measured: {reason}")
        self.rows = rows


def _check_alive(device: torch.device, rows: list[dict], reason: object) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:  # a device assertion poisons the process
        raise DeviceLost(rows, reason) from None


def _graphed(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    given = x.clone()
    replay = captured(lambda: function(given))

    def answer(x: Tensor) -> Tensor:
        given.copy_(x)
        return replay().clone()

    return answer


def cases(
    planted: PlantedNetwork, example: Tensor, x: Tensor, *, compiled: bool = True, compact_from: float | str = "auto"
) -> dict[str, Callable[[], Answer]]:
    """Name -> function that prepares an answering function for batches like x (which may fail: only that is lost)."""
    network, on_cuda = planted.network, x.device.type == "cuda"

    def full(x: Tensor, model: nn.Module = planted.full) -> Tensor:
        return model(x).float().softmax(-1)

    def compiled_full(**options) -> Callable[[Tensor], Tensor]:
        return torch.compile(full, dynamic=False, **options)

    def fast(**options) -> FastPredictor:
        return FastPredictor(network, example, batch_sizes=(len(x),), compact_from=compact_from, **options)

    def reduced() -> Answer:
        function = compiled_full(mode="reduce-overhead")
        return lambda x: function(x).clone()

    found: dict[str, Callable[[], Answer]] = {"full, eager": lambda: full}
    if on_cuda:
        found["full, graph"] = lambda: _graphed(full, x)
    if compiled:
        found["full, compiled"] = compiled_full
    if compiled and on_cuda:
        found["full, reduce-overhead"] = reduced
        found["full, compiled, graph"] = lambda: _graphed(compiled_full(), x)
    found |= {"masked": lambda: network.predict_masked, "plain": lambda: network.predict}
    found["fast, eager"] = lambda: fast(graphs=False)
    if on_cuda:
        found["fast, graph"] = fast
        found["fast, graph, in time"] = lambda: fast(late=False)
    if compiled:
        found["fast, compiled"] = lambda: fast(compiled=True, graphs=False)
    if compiled and on_cuda:
        found["fast, compiled, graph"] = lambda: fast(compiled=True)
    if on_cuda:
        found["fast, graph, torch only"] = lambda: fast(fused=False)
    return found


@torch.no_grad()
def compare(found: Tensor | Prediction, expected: Tensor | Prediction) -> dict[str, float]:
    """``other_exits`` and ``other_labels`` (shares), ``difference`` (largest, of a probability).

    Raises:
        ValueError: more than rounding.
    """
    row: dict[str, float] = {}
    if isinstance(found, Prediction) and isinstance(expected, Prediction):
        row["other_exits"] = float((found.exits != expected.exits).float().mean())
        if row["other_exits"] > _MOST_OTHER_EXITS:
            raise ValueError(f"other answers: {row}")
        same = found.exits == expected.exits  # another exit is another answer
        found, expected = found.probabilities[same], expected.probabilities[same]
    row["other_labels"] = float((found.argmax(-1) != expected.argmax(-1)).float().mean())
    row["difference"] = float((found - expected).abs().max())
    if not row["difference"] <= _MOST_DIFFERENCE:  # also NaN
        raise ValueError(f"other answers: {row}")
    return row


def _synchronised(answer: Answer, batches: Sequence[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for x in batches:
            answer(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()

    return step


def _guarded(step: Callable[[], None], name: str, rows: dict[str, dict], batches: Sequence[Tensor]) -> Callable:
    """The step; once it has failed, which its row then tells, nothing."""

    def guarded() -> None:
        if "failed" in rows[name]:
            return
        try:
            step()
        except Exception as problem:
            rows[name]["failed"] = f"{type(problem).__name__}: {problem}"[:500]
            _check_alive(batches[0].device, list(rows.values()), f"{name}, {rows[name]['failed']}")

    return guarded


def measure(
    planted: PlantedNetwork,
    batch: int,
    *,
    calls: int = 4,
    rounds: int = 5,
    n_steps: int = 3,
    compiled: bool = True,
    only: Sequence[str] = (),
    compact_from: float | str = "auto",
    prepared: dict[str, Callable[[], Answer]] | None = None,
) -> list[dict]:
    """One row per case: see the module's text.

    Args:
        planted: network and images.
        batch: images per call.
        calls: of a step, at least; small batches get more, so that a step sees every exit.
        rounds, n_steps: turns of each case, timed steps per turn; at least 2 steps in all.
        compiled: also what needs `torch.compile`.
        only: names; nothing: all.
        compact_from: of `FastPredictor`.
        prepared: other cases than `cases`.
    """
    torch.compiler.reset()  # it keeps few versions of a function, and goes on uncompiled after that
    calls = max(calls, -(-64 // batch))
    example, _ = planted.images(max(2048, batch), seed=1)
    images, exits = planted.images(calls * batch, seed=2)
    batches, ratio = images.split(batch), float(1 / planted.network.costs.cpu()[exits].mean())
    with torch.no_grad():
        masked = [planted.network.predict_masked(x) for x in batches]
        plain = [planted.full(x).float().softmax(-1) for x in batches]
        if prepared is None:
            prepared = cases(planted, example, batches[0], compiled=compiled, compact_from=compact_from)
        ready: dict[str, Answer] = {}
        rows: dict[str, dict] = {}
        for name, prepare in prepared.items():
            if only and name not in only:
                continue
            row = rows[name] = {"case": name, "batch": batch, "ratio": ratio}
            try:
                answer = prepare()
                found = [
                    compare(answer(x), b) for x, b in zip(batches, plain if "full" in name else masked, strict=True)
                ]
                row |= {key: max(one[key] for one in found) for key in found[0]}
                ready[name] = answer
            except Exception as problem:  # a case that cannot run must not cost the others their turn on a lent GPU
                row["failed"] = f"{type(problem).__name__}: {problem}"[:500]
                _check_alive(batches[0].device, list(rows.values()), f"{name}, {row['failed']}")
        for answer in ready.values():
            if isinstance(answer, FastPredictor):
                answer.answered_again = 0
        steps = {name: _guarded(_synchronised(answer, batches), name, rows, batches) for name, answer in ready.items()}
        timings = take_turns(steps, rounds=rounds, steps=n_steps, warm_up=2)
    for name, timing in timings.items():
        if "failed" in rows[name]:
            continue
        first, third = timing.quartiles
        times = {"ms": timing.median, "ms_q1": first, "ms_q3": third}
        rows[name] |= {key: 1e3 * seconds / len(batches) for key, seconds in times.items()}
        answer = ready[name]
        if isinstance(answer, FastPredictor):
            asked = len(batches) * (2 + rounds * (1 + n_steps))
            plan = answer.plans[batch]
            rows[name] |= {"again": answer.answered_again / asked, "compact_from": plan.compact_from}
            rows[name] |= {
                "plan": dataclasses.asdict(plan),
                "tried": [dataclasses.asdict(p) for p in answer.tried[batch]],
            }
    best = min((row["ms"] for name, row in rows.items() if name.startswith("full") and "ms" in row), default=None)
    for row in rows.values():
        row["speed_up"] = best / row["ms"] if best and "ms" in row else None
        row["reached"] = row["speed_up"] / ratio if row["speed_up"] and not row["case"].startswith("full") else None
    return list(rows.values())


def tune(planted: PlantedNetwork, batch: int, *, compiled: bool = True, **frame) -> list[dict]:
    """One row for every threshold and way, see `measure`; plans of equal rows are timed once."""
    example, _ = planted.images(max(2048, batch), seed=1)
    on_cuda = example.device.type == "cuda"
    known = cases(planted, example, example[:batch], compiled=compiled)
    prepared = {name: prepare for name, prepare in known.items() if name.startswith("full")}
    ways = {"fast, graph": {}} if on_cuda else {"fast, eager": {"graphs": False}}
    if on_cuda:
        ways["fast, graph, late"] = {"late": True}
    if compiled and on_cuda:
        ways |= {
            "fast, compiled, graph": {"compiled": True},
            "fast, compiled, graph, late": {"compiled": True, "late": True},
        }
    plans, shares = set(), FastPredictor(planted.network, example, graphs=False).shares
    for threshold in THRESHOLDS:
        prepared[f"plain, {threshold}"] = lambda threshold=threshold: (
            lambda x: planted.network.predict(x, compact_from=threshold)
        )
        rows = plan_rows(shares, batch, threshold)
        if rows in plans:
            continue
        plans.add(rows)
        for way, options in ways.items():
            prepared[f"{way}, {threshold}"] = lambda threshold=threshold, options=options: FastPredictor(
                planted.network, example, batch_sizes=(batch,), compact_from=threshold, **options
            )
    return measure(planted, batch, prepared=prepared, **frame)


_HIDDEN = ("plan", "tried")


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.bench.gpu_exits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="of the network; on a CPU a tiny one")
    parser.add_argument("--batches", type=int, nargs="+", help="images per call (default 1 64 512 4096; CPU: 1 32)")
    parser.add_argument("--ratio", type=float, default=2.05, help="of multiply-adds (default %(default)s)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these (default: all that can run)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each case (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn (default %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--tune", action="store_true", help="also each threshold of taking rows out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write everything")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    on_cpu = device.type == "cpu"
    batches = given.batches or ((1, 32) if on_cpu else (1, 64, 512, 4096))
    wanted = {field.name: getattr(given, field.name) for field in dataclasses.fields(Size)}
    try:
        size = dataclasses.replace(TINY if on_cpu else Size(), **{k: v for k, v in wanted.items() if v is not None})
        planted = PlantedNetwork(size, given.ratio, device, getattr(torch, given.dtype), given.seed)
        known = cases(planted, *2 * (planted.images(1, 0)[0],), compiled=not given.no_compile)
        for name in given.cases:
            check_name("case", name, tuple(known))
        if min(batches) < 1 or given.rounds * given.steps < 2:
            raise ValueError("batches are at least 1; quartiles need at least two timed steps: raise rounds or steps")
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(
        ["python", "-m", "moe_lab.bench.gpu_exits", *(sys.argv[1:] if arguments is None else arguments)]
    )
    report = {"command": command, "environment": circumstances(device), "size": dataclasses.asdict(size), "tables": []}
    print(command, report["environment"], size, sep="\n")
    frame = {"rounds": given.rounds, "n_steps": given.steps, "compiled": not given.no_compile}
    for batch in batches:
        table, lost = {"batch": batch}, None
        report["tables"].append(table)
        try:
            table["cases"] = measure(planted, batch, only=given.cases, **frame)
            if given.tune:
                table["tune"] = tune(planted, batch, **frame)
        except DeviceLost as problem:
            lost = problem
            table["tune" if "cases" in table else "cases"] = problem.rows
            report["lost"] = str(problem)
        for rows in (table.get("cases"), table.get("tune")):
            if rows:
                print(render_all([{k: v for k, v in row.items() if k not in _HIDDEN} for row in rows]), flush=True)
        for row in table["cases"]:
            if "plan" in row:
                print(f"{row['case']}: {row['plan']}")
        if given.json:  # after each batch size: what was measured survives a time limit
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=1))
        if lost:
            print(lost, file=sys.stderr, flush=True)
            sys.exit(1)
    return report


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code != 1:
            raise
        os._exit(1)  # the device is lost: to free its memory on the way out would end in an abort
