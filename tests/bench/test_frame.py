"""One frame for the measurements on a GPU: its options are its fields, and its report grows table by table."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_lab.bench.frame import (
    Frame,
    KernelFrame,
    Report,
    add_frame,
    add_sizes,
    add_turns,
    command_parser,
    given_frame,
    given_sizes,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    tokens: int
    k: int

    def __post_init__(self):
        if self.k > self.tokens:
            raise ValueError("too many k")


KNOWN = (Sizes(4, 1), Sizes(8, 2), Sizes(8, 3))


def parsed(default, *arguments):
    parser = command_parser("some", "What it does.")
    add_sizes(parser, KNOWN)
    add_frame(parser, default)
    given = parser.parse_args(arguments)
    return type(default)(**given_frame(vars(given), type(default))), given_sizes(parser, given, KNOWN), given


def test_without_options_the_frame_is_the_default_and_all_sizes_are_measured():
    for default in (Frame(rounds=3), KernelFrame(seed=4, steps=7)):
        assert parsed(default)[:2] == (default, KNOWN)


def test_every_field_has_an_option():
    options = ["--dtype", "float32", "--no-compile", "--rounds", "2", "--steps", "9", "--seed", "5", "--tune"]
    others = ["--parts", "--rows", "2", "0", "--cases", "a", "b c", "--device", "cpu"]
    frame, sizes, given = parsed(KernelFrame(), *options, *others)
    assert frame == KernelFrame(dtype="float32", compiled=False, rounds=2, steps=9, seed=5, tune=True, parts=True)
    assert frame.torch_dtype == torch.float32
    assert sizes == (KNOWN[2], KNOWN[0]) and given.cases == ["a", "b c"] and given.device == "cpu"
    assert parsed(Frame(), "--tokens", "7", "--k", "7")[1] == (Sizes(7, 7),)


def test_what_was_not_said_is_left_to_each_table():
    parser = command_parser("many", "Many tables.")
    add_turns(parser, None)
    assert given_frame(vars(parser.parse_args([]))) == {"compiled": True}
    given = vars(parser.parse_args(["--steps", "4", "--tune"]))
    assert given_frame(given) == {"compiled": True, "steps": 4}
    assert given_frame(given, KernelFrame) == {"compiled": True, "steps": 4, "tune": True, "parts": False}


def test_what_cannot_be_measured_is_refused(capsys):
    with pytest.raises(ValueError, match="two timed steps"):
        Frame(rounds=1, steps=1)
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        KernelFrame(dtype="bfloat")
    for arguments, message in (
        (["--k", "3"], "give all of --tokens --k, or none"),
        (["--tokens", "0", "--k", "3"], "too many k"),
        (["--rows", "3"], "invalid choice"),
        (["--tune"], "unrecognized arguments"),  # nothing of ours to tune
    ):
        with pytest.raises(SystemExit):
            parsed(Frame(), *arguments)
        assert message in capsys.readouterr().err


def test_a_report_is_complete_after_every_table(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    report = Report("some", ["--cases", "a b"], torch.device("cpu"), path, {"other": "1.2"})
    assert "python -m moe_lab.bench.some --cases 'a b'" in capsys.readouterr().out
    for n, rows in enumerate(([{"case": "a b", "ms": 1.5}], [])):
        report.add("times", rows)
        written = json.loads(path.read_text())
        assert written == report.content and len(written["tables"]) == n + 1
        assert written["tables"][n] == {"table": "times", "rows": rows}
    assert written["environment"]["other"] == "1.2" and written["environment"]["torch"] == torch.__version__
    assert "1.5" in (printed := capsys.readouterr().out) and "Triton cannot run" in printed
    Report("some", [], torch.device("cpu")).add("times", [])  # written nowhere
