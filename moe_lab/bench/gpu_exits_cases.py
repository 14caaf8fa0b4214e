"""The cases of `gpu_exits`: what answers, whether it answers right, and how fast.

    full, ...        the network without exits: one head, no gate
    masked           every block, every head, every gate, then the decision (`predict_masked`)
    plain            `predict`: waits for the device and takes rows out at every exit
    fast, ...        `FastPredictor`

"graph": a CUDA graph; "compiled": through `torch.compile`; "apart": each block by itself, also where no row is taken
out between two. Every call is timed by the clock on the wall from its start until the device has finished; a step is
several calls with other images; cases take turns and medians are shown. ``speed_up``: over the fastest full network.
``reached``: that divided by the ratio of multiply-adds of these images. ``over_eager``: speed over "full, eager".
``again``: samples per call for which the plan had no room. Before anything is timed, each case's answers are compared
with `predict_masked` (the full network's own with its eager form): ``other_exits`` and ``other_labels`` are shares,
``difference`` the largest of a probability; a case that differs by more than rounding is not timed. A case that fails
costs only itself, unless it leaves the device unusable (`DeviceLost`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_lab.bench.device import captured
from moe_lab.bench.gpu_exits_planted import PlantedNetwork
from moe_lab.bench.timing import take_turns
from moe_lab.exits import Prediction
from moe_lab.exits.fast_predict import MANY, THRESHOLDS, FastPredictor
from moe_lab.exits.plan import plan_rows

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
    if compiled:
        found["fast, compiled"] = lambda: fast(compiled=True, graphs=False)
    if compiled and on_cuda:
        found["fast, compiled, graph"] = lambda: fast(compiled=True)
        if len(x) <= MANY:  # else none are joined
            found["fast, compiled, graph, apart"] = lambda: fast(compiled=True, joined=False)
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
    eager = rows.get("full, eager", {}).get("ms")
    for row in rows.values():
        row["speed_up"] = best / row["ms"] if best and "ms" in row else None
        row["reached"] = row["speed_up"] / ratio if row["speed_up"] and not row["case"].startswith("full") else None
        row["over_eager"] = eager / row["ms"] if eager and "ms" in row else None
    return list(rows.values())


def tune(planted: PlantedNetwork, batch: int, *, compiled: bool = True, **frame) -> list[dict]:
    """One row for every threshold and way, see `measure`; plans of equal rows are timed once."""
    example, _ = planted.images(max(2048, batch), seed=1)
    on_cuda = example.device.type == "cuda"
    known = cases(planted, example, example[:batch], compiled=compiled)
    prepared = {name: prepare for name, prepare in known.items() if name.startswith("full")}
    ways = {"fast, graph": {}} if on_cuda else {"fast, eager": {"graphs": False}}
    if compiled and on_cuda:
        ways["fast, compiled, graph"] = {"compiled": True}
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
