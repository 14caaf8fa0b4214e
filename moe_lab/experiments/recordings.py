"""What can be recorded: configs, how each is run, what several runs share. `record` is the command.

Imports are inside functions: a machine without the packages of one experiment can record another.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_lab.results import Result

GATES = ("softmax", "hash", "hash_balanced", "hash+", "topk", "topk+", "dselect_k", "dselect_k+", "comet", "comet+")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One thing that can be recorded.

    Attributes:
        configs: options of the command line -> configs to run.
        run: (config, root, n_workers) -> Result; worker processes find it here by the name of the recording.
        columns: of the printed table: fields of the config, then metrics.
        workers_inside: a run uses the workers itself (a study with many trials); else runs are spread over them.
        stacks: such a run also takes ``stack_size`` and ``checkpoint_epochs``, see `comet_tuning.run`.
        plan: (config, root) -> Result: what ``--plan-only`` does.
        part: config -> the config of what several runs share (a backbone, a teacher).
        shared: (config, root) -> Result: computes that part.
        time: (config, root) -> Result: measures a finished run's milliseconds, when no other run is under way.
    """

    configs: Callable[[argparse.Namespace], Sequence[Any]]
    run: Callable[..., Result]
    columns: tuple[str, ...]
    workers_inside: bool = False
    stacks: bool = False
    plan: Callable[[Any, Path], Result] | None = None
    part: Callable[[Any], Any] = lambda config: config
    shared: Callable[[Any, Path], Result] | None = None
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

    return _study(TuningConfig, options)


def _vision_tuning_configs(options: argparse.Namespace) -> list[Any]:
    from moe_lab.experiments.vision_tuning import VisionTuningConfig

    return _study(VisionTuningConfig, options)


def _study(kind: Any, options: argparse.Namespace) -> list[Any]:
    """One study, as the options have it; what they do not name is the profile's."""
    asked = {"gates": options.gates, "n_trials": options.trials}
    changes = {name: value for name, value in asked.items() if value is not None}
    trial = {name: value for name in ("device", "epochs") if (value := getattr(options, name)) is not None}
    if trial:
        changes["changes"] = {**kind.profile(options.profile).changes, **trial}
    return [kind.profile(options.profile, seed=options.seeds[0], **changes)]


def _run_tuning(config: Any, root: Path, n_workers: int, **how: int) -> Result:
    from moe_lab.experiments import comet_tuning

    return comet_tuning.run(config, root=root, n_workers=n_workers, **how)


def _run_vision_tuning(config: Any, root: Path, n_workers: int, **how: int) -> Result:
    from moe_lab.experiments import vision_tuning

    return vision_tuning.run(config, root=root, n_workers=n_workers, **how)


def _plan_vision_tuning(config: Any, root: Path) -> Result:
    from moe_lab.experiments import vision_tuning

    return vision_tuning.plan(config, root=root)


def _plan_tuning(config: Any, root: Path) -> Result:
    from moe_lab.experiments import comet_tuning

    return comet_tuning.plan(config, root=root)


def _run_unlearned(config: Any, root: Path, n_workers: int, **how: int) -> Result:
    from moe_lab.experiments import unlearned_search

    return unlearned_search.run(config, root=root, n_workers=n_workers, **how)


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


def _exit_body(config: Any, root: Path) -> Result:
    from moe_lab.experiments import jei_backbone
    from moe_lab.runtime import pick_device

    data, device = jei_backbone.load_images(config), pick_device(config.device)
    return jei_backbone.shared_backbone(config.backbone, data, device, root=root, progress=False)[1]


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


def _taught(config: Any) -> Any:
    from moe_lab.experiments.comet_bert_config import ImportanceConfig

    return config.part(ImportanceConfig)


def _teach_bert(config: Any, root: Path) -> Result:
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


_EXITS = Recording(
    _exit_configs,
    _run_by("jei_dnn"),
    (*_EXIT_SETTINGS, *_EXIT_METRICS),
    part=lambda config: config.backbone,
    shared=_exit_body,
)

_STUDY_COLUMNS = ("n_trials", "trials", "trial_seconds")

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
        _tuning_configs, _run_tuning, _STUDY_COLUMNS, workers_inside=True, stacks=True, plan=_plan_tuning
    ),
    "vision-tuning": Recording(
        _vision_tuning_configs,
        _run_vision_tuning,
        _STUDY_COLUMNS,
        workers_inside=True,
        stacks=True,
        plan=_plan_vision_tuning,
    ),
    "unlearned": Recording(_tuning_configs, _run_unlearned, ("n_trials", "trials"), workers_inside=True, stacks=True),
    "unlearned-vision": Recording(
        _vision_tuning_configs, _run_unlearned, ("n_trials", "trials"), workers_inside=True, stacks=True
    ),
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
    "exits": _EXITS,
    "exits-cifar": dataclasses.replace(_EXITS, configs=_exit_images_configs),
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
        part=_taught,
        shared=_teach_bert,
        time=_time_bert,
    ),
    "translation": Recording(
        _translation_configs, _run_by("evomoe_translation"), ("gate", "bleu", "test_loss", "exact", "seconds")
    ),
}
