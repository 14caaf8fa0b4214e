"""The benchmark of early exits on one GPU says what it measured: tested is what is planted and counted, no timing."""

from __future__ import annotations

import json

import pytest
import torch

from moe_lab.bench import gpu_exits, gpu_exits_cases
from moe_lab.bench.gpu_exits import ExitsBench, exits_tables, main
from moe_lab.bench.gpu_exits_cases import DeviceLost, cases, compare, measure, tune
from moe_lab.bench.gpu_exits_planted import TINY, PlantedNetwork
from moe_lab.exits import Prediction


@pytest.fixture(scope="module")
def tiny():
    return PlantedNetwork(TINY, 2.05, "cpu", torch.float32)


def test_every_case_answers_alike(tiny):
    images, _ = tiny.images(12, seed=1)
    masked, full = tiny.network.predict_masked(images), tiny.full(images).softmax(-1)
    found = cases(tiny, images, images, compiled=False)
    assert set(found) >= {"full, eager", "masked", "plain", "fast, eager"}
    for name, prepare in found.items():
        row = compare(prepare()(images), full if name.startswith("full") else masked)
        assert row["difference"] < 1e-5 and row["other_labels"] == row.get("other_exits", 0) == 0, name


def test_other_answers_are_not_timed(tiny, monkeypatch):
    right = torch.full((4, 2), 0.5)
    with pytest.raises(ValueError, match="other answers"):
        compare(right + torch.tensor([0.1, -0.1]), right)
    exits = torch.zeros(4, dtype=torch.int64)
    one, other = (Prediction(right, some, None, (4, 4)) for some in (exits, exits + 1))
    with pytest.raises(ValueError, match="other answers"):
        compare(one, other)
    with pytest.raises(ValueError, match="other answers"):
        compare(right * torch.nan, right)

    def broken(*_, **__):
        return {"full, eager": lambda: lambda x: tiny.full(x).softmax(-1), "plain": lambda: lambda x: 1 / 0}

    monkeypatch.setattr(gpu_exits_cases, "cases", broken)
    good, bad = measure(tiny, 4, rounds=2, n_steps=1)
    assert good["ms"] > 0 and good["speed_up"] == 1 and good["reached"] is None
    assert "division by zero" in bad["failed"] and "ms" not in bad


def test_speed_is_over_the_fastest_full_network_and_over_the_images_own_ratio(tiny):
    rows = {row["case"]: row for row in measure(tiny, 8, rounds=1, n_steps=2, compiled=False)}
    best = min(row["ms"] for name, row in rows.items() if name.startswith("full"))
    row = rows["fast, eager"]
    _, exits = tiny.images(8 * 8, seed=2)
    assert row["ratio"] == pytest.approx(1 / float(tiny.network.costs[exits].mean()))
    assert row["speed_up"] == pytest.approx(best / row["ms"])
    assert row["reached"] == pytest.approx(best / row["ms"] / row["ratio"])
    eager = rows["full, eager"]["ms"]
    assert all(row["over_eager"] == pytest.approx(eager / row["ms"]) for row in rows.values())
    assert row["other_exits"] == 0 and row["again"] >= 0 and row["plan"]["rows"][0] == 8


def test_thresholds_that_plan_the_same_rows_are_timed_once(tiny):
    names = [row["case"] for row in tune(tiny, 8, rounds=1, n_steps=2, compiled=False)]
    fast = [name for name in names if name.startswith("fast")]
    assert "full, eager" in names and "plain, 0.02" in names and "plain, 1.0" in names
    assert 2 <= len(fast) < len([name for name in names if name.startswith("plain")])


def test_the_command_prints_tables_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    frame = ["--rounds", "1", "--steps", "2", "--no-compile", "--device", "cpu", "--json", str(path)]
    report = main(["--batches", "3", "--layers", "3", "--cases", "full, eager", "plain", "--dtype", "float32", *frame])
    printed = capsys.readouterr().out
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert [(table["table"], len(table["rows"])) for table in report["tables"]] == [("exits", 2)]
    assert [row["case"] for row in report["tables"][0]["rows"]] == ["full, eager", "plain"]
    assert report["environment"]["size"]["layers"] == 3 and report["command"] in printed and "over_eager" in printed


def test_thresholds_are_a_table_of_their_own_and_the_tables_come_batch_by_batch(monkeypatch):
    for name in ("measure", "tune"):
        monkeypatch.setattr(gpu_exits, name, lambda planted, batch, name=name, **_: [{"case": name, "batch": batch}])
    config = ExitsBench(size=TINY, batches=(2, 3), compiled=False, tune=True)
    found = [(table, rows[0]["case"], rows[0]["batch"]) for table, rows in exits_tables(config, "cpu")]
    assert found == [(*pair, batch) for batch in (2, 3) for pair in (("exits", "measure"), ("exits_tuned", "tune"))]


def test_a_case_that_fails_while_it_is_timed_costs_only_itself(tiny):
    calls = []

    def tired(x):
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("tired")
        return tiny.network.predict(x)

    prepared = {"full, eager": lambda: lambda x: tiny.full(x).softmax(-1), "plain": lambda: tired}
    good, bad = measure(tiny, 4, rounds=2, n_steps=1, prepared=prepared)
    assert good["ms"] > 0 and "tired" in bad["failed"] and "ms" not in bad and bad["speed_up"] is None


def test_a_lost_device_ends_the_command_after_what_was_measured_is_written(tmp_path, monkeypatch, capsys):
    def lost(planted, batch, **_):
        if batch == 2:
            raise DeviceLost([{"case": "plain", "failed": "assertion"}], "assertion")
        return [{"case": "plain", "ms": 1.0}]

    monkeypatch.setattr(gpu_exits, "measure", lost)
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as end:
        main(["--device", "cpu", "--no-compile", "--batches", "1", "2", "3", "--json", str(path)])
    report = json.loads(path.read_text())
    message = capsys.readouterr().err
    assert end.value.code == 1 and "device is lost" in message and "assertion" in message
    assert [table["rows"][0].get("ms") for table in report["tables"]] == [1.0, None]
    assert report["tables"][1]["rows"][0]["failed"] == "assertion"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "50"], "no distribution"),
        (["--width", "8"], "width 16"),
        (["--batches", "0"], "at least 1"),
        (["--rounds", "1", "--steps", "1"], "two timed steps"),
        (["--cases", "plan"], "did you mean 'plain'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--no-compile", *arguments])
    assert message in capsys.readouterr().err
