"""The command for one GPU, as a dry run on the CPU: what it prints it records. No timing is tested."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_lab.bench import gpu
from moe_lab.bench.__main__ import main
from moe_lab.bench.gpu import TABLES, GatesBench, GpuBenchConfig, TablesFailed, run
from moe_lab.bench.gpu_cases import MoeBench
from moe_lab.experts import kernels
from moe_lab.results import Result

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")
OURS = MoeBench(cases=("dense", "ours", "ours, variable k"))


def test_the_moe_table_is_recorded_with_shares_versions_and_command(tmp_path, capsys):
    config = GpuBenchConfig(("moe",), "cpu", dataclasses.replace(OURS, parts=True))
    result = run(config, root=tmp_path, command="the command")
    found = Result.load(result.path)
    assert found.finished and set(found.curves) == {"moe", "stages"} and len(found.curves["stages"]) == 2 * 11
    assert [row["case"] for row in found.curves["moe"]] == ["dense", "ours", "ours, variable k"] * 2
    assert [row["k"] for row in found.curves["moe"]] == [2, 2, 2, 1, 1, 1]
    assert found.metrics["command"] == "the command"
    assert found.metrics["of_dense/T 24, D 8, H 16, E 4, K 2/ours"] == found.curves["moe"][1]["of_dense"]
    assert found.metrics["of_fixed/T 24, D 8, H 16, E 4, K 1/ours, variable k"] == found.curves["moe"][5]["of_fixed"]
    assert {"torch", "triton", "cuda", "scattermoe", "device"} <= set(found.environment)
    assert found.config["chip"] == found.environment["device"]
    printed = capsys.readouterr().out
    assert "dry run" in printed and "the command" in printed and "of_fixed" in printed and torch.__version__ in printed


def test_trials_side_by_side_are_counted(tmp_path):
    result = run(GpuBenchConfig(("trials",), "cpu"), root=tmp_path)
    assert [row["gate"] for row in result.curves["trials"]] == ["hash", "comet"]
    assert result.metrics["trials_times/hash"] == result.curves["trials"][0]["times"]
    result = run(GpuBenchConfig(("trials",), "cpu", trial_gates=("topk",)), root=tmp_path)
    assert [(row["gate"], row["epochs"]) for row in result.curves["trials"]] == [("topk", 1)]


def test_gates_and_exits_run_dry_and_say_what_they_reached(tmp_path):
    config = GpuBenchConfig(("gates", "exits"), "cpu", gates=GatesBench(tune=True, parts=True))
    result = run(config, root=tmp_path)
    assert set(result.curves) == {"gates", "exits"}  # without Triton there is nothing to tune, and there are no parts
    rows = {(row["case"], row["sharpness"]): row for row in result.curves["gates"]}
    for sharpness in (1, 100):
        assert "Triton cannot run" in rows["COMET, kernels", sharpness]["failed"]
        name = f"of_topk/T 24, D 8, E 4, K 2, sharpness {sharpness}/COMET"
        assert result.metrics[name] == rows["COMET", sharpness]["of_topk"] > 0
    assert not any("failed" in row for row in result.curves["exits"])
    assert result.metrics["reached/batch 8/plain"] > 0


def test_a_table_that_fails_or_cannot_be_imported_costs_only_itself(tmp_path, monkeypatch, capsys):
    def broken(config, device):
        yield "trials", [{"gate": "hash", "times": 1.0}]
        raise ZeroDivisionError("in the middle")

    monkeypatch.setitem(TABLES, "trials", ("broken", broken))
    monkeypatch.setattr(gpu, "exits_tables", None)
    with pytest.raises(TablesFailed, match=r"exits.*TypeError.*trials.*in the middle"):
        run(GpuBenchConfig(("trials", "exits", "moe"), "cpu", OURS), root=tmp_path)
    (path,) = (tmp_path / "bench_gpu").glob("*.json")
    result = Result.load(path)
    assert result.status == "failed" and set(result.curves) == {"moe", "trials"} and len(result.curves["moe"]) == 6
    assert "Traceback" in capsys.readouterr().err


def test_every_gpu_has_a_result_of_its_own_and_the_same_one_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TABLES", {"moe": ("nothing", lambda config, device: iter(()))})
    config = GpuBenchConfig(("moe",), "cpu")
    first, again = run(config, root=tmp_path), run(config, root=tmp_path)
    monkeypatch.setattr(gpu, "device_name", lambda device: "another")
    assert first.path == again.path != run(config, root=tmp_path).path


def test_the_command_line_reaches_the_config(monkeypatch):
    seen = {}
    monkeypatch.setattr(gpu, "run", lambda config, command: seen.update(config=config, command=command))
    main(["gpu", "--device", "cpu", "--tables", "moe", "exits", "--tune", "--no-compile", "--rounds", "2"])
    config = seen["config"]
    assert config.tables == ("moe", "exits") and config.dry
    assert (config.moe.tune, config.moe.parts, config.moe.compiled, config.moe.rounds) == (True, False, False, 2)
    assert (config.exits.compiled, config.exits.rounds, config.exits.steps) == (False, 2, 3)
    assert seen["command"].startswith("python -m moe_lab.bench gpu --device cpu --tables moe")
    assert (config.side_by_side, config.trial_gates, config.trial_epochs, config.alone) == (200, (), 8, 2)
    assert config.exits.batches == (1, 64, 512, 4096)
    trials = "--tables trials --side-by-side 7 --trial-gates topk --trial-epochs 3 --alone 1 --batches 8 16"
    main(["gpu", "--device", "cpu", *trials.split()])
    config = seen["config"]
    assert (config.side_by_side, config.trial_gates, config.trial_epochs, config.alone) == (7, ("topk",), 3, 1)
    assert config.exits.batches == (8, 16)

    def failing(config, command):
        raise TablesFailed("these tables failed")

    monkeypatch.setattr(gpu, "run", failing)
    with pytest.raises(SystemExit, match="these tables failed"):
        main(["gpu", "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        main(["gpu"])
    message = capsys.readouterr().err
    assert "0 CUDA devices" in message and "moe_lab.bench cpu" in message and "--device cpu" in message


def test_bad_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="did you mean 'moe'"):
        GpuBenchConfig(("mo",), "cpu")
    for arguments, message in (
        (["--tables", "mo"], "did you mean 'moe'"),
        (["--scattermoe", str(tmp_path)], "clone of shawntan/scattermoe"),
        (["--rounds", "1", "--steps", "1"], "two timed steps"),
    ):
        with pytest.raises(SystemExit):
            main(["gpu", "--device", "cpu", *arguments])
        assert message in capsys.readouterr().err
