"""Tables of COMET-BERT's Results: means, spreads and pairs of several teachers, costs beside the teacher's."""

import numpy as np
import pytest

from moe_lab.experiments.comet_bert_config import AUTHORS_SCRIPT, CLAIMED_GATES, PAPER_GATES
from moe_lab.experiments.comet_bert_tables import (
    SCRIPT,
    busiest_share,
    cost_table,
    gate_groups,
    pair_table,
    pairs,
    recorded_as_script,
    recorded_runs,
    relative_costs,
    routing_table,
    score_table,
    sentence_shares,
)
from moe_lab.experiments.compare import student_interval
from moe_lab.results import Result


def made_up(gate, seed=0, teacher=0, score=0.9, *, time=4.0, timed=True):
    """A finished Result of nothing: half of the teacher's FLOPs, a teacher of 2 ms."""
    metrics = {"test_score": score, "teacher_agreement": 0.95, "experts_per_token": 1.0, "decided_by_word": 0.8}
    metrics |= {"flops_per_token": 1.0, "teacher_flops_per_token": 2.0}
    metrics |= {"active_parameters": 3.0, "teacher_active_parameters": 4.0}
    for size in (1, 64) if timed else ():
        metrics |= {f"latency_ms_{size}": time, f"teacher_latency_ms_{size}": 2.0, f"speedup_{size}": 2.0 / time}
    words = [
        {"layer": layer, "expert": e, "share": s} for layer in (0, 1) for e, s in enumerate((0.25, 0.75 + layer / 5))
    ]
    config = {"gate": gate, "seed": seed, "teacher_seed": teacher}
    return Result("comet_bert", config, None, seed=seed, status="finished", metrics=metrics, curves={"words": words})


@pytest.fixture
def runs():
    """Two teachers, two seeds; comet is ahead of hash by 1 and 3 points with teacher 0, behind by 2 with teacher 1."""
    base = {(t, s): 0.9 + 0.01 * s + 0.02 * t for t in (0, 1) for s in (0, 1)}
    gains = {(0, 0): 0.01, (0, 1): 0.03, (1, 0): -0.02, (1, 1): -0.02}
    found = [made_up("teacher", 0, t, 0.9) for t in (0, 1)]
    found += [made_up("hash", s, t, score) for (t, s), score in base.items()]
    return found + [made_up("comet", s, t, base[t, s] + gain, time=8.0) for (t, s), gain in gains.items()]


def test_pairs_are_differences_by_teacher_and_seed(runs):
    table = pairs(runs, "comet", "hash")
    assert table.to_numpy() == pytest.approx(np.array([[0.01, 0.03], [-0.02, -0.02]]))
    assert list(table.index) == [0, 1] and list(table.columns) == [0, 1]
    assert np.isnan(pairs(runs[:-1], "comet", "hash").loc[1, 1])
    with pytest.raises(ValueError, match="several Results per seed and teacher"):
        pairs([*runs, runs[-1]], "comet", "hash")


def test_the_table_of_pairs_has_a_spread_over_seeds_and_one_over_teachers(runs):
    table = pair_table(runs, [("comet", "hash")])
    assert table.index.tolist() == [("comet − hash", name) for name in ("teacher 0", "teacher 1", "all")]
    assert table["seed 1"].tolist() == ["+3.00", "-2.00", ""]
    assert table["mean ± sd"].tolist() == ["+2.00 ± 1.41", "-2.00 ± 0.00", "+0.00 ± 2.83"]
    assert table["95 %"].tolist() == ["", "", "[-25.41, +25.41]"]  # two values: ± 12.7 standard errors
    alone = [run for run in runs if run.config["teacher_seed"] == 0]
    assert len(pair_table(alone, [("comet", "hash")])) == 1


def test_the_interval_of_student():
    assert student_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    with pytest.raises(ValueError, match="one value has no spread"):
        student_interval([1.0])


