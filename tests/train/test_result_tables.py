"""Saved Results are found over several folders and make one table."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from moe_lab.results import Result, find_results, to_frame


@dataclass(frozen=True)
class Config:
    gate: str = "comet"
    seed: int = 0
    sizes: tuple[int, ...] = (256, 256)
    inner: dict = field(default_factory=lambda: {"a": 1})


@pytest.fixture
def two_roots(tmp_path):
    runs, recorded = tmp_path / "runs", tmp_path / "recorded"
    for seed in (0, 1):
        Result.open("study", Config(seed=seed), root=runs).finish({"loss": float(seed), "gate": "metric"})
    Result.open("study", Config(seed=1), root=recorded).finish({"loss": 7.0})
    Result.open("study", Config(seed=2, gate="topk"), root=recorded).finish({"loss": 2.0, "per": {"watch": 0.5}})
    Result.open("other", {"seed": 0}, root=recorded).finish({})
    Result.open("study", Config(seed=3), root=runs).save()
    return [runs, recorded]


def test_results_are_found_over_several_roots_the_first_one_winning(two_roots):
    assert [r.metrics["loss"] for r in find_results("study", two_roots)] == [0.0, 1.0, 2.0]
    assert [r.metrics["loss"] for r in find_results("study", reversed(two_roots))] == [0.0, 7.0, 2.0]
    assert [r.seed for r in find_results("study", two_roots, gate="comet", sizes=(256, 256))] == [0, 1]
    assert len(find_results("study", two_roots, finished_only=False)) == 4 and len(find_results(root=two_roots)) == 4
    assert find_results("nothing", two_roots, gate="comet") == [] == find_results(root=two_roots[0] / "absent")
    with pytest.raises(ValueError, match="no config has a field 'gates'; did you mean 'gate'"):
        find_results("study", two_roots, gates="comet")


def test_the_table_has_config_metrics_and_circumstances_and_no_name_twice(two_roots):
    table = to_frame(find_results("study", two_roots))
    assert list(table["seed"]) == [0, 1, 2] and list(table["loss"]) == [0.0, 1.0, 2.0]
    assert list(table["gate"]) == ["comet", "comet", "topk"] and table["metrics.gate"][0] == "metric"
    assert table["per.watch"][2] == 0.5 and table["inner.a"][0] == 1
    assert table["device"].notna().all() and table.columns.is_unique
    assert to_frame([]).empty
