"""Long runs on a bigger machine, kept in the repository as small Results.

    python -m moe_lab.experiments.record --what recommender --out data/recorded --workers 16 --seeds 0 1 2 3 4
    python -m moe_lab.experiments.record --what vision --out data/recorded --workers 6 --seeds 0 1 2
    python -m moe_lab.experiments.record --what tuning --out data/recorded --workers 16
    python -m moe_lab.experiments.record --what unlearned --out data/recorded --workers 16
    python -m moe_lab.experiments.record --what language --out data/recorded --workers 16 --seeds 0 1 2
    python -m moe_lab.experiments.record --what ablations --out data/recorded --workers 16 --seeds 0 1 2
    python -m moe_lab.experiments.record --what masked --out data/recorded --workers 6 --seeds 0 1 2
    python -m moe_lab.experiments.record --what translation --out data/recorded --workers 6 --seeds 0 1 2
    python -m moe_lab.experiments.record --what exits --out data/recorded --workers 16 --seeds 0 1 2
    python -m moe_lab.experiments.record --what bert --seeds 0 1 2 --plan-only        (the teachers, once)
    python -m moe_lab.experiments.record --what bert --out data/recorded --workers 3 --seeds 0 1 2
    python -m moe_lab.experiments.record --what exits-cifar --out data/recorded --workers 2 --seeds 0 1 2

Interrupt it as you like: what is finished is found again, what was running goes on from its checkpoint. Full Results
and checkpoints live in ``--scratch`` (default: `paths.runs_dir`), thinned copies in ``--out``. The machine needs
neither pooch (the data are in the cache) nor Optuna: run ``--what tuning --plan-only`` where Optuna is and take the
plan along in ``--scratch``.

To record something else, add a `Recording` to `RECORDINGS`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_lab.experiments.parallel import in_parallel
from moe_lab.paths import recorded_dir, runs_dir
from moe_lab.results import Result, find_results, to_frame
from moe_lab.results.plain import to_plain

GATES = ("softmax", "hash", "hash_balanced", "hash+", "topk", "topk+", "dselect_k", "dselect_k+", "comet", "comet+")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One thing that can be recorded.

    Attributes:
        configs: options of the command line -> configs to run.
        run: (config, root, n_workers) -> Result; worker processes find it here by the name of the recording.
        columns: of the printed table: fields of the config, then metrics.
        workers_inside: a run uses the workers itself (a study with many trials); else runs are spread over them.
        prepare: (config, root): what ``--plan-only`` does.
        time: (config, root) -> Result: measures a finished run's milliseconds, when no other run is under way.
    """

    configs: Callable[[argparse.Namespace], Sequence[Any]]
    run: Callable[[Any, Path, int], Result]
    columns: tuple[str, ...]
    workers_inside: bool = False
    prepare: Callable[[Any, Path], Any] | None = None
    time: Callable[[Any, Path], Result] | None = None


def _recommender_configs(options: argparse.Namespace) -> list[Any]:
    """All gates at both task weights; a single expert; COMET and DSelect-k at other gammas and at a smaller lambda.

    The last are done for three seeds at most: they are there to show collapse and its opposite, not to rank gates.
    """
    from moe_lab.experiments.recommender_config import RecommenderConfig

    def config(**changes):
        return RecommenderConfig.profile(options.profile, **changes)

    gates = options.gates or GATES
    main = [config(gate=gate, seed=seed) for seed in options.seeds for gate in gates]
    main += [config(gate="softmax", n_experts=1, seed=seed) for seed in options.seeds]
    few = options.seeds[:3]
    other_weight = [config(gate=gate, seed=seed, watch_weight=0.1) for seed in few for gate in gates]
    shapes = ({"gamma": 0.1}, {"gamma": 10.0}, {"entropy_weight": 0.01})
    smooth = [gate for gate in gates if gate in ("dselect_k", "comet", "comet+")]
    extras = [config(gate=gate, seed=seed, **shape) for seed in few for shape in shapes for gate in smooth]
    return main + other_weight + extras


