"""The command that records long runs: studies of many trials."""

from __future__ import annotations

import pytest

from moe_lab.experiments import record
from moe_lab.experiments.recordings import RECORDINGS
from moe_lab.results import Result, find_results


def options(*more):
    return record._parser().parse_args(["--what", "tuning", *more])


@pytest.mark.parametrize("what", ["tuning", "vision-tuning", "unlearned"])
def test_a_study_is_the_profiles_unless_the_options_say_otherwise(what):
    configs = RECORDINGS[what].configs
    (usual,) = configs(options("--profile", "standard"))
    assert usual == type(usual).profile("standard")
    (asked,) = configs(options("--trials", "7", "--gates", "hash", "--device", "cuda", "--epochs", "3", "--seeds", "5"))
    assert (asked.n_trials, list(asked.gates), asked.seed) == (7, ["hash"], 5)
    assert asked.changes == {**usual.changes, "device": "cuda", "epochs": 3}


@pytest.mark.parametrize("what", ["tuning", "vision-tuning"])
def test_a_study_in_stacks_is_recorded_without_its_plan_and_found_again(what, tmp_path, capsys, monkeypatch):
    runs, out = tmp_path / "runs", tmp_path / "out"
    command = ["--what", what, "--profile", "quick", "--scratch", str(runs), "--out", str(out), "--epochs", "1"]
    command += ["--gates", "hash", "topk+", "--trials", "2", "--stack-size", "2", "--checkpoint-epochs", "9"]
    record.main([*command, "--plan-only"])
    assert "planned: " in capsys.readouterr().out
    assert not out.exists()
    record.main(command)
    (copy,) = find_results(root=out)
    assert copy.metrics["trials"] == 4
    assert set(copy.curves) == {"trials"}
    assert copy.environment["trials_side_by_side"] == 2
    (whole,) = find_results(copy.experiment, root=runs)
    assert len(whole.curves["plan"]) == 4
    assert len(find_results(root=runs)) == 5  # the study and its trials
    monkeypatch.setattr(Result, "finish", lambda *a: pytest.fail("computed again"))
    record.main(command)
