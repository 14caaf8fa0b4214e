"""Random searches that were recorded: the one of a CPU, the one of a GPU, and both in one table.

A study on a GPU says so in its config (``device`` among the changes) and trains its trials in stacks; a study on a
CPU has fewer trials of the same search space. Taught in notebook 06.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from moe_lab.experiments import comet_tuning, unlearned_search, vision_tuning
from moe_lab.experiments.comet_tuning import pools
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results
from moe_lab.search_spaces import describe, search_space
from moe_lab.tuning import Pool, TopShare, expected_best, top_share


def _longest(studies: list[Result]) -> Result | None:
    return max(studies, key=lambda study: study.config["n_trials"], default=None)


def _studies(experiment: str, root: Path | None, **filters: str) -> list[Result]:
    root = recorded_dir() if root is None else root
    return find_results(experiment, root=root, **filters) if root.exists() else []


def on_gpu(study: Result) -> bool:
    """Its trials were told to run on a GPU."""
    return str(study.config["changes"].get("device", "cpu")).startswith("cuda")


def cpu_study(recommender: str = "standard", root: Path | None = None) -> Result | None:
    """The longest study of `comet_tuning` on a CPU; profile "standard": MovieLens-100k. None: not recorded."""
    studies = _studies(comet_tuning.EXPERIMENT, root, recommender=recommender)
    return _longest([study for study in studies if not on_gpu(study)])


def gpu_study(recommender: str = "standard", root: Path | None = None) -> Result | None:
    """The same on a GPU."""
    studies = _studies(comet_tuning.EXPERIMENT, root, recommender=recommender)
    return _longest([study for study in studies if on_gpu(study)])


def vision_study(vision: str = "standard", root: Path | None = None) -> Result | None:
    """The longest study of `vision_tuning`; profile "standard": MultiMNIST. None: not recorded."""
    return _longest(_studies(vision_tuning.EXPERIMENT, root, vision=vision))


def control_of(study: Result | None, root: Path | None = None) -> Result | None:
    """The study's trials of "+" with nothing learned (`unlearned_search`), if they were recorded."""
    controls = _studies(unlearned_search.EXPERIMENT, root)
    return next((control for control in controls if study is not None and control.config == study.config), None)


def machine(study: Result) -> str:
    """``NVIDIA H100 80GB HBM3, PyTorch 2.11.0, 100 trials side by side``."""
    about = study.environment
    beside = about.get("trials_side_by_side", 1)
    stacked = f", {beside} trials side by side" if beside > 1 else ""
    return f"{about['device']}, PyTorch {str(about['torch']).partition('+')[0]}{stacked}"


def best_accuracy(study: Result) -> dict[str, TopShare]:
    """Test accuracy of the trials in `top_share`, the best 5 % by validation loss; empty where trials have none."""
    rows = pd.DataFrame(study.curves["trials"])
    if "test_accuracy" not in rows:
        return {}
    found = {}
    for gate, pool in pools(study).items():
        n = top_share(pool).n
        best = rows[rows["gate"] == gate].sort_values("valid_loss", kind="stable")["test_accuracy"].head(n)
        found[gate] = TopShare(best.mean(), best.sem(), n)
    return found


def _readable(top: TopShare) -> str:
    return f"{top.mean:.4f}" + (f" ± {top.standard_error:.4f}" if top.n > 1 else "")


def tuning_table(dataset: str, of_gate: dict[str, Pool]) -> pd.DataFrame:
    """The paper's table entry per gate: the best 5 % of trials, beside the size of the space they were drawn from."""
    rows = {}
    for gate, pool in of_gate.items():
        top = top_share(pool)
        rows[gate] = {
            "search space": describe(search_space(dataset, gate)),
            "trials": len(pool.test),
            f"test loss, best {top.n}": _readable(top),
        }
    return pd.DataFrame(rows).T.rename_axis("gate")


def side_by_side(studies: Mapping[str, Result], dataset: str) -> pd.DataFrame:
    """A row per gate: size of the search space, then for each study what it found.

    Args:
        studies: label -> study; the label stands before its columns, unless there is only one study.
        dataset: whose search space it is.

    Returns:
        Columns of a study: ``trials`` (that diverged, if any), ``best 5 %`` (mean test loss of the best by validation,
        and standard error), ``after 1 trial`` (expected test loss), and ``accuracy, best 5 %`` (`best_accuracy`) where
        trials have an accuracy. A gate that a study lacks has empty cells.
    """
    gates = list(dict.fromkeys(gate for study in studies.values() for gate in pools(study)))
    table = pd.DataFrame({"search space": [describe(search_space(dataset, gate)) for gate in gates]}, index=gates)
    for label, study in studies.items():
        before, accuracy = f"{label}: " if len(studies) > 1 else "", best_accuracy(study)
        columns: dict[str, dict[str, str]] = {}
        for gate, pool in pools(study).items():
            diverged = int(np.isinf(pool.valid).sum())
            cells = {
                "trials": f"{len(pool.test)}" + (f" ({diverged} diverged)" if diverged else ""),
                "best 5 %": _readable(top_share(pool)),
                "after 1 trial": f"{expected_best(pool, [1])[0]:.4f}",
            }
            if gate in accuracy:
                cells["accuracy, best 5 %"] = _readable(accuracy[gate])
            for name, cell in cells.items():
                columns.setdefault(before + name, {})[gate] = cell
        table = table.assign(**{name: pd.Series(cells) for name, cells in columns.items()})
    return table.fillna("").rename_axis("gate")
