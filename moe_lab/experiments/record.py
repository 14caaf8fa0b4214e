"""Long runs on a bigger machine, kept in the repository as small Results.

    python -m moe_lab.experiments.record --what recommender --out data/recorded --workers 16 --seeds 0 1 2 3 4
    python -m moe_lab.experiments.record --what vision --out data/recorded --workers 6 --seeds 0 1 2
    python -m moe_lab.experiments.record --what tuning --out data/recorded --workers 16
    python -m moe_lab.experiments.record --what tuning --out data/recorded --workers 8 --stack-size 100 --device cuda
    python -m moe_lab.experiments.record --what vision-tuning --out data/recorded --workers 4 --stack-size 4
    python -m moe_lab.experiments.record --what unlearned --out data/recorded --workers 16
    python -m moe_lab.experiments.record --what unlearned-vision --out data/recorded --workers 4 --stack-size 4
    python -m moe_lab.experiments.record --what language --out data/recorded --workers 16 --seeds 0 1 2
    python -m moe_lab.experiments.record --what ablations --out data/recorded --workers 16 --seeds 0 1 2
    python -m moe_lab.experiments.record --what masked --out data/recorded --workers 6 --seeds 0 1 2
    python -m moe_lab.experiments.record --what translation --out data/recorded --workers 6 --seeds 0 1 2
    python -m moe_lab.experiments.record --what exits --out data/recorded --workers 16 --seeds 0 1 2
    python -m moe_lab.experiments.record --what bert --out data/recorded --workers 3 --seeds 0 1 2
    python -m moe_lab.experiments.record --what exits-cifar --out data/recorded --workers 2 --seeds 0 1 2

What several runs share (a backbone, a teacher) is trained first, once. Interrupt it as you like: what is finished is
found again, what was running goes on from its checkpoint. Full Results and checkpoints live in ``--scratch`` (default:
`paths.runs_dir`), thinned copies in ``--out``. The machine needs neither pooch (the data are in the cache) nor Optuna:
run ``--what tuning --plan-only`` where Optuna is and take the plan along in ``--scratch``.

Workers are dealt to the machine's GPUs in turn. Several on one GPU get in each other's way unless NVIDIA's MPS runs
(``nvidia-cuda-mps-control -d``): 14 students of COMET-BERT side by side took four minutes with it, and stood still
without.

To record something else, add a `Recording` to `recordings.RECORDINGS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lab.experiments.parallel import in_parallel
from moe_lab.experiments.recordings import RECORDINGS, Recording
from moe_lab.experiments.thinning import thinned
from moe_lab.paths import recorded_dir, runs_dir
from moe_lab.results import Result, find_results, to_frame
from moe_lab.results.plain import to_plain


def table(results: Sequence[Result], columns: Sequence[str]) -> str:
    """Mean and standard deviation over seeds, one line per setting."""
    frame = to_frame(results)
    settings = [name for name in columns if name in results[0].config]
    numbers = [name for name in columns if name not in settings and name in frame]
    grouped = frame.groupby(settings, sort=False)[numbers].agg(["mean", "std", "count"])
    return grouped.round(4).to_string()


def _job(job: tuple[str, Any, Path]) -> Result:
    what, config, root = job
    return RECORDINGS[what].run(config, root, 0)


def _shared_job(job: tuple[str, Any, Path]) -> Result:
    what, config, root = job
    return RECORDINGS[what].shared(config, root)


def _share(options: argparse.Namespace, configs: Sequence[Any]) -> None:
    """First what several runs share: workers that start together would each compute it."""
    recording = RECORDINGS[options.what]
    by_part = {repr(recording.part(config)): config for config in configs}
    jobs = [(options.what, config, options.scratch) for config in by_part.values()]
    for _, result in in_parallel(_shared_job, jobs, options.workers, label=f"{options.what}: shared"):
        print(f"shared: {result.path.stem} {result.wall_seconds:.0f} s", flush=True)


def _extend(options: argparse.Namespace, recording: Recording, configs: Sequence[Any]) -> None:
    """Studies begin with the trials of shorter ones in ``--out``."""
    from moe_lab.experiments.comet_tuning import is_shorter, take_over

    if recording.plan is None:
        raise SystemExit(f"--extend: {options.what} is no study of trials")
    for config in configs:
        study = recording.plan(config, options.scratch)
        alike = [r for r in find_results(study.experiment, root=options.out) if is_shorter(r, study)]
        if not alike:
            raise SystemExit(f"--extend: {options.out} holds no shorter study like {study.path.name}")
        earlier = max(alike, key=lambda result: result.config["n_trials"])
        if not study.finished:
            print(f"{take_over(study, earlier)} trials taken over from {earlier.path.name}", flush=True)


def _finished(options: argparse.Namespace) -> list[Any]:
    return [result.config for result in find_results(root=options.scratch)]


def record(options: argparse.Namespace) -> list[Result]:
    """Run what is missing, write the thinned copies, time what is to be timed, return the copies."""
    recording = RECORDINGS[options.what]
    configs = recording.configs(options)
    if options.plan_only:
        if recording.plan is None:
            raise SystemExit(f"--plan-only: {options.what} has nothing to plan")
        for config in configs:
            print("planned:", recording.plan(config, options.scratch).path.name)
        return []
    if options.timing == "only":
        return _timed(recording, configs, options)
    if options.extend:
        _extend(options, recording, configs)
    if recording.shared is not None:
        done = _finished(options)
        _share(options, [config for config in configs if to_plain(config, "config") not in done])
        if options.shared_only:
            return []
    if recording.workers_inside:
        how = {}
        if recording.stacks:
            how = {"stack_size": options.stack_size, "checkpoint_epochs": options.checkpoint_epochs}
        finished = (recording.run(config, options.scratch, options.workers, **how) for config in configs)
    else:
        jobs = [(options.what, config, options.scratch) for config in configs]
        finished = (result for _, result in in_parallel(_job, jobs, options.workers, label=options.what))
    copies = []
    for result in finished:
        copies.append(thinned(result, options.out, options.commit))
        print(f"{len(copies)}/{len(configs)} {result.path.stem} {result.wall_seconds:.0f} s", flush=True)
    if recording.time is not None and options.timing == "after":
        return _timed(recording, configs, options)
    return copies


def _timed(recording: Recording, configs: Sequence[Any], options: argparse.Namespace) -> list[Result]:
    """Time the runs that are finished, one after another; their copies once more."""
    if recording.time is None:
        raise SystemExit(f"--timing only: {options.what} has nothing to time")
    finished = _finished(options)
    copies = []
    for config in configs:
        if to_plain(config, "config") in finished:
            result = recording.time(config, options.scratch)
            copies.append(thinned(result, options.out, options.commit))
            print(f"timed: {result.path.stem}", flush=True)
    return copies


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_lab.experiments.record", description=__doc__.splitlines()[0])
    parser.add_argument("--what", required=True, choices=sorted(RECORDINGS))
    parser.add_argument("--out", type=Path, default=recorded_dir(), help="where the small copies go")
    parser.add_argument("--scratch", type=Path, default=runs_dir(), help="where runs and checkpoints live")
    parser.add_argument("--profile", default="standard")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--teacher-seeds", type=int, nargs="+", default=[0, 1, 2], help="bert: a teacher for each")
    parser.add_argument("--gates", nargs="+", default=None, help="default: all")
    parser.add_argument("--trials", type=int, default=None, help="tuning: trials per gate")
    parser.add_argument("--epochs", type=int, default=None, help="tuning: of a trial (default: the profile's)")
    parser.add_argument("--device", default=None, help="tuning: of all trials (default: the profile's)")
    parser.add_argument("--stack-size", type=int, default=1, help="tuning: trials of a gate that train as one stack")
    parser.add_argument("--checkpoint-epochs", type=int, default=1, help="tuning: epochs from checkpoint to checkpoint")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--timing",
        choices=("after", "no", "only"),
        default="after",
        help="bert: milliseconds are measured run by run when all are done (after), not (no: the machine is shared), "
        "or now, of what is finished, and nothing is trained (only)",
    )
    parser.add_argument("--commit", default=None, help="of this code, if the machine has no git checkout")
    parser.add_argument("--shared-only", action="store_true", help="exits, bert: backbones or teachers, no run")
    parser.add_argument(
        "--extend", action="store_true", help="tuning: begin with the trials of a shorter study that is in --out"
    )
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
