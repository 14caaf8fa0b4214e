"""The command that records long runs: studies of many trials."""

from __future__ import annotations

import pytest

from moe_lab.experiments import record
from moe_lab.experiments.comet_tuning import take_over
from moe_lab.experiments.recordings import RECORDINGS
from moe_lab.results import Result, find_results


def options(*more):
    return record._parser().parse_args(["--what", "tuning", *more])


@pytest.mark.parametrize("what", ["tuning", "vision-tuning", "unlearned", "unlearned-vision"])
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


def test_a_longer_study_begins_with_the_trials_of_a_recorded_one(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    command = ["--what", "tuning", "--profile", "quick", "--out", str(out), "--epochs", "1", "--gates", "hash", "topk"]
    with pytest.raises(SystemExit, match="holds no shorter study"):
        record.main([*command, "--scratch", str(runs), "--trials", "3", "--extend"])
    record.main([*command, "--scratch", str(runs), "--trials", "2"])
    elsewhere = tmp_path / "another machine"
    record.main([*command, "--scratch", str(elsewhere), "--trials", "3", "--extend"])
    assert "4 trials taken over" in capsys.readouterr().out
    short, long = sorted(find_results(root=out), key=lambda result: result.config["n_trials"])
    assert len(find_results("comet_recommender", root=elsewhere)) == 2  # only the others were run
    assert [row for row in long.curves["trials"] if row["trial"] < 2] == short.curves["trials"]
    assert len(long.curves["trials"]) == long.metrics["trials"] == 6
    (about,) = long.curves["taken_over"]
    assert about["trials"] == 4 and about["device"] == short.environment["device"]
    record.main([*command, "--scratch", str(runs), "--trials", "3"])  # run as a whole, it is the same study
    (whole,) = [r for r in find_results(root=out) if r.config["n_trials"] == 3]
    same = [{k: v for k, v in row.items() if k != "seconds"} for row in whole.curves["trials"]]
    assert same == [{k: v for k, v in row.items() if k != "seconds"} for row in long.curves["trials"]]
    with pytest.raises(SystemExit, match="no study"):
        record.main(["--what", "vision", "--out", str(out), "--extend"])


def test_only_a_shorter_study_with_the_same_points_is_taken_over(tmp_path):
    def study(n_trials, shift=0.0, **changes):
        config = {"gates": ["hash"], "n_trials": n_trials, "seed": 0, **changes}
        result = Result("comet_tuning", config, tmp_path / f"{n_trials}.json")
        for index in range(n_trials):
            row = {"gate": "hash", "trial": index, "drawn": {"learning_rate": index + shift}}
            result.log("plan", **row)
            result.log("trials", **row, valid_loss=1.0)
        return result

    long = study(3)
    del long.curves["trials"]
    for other in (study(3), study(4), study(2, seed=1)):
        with pytest.raises(ValueError, match="no shorter study of the same kind"):
            take_over(long, other)
    with pytest.raises(ValueError, match=r"2 points .* Optuna"):
        take_over(long, study(2, shift=0.5))
    assert "trials" not in long.curves
    assert [take_over(long, study(n)) for n in (1, 2, 2)] == [1, 1, 0]
    assert [row["trial"] for row in long.curves["trials"]] == [0, 1]


def test_a_chain_of_studies_says_of_each_where_its_trials_were_run(tmp_path):
    def study(n_trials, trials, **environment):
        config = {"gates": ["hash"], "n_trials": n_trials}
        result = Result("comet_tuning", config, tmp_path / f"{n_trials}.json", environment=environment)
        rows = [{"gate": "hash", "trial": index, "drawn": {}} for index in range(n_trials)]
        result.curves = {"plan": rows, "trials": rows[:trials]}
        return result

    one, two, three = study(2, 2, device="a"), study(5, 0, device="b"), study(9, 0, device="c")
    take_over(two, one)
    two.curves["trials"] = two.curves["plan"]  # the other three were run
    assert take_over(three, two) == 5
    assert [(row["trials"], row["device"]) for row in three.curves["taken_over"]] == [(2, "a"), (3, "b")]
