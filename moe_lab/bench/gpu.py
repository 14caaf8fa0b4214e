"""``python -m moe_lab.bench gpu``: the speed of one GPU. ``--tables moe exits``: these tables only.

    moe      the MoE layer beside a dense layer of equal multiply-adds: `gpu_cases`
    power    the same layers at the limit of the card's power: `gpu_power`
    gates    COMET's gate beside the top-k softmax gate: `gpu_gates`
    exits    stopping early beside the full network: `gpu_exits`
    trials   the recommender's trials side by side beside one at a time: `many_trials`

Everything that is compared is measured within one run. A table that fails costs only itself. With ``--device cpu`` the
sizes are tiny: a dry run, whose figures mean nothing.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_lab.bench import gpu_scattermoe
from moe_lab.bench.device import circumstances
from moe_lab.bench.gpu_cases import MoeBench, moe_tables
from moe_lab.bench.gpu_exits import ExitsBench, exits_tables
from moe_lab.bench.gpu_exits_planted import TINY
from moe_lab.bench.gpu_gates import GatesBench, gates_tables
from moe_lab.bench.gpu_gates_problem import Shape as GatesShape
from moe_lab.bench.gpu_power import measure_power, sensors
from moe_lab.bench.gpu_problem import Shape as MoeShape
from moe_lab.bench.tables import render_all
from moe_lab.names import check_name
from moe_lab.results import Result
from moe_lab.runtime import configure_threads, device_name, pick_device

Tables = Iterator[tuple[str, list[dict]]]


class TablesFailed(RuntimeError):
    """Some tables could not be measured; the Result holds the others."""


@dataclass(frozen=True)
class GpuBenchConfig:
    """What to time on one GPU.

    Attributes:
        tables: of `TABLES`; empty: all.
        device: "cuda", "cuda:1"; "cpu" for a dry run, see `dry_run`.
        moe, gates, exits: of these tables; moe also of the table "power".
        side_by_side: trials of a stack in the last table.
        trial_gates: gates of the last table; empty: those of `ManyTrialsBench`.
        trial_epochs: of each of these trials.
        alone: trials that are run one at a time, for comparison.

    Raises:
        ValueError: an unknown table or device, or CUDA was asked for and there is none.
    """

    tables: tuple[str, ...] = ()
    device: str = "cuda"
    moe: MoeBench = field(default_factory=MoeBench)
    gates: GatesBench = field(default_factory=GatesBench)
    exits: ExitsBench = field(default_factory=ExitsBench)
    side_by_side: int = 200
    trial_gates: tuple[str, ...] = ()
    trial_epochs: int = 8
    alone: int = 2

    def __post_init__(self) -> None:
        for name in self.tables:
            check_name("table", name, TABLES)
        try:
            pick_device(self.device)
        except ValueError as error:
            raise ValueError(
                f"{error} This benchmark is for a GPU: `python -m moe_lab.bench cpu` measures this machine, and "
                "`python -m moe_lab.bench gpu --device cpu` is a dry run with tiny sizes."
            ) from None

    @property
    def dry(self) -> bool:
        """Not on a GPU."""
        return pick_device(self.device).type == "cpu"

    def dry_run(self) -> GpuBenchConfig:
        """The same tables with tiny sizes, for a CPU."""
        frame = {"compiled": False, "rounds": 1, "steps": 2}
        moe = dataclasses.replace(self.moe, shapes=(MoeShape(24, 8, 16, 4, 2), MoeShape(24, 8, 16, 4, 1)), **frame)
        gates = dataclasses.replace(self.gates, shapes=(GatesShape(24, 8, 4, 2),), **frame)
        exits = dataclasses.replace(self.exits, size=TINY, batches=(8,), **frame)
        return dataclasses.replace(self, moe=moe, gates=gates, exits=exits, side_by_side=2)


def _moe(config: GpuBenchConfig, device: torch.device) -> Tables:
    return moe_tables(config.moe, device)


def _power(config: GpuBenchConfig, device: torch.device) -> Tables:
    read, seconds = None, 0.1 if config.dry else 4.0
    try:
        read = sensors(device)
    except ModuleNotFoundError as missing:
        if "power" in config.tables:
            raise
        print(f"without clock and watts: {missing}")  # nobody asked for this table by name: the others count
    for i, shape in enumerate(config.moe.shapes):
        yield "power", measure_power(config.moe.problem(shape, device), zeros=i == 0, seconds=seconds, read=read)


def _gates(config: GpuBenchConfig, device: torch.device) -> Tables:
    return gates_tables(config.gates, device)


def _exits(config: GpuBenchConfig, device: torch.device) -> Tables:
    return exits_tables(config.exits, device)


def _trials(config: GpuBenchConfig, device: torch.device) -> Tables:
    from moe_lab.bench.many_trials import ManyTrialsBench, trials_table

    bench = ManyTrialsBench(side_by_side=config.side_by_side, alone=config.alone)
    bench = dataclasses.replace(bench, changes={**bench.changes, "epochs": config.trial_epochs})
    if config.dry:
        data = {"n_users": 30, "n_items": 20, "items_per_user": 6}
        small = {"data_options": data, "n_experts": 3, "embedding": 2, "hidden": 4, "head": 4, "epochs": 1}
        bench = ManyTrialsBench("quick", ("hash", "comet"), config.side_by_side, alone=1, changes=small)
    bench = dataclasses.replace(bench, changes={**bench.changes, "device": str(device)})
    for gate in config.trial_gates or bench.gates:
        yield "trials", trials_table(dataclasses.replace(bench, gates=(gate,)))


TABLES: dict[str, tuple[str, Callable[[GpuBenchConfig, torch.device], Tables]]] = {
    "moe": ("MoE layer, forward and backward; of_dense, of_...: TFLOP/s of active operations, that case = 1", _moe),
    "power": (
        "The same layers, repeated for seconds; ms: then; rested_ms: one alone after a pause; joules: of one step",
        _power,
    ),
    "gates": ("COMET's gate, forward and backward; of_topk: time over that of the top-k softmax gate", _gates),
    "exits": (
        "Early exits; speed_up: over the fastest full network; reached: that / ratio of multiply-adds; "
        "over_eager: over the eager one",
        _exits,
    ),
    "trials": ("Trials per hour: side by side in one stack, and one at a time", _trials),
}


def run(config: GpuBenchConfig, *, root: Path | str | None = None, command: str = "") -> Result:
    """Measure, print the tables, and write a Result (experiment ``bench_gpu``; a curve per table, saved as it grows).

    Always measures anew: a finished Result of the same config and the same kind of GPU is replaced. On a CPU the tiny
    sizes of `GpuBenchConfig.dry_run` are taken.

    Raises:
        TablesFailed: a table failed; the others are in the Result, which is marked as failed.
    """
    threads = configure_threads()
    device = pick_device(config.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # where kernels, events and graphs go
    config = config.dry_run() if config.dry else config
    result = Result.open("bench_gpu", dataclasses.asdict(config) | {"chip": device_name(device)}, root, recompute=True)
    result.environment = circumstances(device) | {"scattermoe": gpu_scattermoe.version()}
    versions = {name: result.environment[name] for name in ("python", "torch", "cuda", "triton", "scattermoe")}
    print(f"{result.environment['device']}, {versions}, {threads} threads\n{command}")
    if config.dry:
        print("A dry run with tiny sizes: these figures mean nothing.")
    failed = {}
    with result.recording():
        for table, (title, measure) in TABLES.items():
            if config.tables and table not in config.tables:
                continue
            print(f"\n{title}", flush=True)
            try:
                for curve, rows in measure(config, device):
                    for row in rows:
                        result.log(curve, **row)
                    result.save()
                    if rows:  # no tuning, no parts where Triton cannot run
                        print(render_all(rows), flush=True)
            except Exception as error:  # one table must not cost the others their turn on a lent GPU
                traceback.print_exc()
                failed[table] = f"{type(error).__name__}: {error}"
        if failed:
            raise TablesFailed(f"these tables failed: {failed}; the others are in {result.path}")
        result.finish(_metrics(result) | {"command": command})
    print(f"written to {result.path}")
    return result


def _metrics(result: Result) -> dict[str, float]:
    found = {}
    for row in result.curves.get("moe", []):
        shape = f"T {row['tokens']}, D {row['width']}, H {row['hidden']}, E {row['experts']}, K {row['k']}"
        found |= {f"{key}/{shape}/{row['case']}": row[key] for key in _SHARES if row.get(key) is not None}
    for row in result.curves.get("gates", []):
        if row.get("of_topk") is not None:
            shape = f"T {row['tokens']}, D {row['width']}, E {row['experts']}, K {row['k']}"
            found[f"of_topk/{shape}, sharpness {row['sharpness']:g}/{row['case']}"] = row["of_topk"]
    for row in result.curves.get("exits", []):
        if row.get("reached") is not None:
            found[f"reached/batch {row['batch']}/{row['case']}"] = row["reached"]
    return found | {f"trials_times/{row['gate']}": row["times"] for row in result.curves.get("trials", [])}


_SHARES = ("of_dense", "of_scattermoe", "of_fixed")