def test_scores_have_a_column_per_teacher_and_one_for_all(runs):
    table = score_table(gate_groups([*runs, made_up("topk", 0, 1, 0.8)], [made_up("comet", 0, 0, 0.7)]))
    assert table.index.tolist() == ["teacher", "hash", "comet", "topk", SCRIPT]
    assert table.loc["hash"].tolist() == ["0.905 ± 0.007", "0.925 ± 0.007", "0.915 ± 0.014"]
    assert table.loc["topk"].tolist() == ["", "0.800", ""] and table.loc[SCRIPT, "teacher 0"] == "0.700"
    assert list(score_table(gate_groups(runs[2:4])).columns) == ["teacher 0"]


def test_routing_is_shown_beside_the_busiest_expert(runs):
    assert busiest_share(runs[-1]) == pytest.approx((0.75 + 0.95) / 2)
    assert busiest_share(Result("comet_bert", {"gate": "teacher"}, None, seed=0)) == 1.0
    row = routing_table(gate_groups(runs)).loc["comet"]
    assert row.tolist() == ["0.950 ± 0.000", "1.000 ± 0.000", "0.850 ± 0.000", "0.800 ± 0.000", "4"]


def test_sentences_that_stay_together():
    sentences = [{"expert": [[0, 0, 1], [0, 0, 0]]}, {"expert": [[0], [1]]}]
    run = Result("comet_bert", {}, None, seed=0, curves={"sentences": sentences})
    assert sentence_shares(run).to_dict("list") == {"sentence": [0.75, 1.0], "anything": [0.75, 0.75]}


def test_costs_are_medians_with_their_range_beside_the_teacher(runs):
    runs[-1].metrics |= {"latency_ms_1": 16.0, "speedup_1": 0.125}
    table = cost_table(gate_groups(runs))
    assert table.loc["comet", "ms, batch 1"] == "8.0 [8.0 to 16.0]"
    assert table.loc["comet", "speed, batch 1"] == "0.25 [0.12 to 0.25]"
    assert table.loc["hash", "speed, batch 64"] == "0.50 [0.50 to 0.50]"
    assert table.loc["teacher", ["ms, batch 1", "speed, batch 1"]].tolist() == ["2.0 [2.0 to 2.0]", "1"]
    assert table["FLOPs"].tolist() == ["50 %"] * 3 and table["active parameters"].tolist() == ["75 %"] * 3
    relative = relative_costs(gate_groups(runs))["comet"]
    assert relative["FLOPs"].tolist() == [0.5] * 4 and relative["time, batch 1"].tolist() == [4.0, 4.0, 4.0, 8.0]


def test_costs_without_a_clock_are_counted():
    groups = gate_groups([made_up("hash", timed=False), made_up("hash", 1)])
    assert list(cost_table(groups).columns) == ["FLOPs", "active parameters"]
    assert relative_costs({"hash": groups["hash"][:1]})["hash"].to_dict("list") == {"FLOPs": [0.5]}


def test_what_is_recorded_is_complete_and_timed_afterwards(tmp_path):
    runs, as_script = recorded_runs(), recorded_as_script()
    found = [(r.config["gate"], r.config["teacher_seed"], r.seed) for r in runs]
    seeds = {gate: range(1 if gate == "teacher" else 3) for gate in PAPER_GATES}
    asked = {(gate, 0, s) for gate in PAPER_GATES for s in seeds[gate]}
    asked |= {(gate, t, s) for t in (1, 2) for gate in CLAIMED_GATES for s in seeds[gate]}
    assert len(found) == len(asked) and set(found) == asked
    assert {tuple(r.config[name] for name in AUTHORS_SCRIPT) for r in as_script} == {tuple(AUTHORS_SCRIPT.values())}
    assert [r.seed for r in as_script] == [0, 1, 2]
    assert all(r.metrics["timed_alone"] and r.metrics["latency_ms_64"] > 0 for r in [*runs, *as_script])
    assert recorded_runs(tmp_path / "none") == []