def _vision_configs(options: argparse.Namespace) -> list[Any]:
    """All gates and baselines; then gates on centred pixels; then other gammas and entropy weights on raw pixels."""
    from moe_lab.experiments.vision_config import BASELINES, VisionConfig

    gates = options.gates or (*BASELINES, "softmax", "hash", "topk", "topk+", "dselect_k", "comet", "comet+")
    variants: list[dict[str, Any]] = [{"gate": gate} for gate in gates]
    centred = [(gate, 1.0) for gate in ("softmax", "topk", "dselect_k", "comet", "comet+")]
    centred += [("comet", 10.0), ("comet", 0.1)]
    variants += [{"gate": gate, "gamma": gamma, "center_pixels": True} for gate, gamma in centred if gate in gates]
    others = [{"gamma": 1.0}, {"gamma": 0.01}, {"entropy_weight": 1e-3}]
    variants += [{"gate": "comet", **other} for other in others if "comet" in gates]
    return [
        VisionConfig.profile(options.profile, seed=seed, **variant) for variant in variants for seed in options.seeds
    ]


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


def _run_unlearned(config: Any, root: Path, n_workers: int) -> Result:
    from moe_lab.experiments import unlearned_search

    return unlearned_search.run(config, root=root, n_workers=n_workers)


def _language_configs(options: argparse.Namespace) -> list[Any]:
    """Every gate, seed by seed: what is finished early is a complete comparison of fewer seeds."""
    from moe_lab.experiments.evomoe_language import LanguageConfig
    from moe_lab.experiments.mixture_config import GATES

    gates = options.gates or GATES
    return [LanguageConfig.profile(options.profile, seed=seed, gate=gate) for seed in options.seeds for gate in gates]


def _ablation_configs(options: argparse.Namespace) -> list[Any]:
    """One knob of the dense-to-sparse gate or of the spawn at a time; gates at other numbers of experts."""
    from moe_lab.experiments.evomoe_language import ABLATIONS, LanguageConfig

    return [
        LanguageConfig.profile(options.profile, seed=seed, **change) for seed in options.seeds for change in ABLATIONS
    ]


def _masked_configs(options: argparse.Namespace) -> list[Any]:
    from moe_lab.experiments.evomoe_masked import MaskedConfig
    from moe_lab.experiments.mixture_config import PAPER_GATES

    gates = options.gates or PAPER_GATES
    configs = [MaskedConfig.profile(options.profile, seed=seed, gate=gate) for seed in options.seeds for gate in gates]
    return configs + [
        MaskedConfig.profile(options.profile, seed=s, gate="dense", pretrain=False) for s in options.seeds
    ]


def _translation_configs(options: argparse.Namespace) -> list[Any]:
    from moe_lab.experiments.evomoe_translation import TranslationConfig
    from moe_lab.experiments.mixture_config import PAPER_GATES

    gates = options.gates or PAPER_GATES
    return [
        TranslationConfig.profile(options.profile, seed=seed, gate=gate) for seed in options.seeds for gate in gates
    ]


def _exit_configs(options: argparse.Namespace) -> list[Any]:
    """Both embedded data sets and MNIST; then, on moved digits, one thing at a time: `jei_config.ABLATIONS`.

    Each seed has data of its own: a spread over seeds on one test set would say nothing of another test set.
    """
    from moe_lab.experiments.jei_config import ABLATIONS, JeiConfig

    variants: list[dict[str, Any]] = [{}, {"dataset": "planted-difficulty"}, {"dataset": "mnist"}, *ABLATIONS]
    return [JeiConfig.profile(options.profile, seed=s, data_seed=s, **v) for s in options.seeds for v in variants]


def _exit_images_configs(options: argparse.Namespace) -> list[Any]:
    """CIFAR-10 with a T2T body: a GPU. The modes once more, where classes are hard."""
    from moe_lab.experiments.jei_config import JeiConfig

    variants: list[dict[str, Any]] = [{}, {"mode": "detached"}, {"mode": "expected"}, {"finetune_epochs": 10}]
    return [
        JeiConfig.profile(options.profile, dataset="cifar-10", seed=s, data_seed=s, **variant)
        for s in options.seeds
        for variant in variants
    ]


