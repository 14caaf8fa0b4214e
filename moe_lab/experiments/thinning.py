"""Results small enough for the repository."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.results import Result


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
