"""The command that measures the MoE layer: what it prints is what it writes."""

from __future__ import annotations

import json

import pytest
import torch

from moe_lab.bench.gpu_cases import MoeBench, main, moe_tables
from moe_lab.bench.gpu_problem import Shape
from moe_lab.experts import kernels

TINY = Shape(tokens=24, width=8, hidden=16, experts=4, k=2)
SIZES = ["--tokens", "24", "--width", "8", "--hidden", "16", "--experts", "4", "--k", "2"]
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")


def test_the_command_prints_tables_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    frame = ["--device", "cpu", "--no-compile", "--rounds", "1", "--steps", "2"]
    main([*SIZES, *frame, "--parts", "--cases", "dense", "ours", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["environment"]["torch"] == torch.__version__ and "gpu_cases --tokens 24" in report["command"]
    assert "scattermoe" in report["environment"]
    moe, stages = report["tables"]
    assert (moe["table"], stages["table"]) == ("moe", "stages")
    assert [row["case"] for row in moe["rows"]] == ["dense", "ours"] and len(stages["rows"]) == 11
    printed = capsys.readouterr().out
    assert "of_dense" in printed and "dW1 = X^T dZ" in printed


def test_tables_come_one_by_one_and_an_unknown_case_is_noticed_before_anything_is_tuned(monkeypatch):
    config = MoeBench((TINY, TINY), ("ours",), compiled=False, tune=True, parts=True, rounds=1, steps=2)
    found = list(moe_tables(config, torch.device("cpu")))
    assert [name for name, _ in found] == ["tuned", "moe", "stages"] * 2
    assert found[0][1] == []  # without Triton there is nothing to tune
    monkeypatch.setattr("moe_lab.bench.gpu_cases.tune", None)  # would raise if it were called
    with pytest.raises(ValueError, match="did you mean 'ours'"):
        next(moe_tables(MoeBench((TINY,), ("our",), tune=True), torch.device("cpu")))


def test_bad_arguments_are_refused(tmp_path, capsys):
    for arguments, message in (
        (["--tokens", "8"], "give all of --tokens --width --hidden --experts --k"),
        (["--rounds", "1", "--steps", "1"], "two timed steps"),
        (["--scattermoe", str(tmp_path)], "clone of shawntan/scattermoe"),
    ):
        with pytest.raises(SystemExit):
            main(["--device", "cpu", *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        MoeBench(activation="gelo")
