"""Checkpoints, damage, Ctrl-C, several fits of one Result (kill -9 is in test_killed_runs.py)."""

from __future__ import annotations

import math
import os
import signal
import struct
import zipfile

import pytest
import torch
from one_weight import Scalar, by_list, pull, train

from moe_lab.results import Result
from moe_lab.train import DamagedCheckpoint, NonFiniteLoss, trainer
from moe_lab.train.checkpoint import previous_path


def test_another_configuration_is_not_resumed_and_the_difference_is_named(tmp_path):
    train(Scalar(), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"config.epochs was 1, is 2"):
        train(Scalar(), checkpoint=tmp_path / "c", resume=True, config={"epochs": 2})
    with pytest.raises(ValueError, match=r"optimizer0.group0.lr was 0.1, is 0.2"):
        train(Scalar(), checkpoint=tmp_path / "c", resume=True, rate=0.2)
    with pytest.raises(ValueError, match=r"train\.rows was 1, is 2"):
        train(Scalar(), x=(1.0, 1.0), checkpoint=tmp_path / "c", resume=True)
    with pytest.raises(ValueError, match="needs a checkpoint file"):
        train(Scalar(), resume=True)


def test_resuming_a_finished_run_restores_it_and_computes_nothing(tmp_path):
    first, again = Scalar(), Scalar()
    done = train(first, checkpoint=tmp_path / "c", evaluate=by_list((1.0, 2.0)), config={"epochs": 2})
    history = train(again, checkpoint=tmp_path / "c", resume=True, evaluate=by_list(()), config={"epochs": 2})
    assert history == done and torch.equal(first.w, again.w)


@pytest.mark.parametrize(("seconds", "epochs_saved"), [(0.5, range(12)), (2.0, (0, 4, 8, 11))])
def test_a_checkpoint_that_takes_long_is_not_written_after_every_epoch(tmp_path, monkeypatch, seconds, epochs_saved):
    """An epoch takes 10 s of a clock that only epochs and checkpoints move; 2 s are a twentieth of 40 s."""
    clock, saved, write = [0.0], [], trainer.save_checkpoint

    def slow(path, content):
        clock[0] += seconds
        saved.append(content["position"]["epoch"])
        write(path, content)

    def evaluate(model):
        clock[0] += 10
        return {"valid_loss": 1.0}

    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer, "save_checkpoint", slow)
    whole = Scalar()
    train(whole, checkpoint=tmp_path / "c", evaluate=evaluate, config={"epochs": 11})
    assert saved == list(epochs_saved)

    killed_in = iter(range(1, 8))  # of the seventh epoch nothing is left

    def stop(model):
        if next(killed_in) == 7:
            raise RuntimeError("killed")
        return evaluate(model)

    again = Scalar()
    with pytest.raises(RuntimeError, match="killed"):
        train(again, checkpoint=tmp_path / "d", evaluate=stop, config={"epochs": 11})
    train(again, checkpoint=tmp_path / "d", resume=True, evaluate=evaluate, config={"epochs": 11})
    assert torch.equal(again.w, whole.w)


def test_without_resume_an_old_checkpoint_is_forgotten(tmp_path):
    train(Scalar(), checkpoint=tmp_path / "c")
    model = Scalar()
    train(model, checkpoint=tmp_path / "c")
    assert model.w.item() == pytest.approx(-0.1)


WEIGHT_AT_THE_END = -0.5  # after five steps of 0.1


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):  # one bit of the weight: torch.load would read another number without a word
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        weight = next(data for name in names if (data := archive.read(name)) == struct.pack("f", WEIGHT_AT_THE_END))
    assert content.count(weight) >= 1
    path.write_bytes(content.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))