_EXIT_SETTINGS = (
    "dataset",
    "mode",
    "balance",
    "model",
    "gate_inputs",
    "phase_steps",
    "warmup",
    "warmup_loss",
    "finetune_epochs",
)
_EXIT_METRICS = ("backbone_accuracy", "gain_over_geometric", "gain_over_shared", "coverage", "set_size", "seconds")


def _bert_configs(options: argparse.Namespace) -> list[Any]:
    """Teacher by teacher, seed by seed: every gate for the first teacher, for the others what the claims are about.

    Last, for the first teacher, COMET as the authors' example script sets it: there to show collapse, not to rank.
    """
    from moe_lab.experiments.comet_bert_config import AUTHORS_SCRIPT, CLAIMED_GATES, PAPER_GATES, CometBertConfig

    configs = []
    for teacher in options.teacher_seeds:
        gates = options.gates or (PAPER_GATES if teacher == options.teacher_seeds[0] else CLAIMED_GATES)
        pairs = [(seed, gate) for seed in options.seeds for gate in gates]
        configs += [
            CometBertConfig.profile(options.profile, seed=seed, gate=gate, teacher_seed=teacher)
            for seed, gate in pairs
            if gate != "teacher" or seed == options.seeds[0]  # it is the same for all seeds of the students
        ]
    first = options.teacher_seeds[0]
    seeds = options.seeds if "comet" in (options.gates or PAPER_GATES) else ()
    as_script = [
        CometBertConfig.profile(options.profile, seed=seed, gate="comet", teacher_seed=first, **AUTHORS_SCRIPT)
        for seed in seeds
    ]
    return configs + [config for config in as_script if config not in configs]


def _teach_bert(config: Any, root: Path) -> Result:
    """What all runs of a teacher share: without it, workers that start together would each train the teacher."""
    from moe_lab.experiments import comet_bert

    return comet_bert.importance(config, root=root)


def _run_bert(config: Any, root: Path, n_workers: int) -> Result:
    from moe_lab.experiments import comet_bert

    return comet_bert.run(config, root=root, progress=n_workers == 1, timed=False)


def _time_bert(config: Any, root: Path) -> Result:
    from moe_lab.experiments import comet_bert

    return comet_bert.retime(config, root=root)


_LANGUAGE_COLUMNS = ("gate", "n_experts", "test_loss", "final_loss", "experts_per_token", "training_flops", "seconds")


def _run_by(module: str) -> Callable[[Any, Path, int], Result]:
    """``run`` of an experiment that uses one worker, imported only when it runs."""

    def run(config: Any, root: Path, n_workers: int) -> Result:
        experiment = import_module(f"moe_lab.experiments.{module}")
        return experiment.run(config, root=root, progress=n_workers == 1)

    return run


RECORDINGS: dict[str, Recording] = {
    "recommender": Recording(
        _recommender_configs,
        _run_by("comet_recommender"),
        (
            *("watch_weight", "gate", "n_experts", "gamma", "entropy_weight"),
            *("test_loss", "test_auc", "test_mse", "experts_per_example", "within_k", "used_experts"),
        ),
    ),
    "vision": Recording(
        _vision_configs,
        _run_by("comet_vision"),
        (
            *("gate", "gamma", "entropy_weight", "center_pixels", "test_loss", "test_accuracy"),
            *("experts_per_example", "experts_run", "same_set", "within_k", "used_experts"),
        ),
    ),
    "tuning": Recording(
        _tuning_configs, _run_tuning, ("n_trials", "trials", "trial_seconds"), workers_inside=True, prepare=_plan_tuning
    ),
    "unlearned": Recording(_tuning_configs, _run_unlearned, ("n_trials", "trials"), workers_inside=True),
    "language": Recording(_language_configs, _run_by("evomoe_language"), _LANGUAGE_COLUMNS),
    "ablations": Recording(
        _ablation_configs,
        _run_by("evomoe_language"),
        (
            *("noise", "weights_from", "threshold", "tau_end", "soft_share", "shared_share", "mask_ratio"),
            *_LANGUAGE_COLUMNS,
        ),
    ),
    "masked": Recording(
        _masked_configs, _run_by("evomoe_masked"), ("gate", "pretrain", "test_accuracy", "valid_accuracy", "seconds")
    ),
    "exits": Recording(
        _exit_configs,
        _run_by("jei_dnn"),
        (*_EXIT_SETTINGS, *_EXIT_METRICS),
    ),
    "exits-cifar": Recording(_exit_images_configs, _run_by("jei_dnn"), (*_EXIT_SETTINGS, *_EXIT_METRICS)),
    "bert": Recording(
        _bert_configs,
        _run_bert,
        (
            *("task", "model", "teacher_seed", "gate", "gamma", "entropy_weight"),
            *(
                "test_score",
                "teacher_score",
                "teacher_agreement",
                "experts_per_token",
                "decided_by_word",
                "flops_per_token",
                "speedup_1",
                "speedup_64",
                "seconds",
            ),
        ),
        prepare=_teach_bert,
        time=_time_bert,
    ),
    "translation": Recording(
        _translation_configs, _run_by("evomoe_translation"), ("gate", "bleu", "test_loss", "exact", "seconds")
    ),
}


