"""Scenarios x searches x seeds of `comet_search` in one Result, and the paired differences a reader should look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from moe_lab.experiments import comet_search
from moe_lab.experiments.search_config import SCENARIOS, SEARCHES, SearchConfig, check_name
from moe_lab.results import Result, run_cached

EXPERIMENT = "comet_search_study"
_KEPT = ("test_loss", "start_loss", "best_relabelling", "right_expert", "found", "permutation_agreed")


@dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    Attributes:
        run_profile: of every run: quick, standard, paper.
        scenarios: names of `SCENARIOS`.
        searches: of `SEARCHES`; "none" is what the others are compared with.
        seeds: the same for every scenario and search, so that differences are paired.
    """

    run_profile: str = "quick"
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    searches: tuple[str, ...] = SEARCHES
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in self.scenarios:
            check_name("scenario", name, tuple(SCENARIOS))
        for name in self.searches:
            check_name("search", name, SEARCHES)
        SearchConfig.profile(self.run_profile)

    @classmethod
    def profile(cls, name: str, **changes: Any) -> StudyConfig:
        """quick: three seeds; standard, paper: ten; with changes."""
        return cls(**{"run_profile": name, "seeds": tuple(range(3 if name == "quick" else 10)), **changes})

    def runs(self) -> list[tuple[str, SearchConfig]]:
        """(scenario, config) of every run."""
        return [
            (scenario, SearchConfig.profile(self.run_profile, search=search, seed=seed, **SCENARIOS[scenario]))
            for scenario in self.scenarios
            for search in self.searches
            for seed in self.seeds
        ]


def run(
    config: StudyConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """All runs (each is a Result of its own and found again), with one row each in ``curves["runs"]``.

    A row: scenario, search, seed, the main metrics, and ``valid`` (valid_loss after each epoch, four decimals).
    """

    def compute(result: Result) -> dict[str, Any]:
        done = {(row["scenario"], row["search"], row["seed"]) for row in result.curves.get("runs", [])}
        for scenario, run_config in tqdm(config.runs(), disable=not progress, leave=False):
            if (scenario, run_config.search, run_config.seed) in done:
                continue
            single = comet_search.run(run_config, root=root, recompute=recompute)
            valid = [round(row["valid_loss"], 4) for row in single.curves.get("epochs", [])]
            kept = {name: single.metrics[name] for name in _KEPT}
            result.log("runs", scenario=scenario, search=run_config.search, seed=run_config.seed, **kept, valid=valid)
            result.save()
        return {"n_runs": len(result.curves["runs"])}

    return run_cached(EXPERIMENT, config, compute, root=root, recompute=recompute)


def runs_frame(result: Result) -> pd.DataFrame:
    """One row per run."""
    return pd.DataFrame(result.curves["runs"])


def paired(result: Result, search: str = "default", against: str = "none") -> pd.DataFrame:
    """Does the search help? One row per scenario, in the study's order.

    Columns: mean test losses ``start``, ``best_relabelling`` (of the start), ``against``, ``search``; ``difference``
    (search - against, mean over seeds; negative: it helps), ``standard_error``, ``better`` (seeds in which the search
    has the smaller loss), ``seeds``, ``found`` (share of places as in the best relabelling of the start).
    """
    frame = runs_frame(result)
    rows = []
    for scenario in dict.fromkeys(frame["scenario"]):
        part = frame[frame["scenario"] == scenario]
        by_seed = part.pivot(index="seed", columns="search", values="test_loss")
        difference = by_seed[search] - by_seed[against]
        rows.append(
            {
                "scenario": scenario,
                "start": part["start_loss"].mean(),
                "best_relabelling": part["best_relabelling"].mean(),
                "against": by_seed[against].mean(),
                "search": by_seed[search].mean(),
                "difference": difference.mean(),
                "standard_error": difference.sem(),
                "better": int((difference < 0).sum()),
                "seeds": len(difference),
                "found": part.loc[part["search"] == search, "found"].mean(),
            }
        )
    return pd.DataFrame(rows).set_index("scenario")
