"""What was asked of the fast paths is judged by curves, wherever they lie; what is missing is said."""

import dataclasses

from moe_lab.bench.gpu_gates_problem import SHAPES as GATE_SHAPES
from moe_lab.bench.gpu_problem import SHAPES
from moe_lab.experiments import speed_claims as claims
from moe_lab.results import Result


def moe_row(shape, case, of_dense=None, of_scattermoe=None, of_fixed=None, **more):
    row = {"case": case, **dataclasses.asdict(shape), "ms": 1.0, "tflops": 500.0, "peak_mib": 100.0}
    return row | {"of_dense": of_dense, "of_scattermoe": of_scattermoe, "of_fixed": of_fixed} | more


def gate_row(shape, case, of_topk, ms=1.0, sharpness=1.0):
    return {"case": case, **dataclasses.asdict(shape), "sharpness": sharpness, "ms": ms, "of_topk": of_topk}


def save(root, curves, *, card="Card A", started="2026-01-01T00:00:00+00:00", **config):
    result = Result.open("bench_gpu", {"moe": {"dtype": "bfloat16"}, "chip": card, **config}, root)
    result.environment |= {"device": card, "torch": "2.11.0+cu1"}
    result.started = started
    for name, rows in curves.items():
        for row in rows:
            result.log(name, **row)
    return result.finish({})


def judged(**curves):
    root = curves.pop("root")
    save(root, curves)
    table = claims.speed_claims({name: claims.recorded_curve(name, root) for name in claims.CLAIMS})
    return {row.asked: row for row in table.rename(columns={"does it hold?": "holds"}).itertuples()}, table


def test_the_newest_result_with_the_curve_counts(tmp_path):
    row = moe_row(SHAPES[0], "ours", 0.5)
    save(tmp_path, {"moe": [row]}, card="Old")
    save(tmp_path, {"moe": [row | {"of_dense": 0.9}]}, card="New", started="2026-02-01T00:00:00+00:00")
    save(
        tmp_path, {"gates": [gate_row(GATE_SHAPES[0], "top-k", 1.0)]}, card="Other", started="2026-03-01T00:00:00+00:00"
    )
    found = claims.recorded_curve("moe", tmp_path)
    assert found.card == "New" and found.rows[0]["of_dense"] == 0.9 and found.about == "New, PyTorch 2.11.0, bfloat16"
    assert found.size == 2 and claims.recorded_curve("exits", tmp_path) is None


def test_a_layer_below_what_was_asked_does_not_hold_and_its_best_form_is_named(tmp_path):
    rows = [
        moe_row(SHAPES[0], "ours", 0.85, 1.5),
        moe_row(SHAPES[0], "ours, compiled", 0.93, 1.6),
        moe_row(SHAPES[0], "ours, variable k", 0.99, 1.6, 0.97),
        moe_row(SHAPES[1], "ours", 0.86, 1.2),
        moe_row(SHAPES[1], "ours, CUDA graph", 0.86, 1.2),
    ]
    _, table = judged(root=tmp_path, moe=rows)
    assert table["does it hold?"].tolist()[:6] == ["no", "yes", "yes", "no", "yes", "no"]
    assert table.measured[0] == "0.85; at best 0.93 (ours, compiled)"
    assert table.asked[0].endswith("0.90 of a dense layer") and table.asked[2].endswith("0.85 of a dense layer")
    assert table.measured[4] == "0.97 to 0.97 (ours, variable k)" and table.measured[5] == "1 of 2 sizes"
    assert all("Card A" in text for text in table["on what"][:6])


def test_gates_are_judged_eagerly_and_as_graphs_and_only_at_the_start_of_training(tmp_path):
    rows = [
        gate_row(GATE_SHAPES[0], "top-k", 1.0),
        gate_row(GATE_SHAPES[0], "COMET, kernels", 0.7),
        gate_row(GATE_SHAPES[0], "COMET, kernels", 9.0, sharpness=100.0),
        gate_row(GATE_SHAPES[0], "top-k, graph", 0.4, ms=0.4),
        gate_row(GATE_SHAPES[0], "top-k, x's dtype, graph", 0.2, ms=0.2),
        gate_row(GATE_SHAPES[0], "COMET, kernels, graph", 0.3, ms=0.3),
        gate_row(GATE_SHAPES[1], "top-k", 1.0),
        gate_row(GATE_SHAPES[1], "COMET, kernels", 1.6),
    ]
    by, _ = judged(root=tmp_path, gates=rows)
    first = by["COMET's gate: at most 1.0 of the time of top-k"]
    assert first.holds == "yes" and first.measured == "0.70; as graphs 0.75, over top-k in x's dtype 1.50"
    assert by["COMET's gate: at most 1.5 of the time of top-k"].holds == "no"


def test_exits_and_trials_are_judged_when_they_are_there(tmp_path):
    exits = [
        {"case": "fast, graph", "batch": 4096, "reached": 0.95, "speed_up": 1.9},
        {"case": "plain", "batch": 4096, "reached": 0.85, "speed_up": 1.7},
        {"case": "fast, graph", "batch": 64, "reached": 0.45, "speed_up": 0.9},
    ]
    by, _ = judged(
        root=tmp_path, exits=exits, trials=[{"gate": "comet", "times": 25.0}, {"gate": "topk", "times": 19.0}]
    )
    reached = by["early exits: at least 0.90 of the saved multiply-adds"]
    assert reached.holds == "yes" and reached.measured == "0.95 (fast, graph); plain compaction 0.85"
    assert by["early exits: not slower than the full network"].holds == "no"
    assert by["many trials at once: at least 20 times the trials per hour"].holds == "no"
    assert by["(curve 'moe')"].holds == "open"


def test_a_case_that_failed_is_no_measurement(tmp_path):
    failed = {"case": "ours", **dataclasses.asdict(SHAPES[0]), "failed": "no memory", "of_dense": None}
    by, _ = judged(root=tmp_path, moe=[failed])
    assert by["(curve 'moe')"].measured == "nothing recorded"


def test_what_rounding_would_lift_to_the_bar_is_shown_with_more_digits(tmp_path):
    exits = [
        {"case": "fast, graph", "batch": 4096, "reached": 0.8999, "speed_up": 1.8},
        {"case": "fast, graph", "batch": 64, "reached": 0.4, "speed_up": 0.9, "over_eager": 5.84},
        *({"case": case, "batch": 64, "speed_up": 1.0} for case in ("full, eager", "full, graph")),
    ]
    rows = [moe_row(SHAPES[0], "ours", 0.901), moe_row(SHAPES[0], "ours, CUDA graph", 0.904)]
    by, _ = judged(root=tmp_path, exits=exits, moe=rows)
    reached = by["early exits: at least 0.90 of the saved multiply-adds"]
    assert reached.holds == "no" and reached.measured == "0.8999 (fast, graph)"
    few = by["early exits: not slower than the full network"]
    assert few.holds == "no"
    assert few.measured == (
        "0.90 (fast, graph), against the fastest of 2 full networks; 5.8 times the full network run eagerly"
    )
    layer = by["MoE layer: at least 0.90 of a dense layer"]  # the best form reads the same: it is not repeated
    assert layer.holds == "yes" and layer.measured == "0.90"


def test_what_is_recorded_can_be_judged():
    table = claims.speed_claims({name: claims.recorded_curve(name) for name in claims.CLAIMS})
    assert list(table.columns) == list(claims.COLUMNS) and set(table["does it hold?"]) <= {"yes", "no", "open"}