@pytest.mark.parametrize("damage", [half, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_falls_back_on_the_previous_one(tmp_path, damage):
    path, expected, model = tmp_path / "c", Scalar(), Scalar()
    train(expected, x=(1.0,) * 5, checkpoint=path, config={"checkpoint_every": 2})
    damage(path)
    with pytest.warns(UserWarning, match="damaged.*going on from c.previous"):
        history = train(model, x=(1.0,) * 5, checkpoint=path, resume=True, config={"checkpoint_every": 2})
    assert history.steps == 5 and torch.equal(model.w, expected.w)


def test_two_damaged_checkpoints_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "c"
    train(Scalar(), checkpoint=path)
    half(path), half(previous_path(path))
    with pytest.raises(DamagedCheckpoint, match=r"cannot read .*/c .*Delete it, or start anew"):
        train(Scalar(), checkpoint=path, resume=True)


def test_ctrl_c_waits_for_the_step_saves_and_says_how_to_go_on(tmp_path):
    result = Result.open("interrupted", {"seed": 0}, root=tmp_path)
    steps = []

    def loss(model, batch):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return pull(model, batch)

    model, x = Scalar(), (1.0, 2.0, 3.0, 4.0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after step 3; the same call with resume=True goes on from .*ckpt"):
        train(model, x=x, loss=loss, result=result)
    assert signal.getsignal(signal.SIGINT) is before
    assert model.w.item() == pytest.approx(-0.6)  # the third step is complete
    assert Result.load(result.path).status == "interrupted"
    again, result = Scalar(), Result.open("interrupted", {"seed": 0}, root=tmp_path)
    history = train(again, x=x, loss=loss, result=result, resume=True)
    assert len(steps) == 4 and history.steps == 4 and again.w.item() == pytest.approx(-1.0)
    assert history.rows[0]["train_pull"] == pytest.approx((0 - 0.1 * 2 - 0.3 * 3 - 0.6 * 4) / 4)


def test_ctrl_c_in_an_evaluation_repeats_the_evaluation_only(tmp_path):
    steps, calls = [], []

    def evaluate(model):
        calls.append(torch.rand(()).item())
        result.log("probe", draw=calls[-1])
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {"valid_loss": 1.0}

    def loss(model, batch):
        steps.append(1)
        return pull(model, batch)

    result = Result.open("interrupted", {"seed": 1}, root=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(Scalar(), loss=loss, evaluate=evaluate, result=result)
    torch.manual_seed(99)  # whatever the new process did before
    result = Result.open("interrupted", {"seed": 1}, root=tmp_path)
    train(Scalar(), loss=loss, evaluate=evaluate, result=result, resume=True)
    assert len(steps) == 1 and len(calls) == 2 and calls[0] == calls[1]
    assert len(result.curves["probe"]) == 1 and len(result.curves["epochs"]) == 1


def test_an_error_in_training_marks_the_result_as_failed(tmp_path):
    result = Result.open("failing", {}, root=tmp_path)
    with pytest.raises(NonFiniteLoss):
        train(Scalar(), evaluate=by_list([math.inf]), result=result)
    read = Result.load(result.path)
    assert read.status == "failed" and "NonFiniteLoss: valid_loss is inf" in read.error


def test_two_fits_of_one_result_have_their_own_curves_and_checkpoints(tmp_path):
    def both(result, steps):
        def loss(model, batch):
            steps.append(1)
            return pull(model, batch)

        model = Scalar()
        train(model, loss=loss, result=result, curve="first", resume=True)
        train(model, loss=loss, result=result, curve="second", resume=True, config={"epochs": 2})
        return model

    model = both(Result.open("stages", {}, root=tmp_path), steps := [])
    again = both(result := Result.open("stages", {}, root=tmp_path), more := [])  # killed before finish
    assert (len(steps), len(more)) == (3, 0) and torch.equal(model.w, again.w)
    assert {name: len(rows) for name, rows in result.curves.items()} == {"first": 1, "second": 2}
    result.finish({})
    assert [file.suffix for file in result.path.parent.iterdir()] == [".json"]