def _is_exit_ablation(config: Mapping[str, Any]) -> bool:
    from moe_lab.experiments.jei_config import ABLATIONS, JeiConfig

    usual = JeiConfig.profile("standard", dataset=config["dataset"])
    return any(config[name] != getattr(usual, name) for change in ABLATIONS for name in change)


def thinned(result: Result, out: Path, commit: str | None = None, most_rows: int = 30) -> Result:
    """A small copy under ``out``: per curve (and task) at most ``most_rows`` rows, floats of curves rounded.

    Trials are kept whole, they are the result; the plan they repeat is not. Routing rows lose their histogram. Of
    language models and COMET-BERT only seed 0 keeps the weights of watched tokens and sentences, of early exits the
    prediction sets at every alpha and the reliability diagrams. Ablations of early exits keep the points of JEI-DNN and
    of the two threshold rules: the other methods are those of the run that nothing was changed in.
    """
    from moe_lab.experiments.comet_recommender import rounded

    def thin(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if name == "trials":
            return rows
        last = max((row.get("epoch", 0) for row in rows), default=0)
        step = -(-last // most_rows) if last else 1
        kept = [
            row
            for row in rows
            if "epoch" not in row or row["epoch"] % step == 0 or row["epoch"] in (1, last) or row.get("final")
        ]
        return [rounded({key: value for key, value in row.items() if key != "histogram"}, 5) for row in kept]

    dropped = {"plan"}
    if result.experiment.startswith(("evomoe", "comet_bert")) and result.seed:
        dropped |= {"watched", "sentences"}
    if result.experiment == "jei_dnn" and result.seed:
        dropped |= {"conformal", "reliability"}
    curves = {name: thin(name, rows) for name, rows in result.curves.items() if name not in dropped}
    if result.experiment == "jei_dnn" and _is_exit_ablation(result.config):
        curves["points"] = [row for row in curves["points"] if row["method"] in ("jei_dnn", "geometric", "shared")]
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
    numbers = [name for name in columns if name not in settings and name in frame]
    grouped = frame.groupby(settings, sort=False)[numbers].agg(["mean", "std", "count"])
    return grouped.round(4).to_string()


def _job(job: tuple[str, Any, Path]) -> Result:
    what, config, root = job
    return RECORDINGS[what].run(config, root, 0)


def record(options: argparse.Namespace) -> list[Result]:
    """Run what is missing, write the thinned copies, time what is to be timed, return the copies."""
    recording = RECORDINGS[options.what]
    configs = recording.configs(options)
    if options.plan_only:
        if recording.prepare is None:
            raise SystemExit(f"--plan-only: {options.what} has nothing to plan")
        for config in configs:
            print("planned:", recording.prepare(config, options.scratch).path.name)
        return []
    if options.timing == "only":
        return _timed(recording, configs, options)
    if recording.workers_inside:
        finished = (recording.run(config, options.scratch, options.workers) for config in configs)
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
    finished = [result.config for result in find_results(root=options.scratch)]
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
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--timing",
        choices=("after", "no", "only"),
        default="after",
        help="bert: milliseconds are measured run by run when all are done (after), not (no: the machine is shared), "
        "or now, of what is finished, and nothing is trained (only)",
    )
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
