"""Long runs on a bigger machine, kept in the repository as small Results.

    python -m moe_lab.experiments.record --what recommender --out data/recorded --workers 16 --seeds 0 1 2 3 4
    python -m moe_lab.experiments.record --what tuning --out data/recorded --workers 16

Interrupt it as you like: what is finished is found again, what was running goes on from its checkpoint. Full Results
    and
checkpoints live in ``--scratch`` (default: `paths.runs_dir`), thinned copies in ``--out``. Needs neither pooch (the
data are in the cache) nor, for tuning, Optuna, if ``--plan-only`` was run before where Optuna is.

To record something else, add a `Recording` to `RECORDINGS`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_lab.experiments.parallel import in_parallel
from moe_lab.paths import recorded_dir, runs_dir
from moe_lab.results import Result, to_frame

GATES = ("softmax", "hash", "hash_balanced", "hash+", "topk", "topk+", "dselect_k", "dselect_k+", "comet", "comet+")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One thing that can be recorded.

    Attributes:
        configs: options of the command line -> configs to run.
        run: (config, root, n_workers) -> Result; a function of a module, since worker processes import it.
        columns: of the printed table: fields of the config, then metrics.
        workers_inside: a run uses the workers itself (a study with many trials); else runs are spread over them.
        prepare: (config, root): what ``--plan-only`` does.
    """

    configs: Callable[[argparse.Namespace], Sequence[Any]]
    run: Callable[[Any, Path, int], Result]
    columns: tuple[str, ...]
    workers_inside: bool = False
    prepare: Callable[[Any, Path], Any] | None = None


def _recommender_configs(options: argparse.Namespace) -> list[Any]:
    """All gates at both task weights, and the smooth-step gates at a small and a large gamma besides."""
    from moe_lab.experiments.recommender_config import RecommenderConfig

    def config(**changes):
        return RecommenderConfig.profile(options.profile, **changes)

    gates = options.gates or GATES
    configs = [config(gate=gate, seed=seed) for seed in options.seeds for gate in gates]
    configs += [
        config(gate=gate, seed=seed, gamma=gamma)
        for seed in options.seeds
        for gamma in (0.1, 10.0)
        for gate in gates
        if gate.startswith(("comet", "dselect_k"))
    ]
    return configs + [config(gate=gate, seed=seed, watch_weight=0.1) for seed in options.seeds for gate in gates]


def _run_recommender(config: Any, root: Path, n_workers: int) -> Result:
    from moe_lab.experiments import comet_recommender

    return comet_recommender.run(config, root=root, progress=n_workers == 1)


def _tuning_configs(options: argparse.Namespace) -> list[Any]:
    from moe_lab.experiments.comet_tuning import TuningConfig

    changes = {
        name: value for name, value in (("gates", options.gates), ("n_trials", options.trials)) if value is not None
    }
    return [TuningConfig.profile(options.profile, seed=seed, **changes) for seed in options.seeds[:1]]


def _run_tuning(config: Any, root: Path, n_workers: int) -> Result:
    from moe_lab.experiments import comet_tuning

    return comet_tuning.run(config, root=root, n_workers=n_workers)


def _plan_tuning(config: Any, root: Path) -> Result:
    from moe_lab.experiments import comet_tuning

    return comet_tuning.plan(config, root=root)


RECORDINGS: dict[str, Recording] = {
    "recommender": Recording(
        _recommender_configs,
        _run_recommender,
        ("gate", "gamma", "watch_weight", "test_loss", "test_auc", "test_mse", "experts_per_example", "used_experts"),
    ),
    "tuning": Recording(
        _tuning_configs, _run_tuning, ("n_trials", "trials", "trial_seconds"), workers_inside=True, prepare=_plan_tuning
    ),
}


def thinned(result: Result, out: Path, commit: str | None = None, most_rows: int = 30) -> Result:
    """A small copy under ``out``: per curve (and task) at most ``most_rows`` rows, floats of curves rounded.

    Trials and plans are kept whole: they are the result. Routing rows lose their histogram.
    """
    from moe_lab.experiments.comet_recommender import rounded

    def thin(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if name in ("trials", "plan"):
            return rows
        last = max((row.get("epoch", 0) for row in rows), default=0)
        step = -(-last // most_rows) if last else 1
        kept = [row for row in rows if "epoch" not in row or row["epoch"] % step == 0 or row["epoch"] in (1, last)]
        return [rounded({key: value for key, value in row.items() if key != "histogram"}, 5) for row in kept]

    curves = {name: thin(name, rows) for name, rows in result.curves.items()}
    about = dict(result.environment)
    if commit is not None and about.get("commit") is None:
        about["commit"] = commit
    path = out / result.experiment / result.path.name
    copy = dataclasses.replace(result, path=path, curves=curves, environment=about)
    copy.save()
    return copy


def table(results: Sequence[Result], columns: Sequence[str]) -> str:
    """Mean and standard deviation over seeds, one line per setting."""
    frame = to_frame(results)
    settings = [name for name in columns if name in results[0].config]
    numbers = [name for name in columns if name not in settings]
    grouped = frame.groupby(settings, sort=False)[numbers].agg(["mean", "std", "count"])
    return grouped.round(4).to_string()


def _job(job: tuple[str, Any, Path]) -> Result:
    what, config, root = job
    return RECORDINGS[what].run(config, root, 0)


def record(options: argparse.Namespace) -> list[Result]:
    """Run what is missing, write the thinned copies, return them."""
    recording = RECORDINGS[options.what]
    configs = recording.configs(options)
    if options.plan_only:
        if recording.prepare is None:
            raise SystemExit(f"--plan-only: {options.what} has nothing to plan")
        for config in configs:
            print("planned:", recording.prepare(config, options.scratch).path.name)
        return []
    if recording.workers_inside:
        finished = (recording.run(config, options.scratch, options.workers) for config in configs)
    else:
        jobs = [(options.what, config, options.scratch) for config in configs]
        finished = (result for _, result in in_parallel(_job, jobs, options.workers, label=options.what))
    copies = []
    for result in finished:
        copies.append(thinned(result, options.out, options.commit))
        print(f"{len(copies)}/{len(configs)} {result.path.stem} {result.wall_seconds:.0f} s", flush=True)
    return copies


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_lab.experiments.record", description=__doc__.splitlines()[0])
    parser.add_argument("--what", required=True, choices=sorted(RECORDINGS))
    parser.add_argument("--out", type=Path, default=recorded_dir(), help="where the small copies go")
    parser.add_argument("--scratch", type=Path, default=runs_dir(), help="where runs and checkpoints live")
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--gates", nargs="+", default=None, help="default: all")
    parser.add_argument("--trials", type=int, default=None, help="tuning: trials per gate")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--commit", default=None, help="of this code, if the machine has no git checkout")
    parser.add_argument("--plan-only", action="store_true", help="draw the trials (needs Optuna), run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    copies = record(options)
    if copies:
        print(table(copies, RECORDINGS[options.what].columns))


if __name__ == "__main__":
    main()
