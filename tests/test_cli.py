"""The command line on two tiny notebooks: what runs, what is refused before anything runs, what is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
import tiny_notebooks

from moe_lab import notebook_catalogue
from moe_lab.cli import main
from moe_lab.notebook_catalogue import read_parameters
from moe_lab.notebook_parameters import parse_value, split_values


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with two notebooks and an empty runs folder."""
    tiny_notebooks.write_two(tmp_path / "notebooks")
    monkeypatch.setattr(notebook_catalogue, "notebooks_dir", lambda: tmp_path / "notebooks")
    monkeypatch.setenv("MOE_LAB_RUNS", str(tmp_path / "runs"))
    return tmp_path


def command(text):
    """`moe-lab ...` in this process; returns the exit code."""
    return main(text.split())


def executed(lab):
    return sorted(path.name for path in (lab / "runs" / "notebooks").glob("*.ipynb"))


def stdout_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(
        output.text for cell in cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )


# --- what is refused before anything runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run 07", "Unknown notebook '07'"),
        ("run 02_tiny_tres", "Did you mean '02_tiny_trees'?"),
        ("run tiny_trees -p sed 1", "no parameter 'sed'. Did you mean 'seed'?"),
        ("run 02 -p seed 1.5", "seed='1.5' is not a whole number"),
        ("run 02 -p seed true", "not a whole number"),
        ("run 02 -p gamma wide", "gamma='wide' is not a finite number"),
        ("run 02 -p gamma inf", "not a finite number"),
        ("run 02 -p gamma 1e999", "not a finite number"),
        ("run 02 -p verbose 1", "verbose='1' is not true or false"),
        ("run 02 -p sizes 4", "sizes='4' is not a list"),
        ("run 02 -p gate commet", "one of: softmax, topk, comet. Did you mean 'comet'?"),
        ("run 02 -p profile quik", "one of: quick, standard, paper. Did you mean 'quick'?"),
        ("run 02 --profile quik", "Did you mean 'quick'?"),
        ("run 02 -p seed 1 -p seed 2", "given twice"),
        ("run 02 -p profile paper --profile quick", "given twice"),
        ("run 02 05 -p gamma 2", "Notebook 05_other has no parameter 'gamma'"),
        ("run 05 --profile paper", "none of the chosen notebooks has a profile"),
        ("run", "--headline, or --all"),
        ("run 02 --all", "in one way"),
        ("sweep 02", "A sweep needs values"),
        ("sweep 02 -p seed 0,,1", "empty value"),
        ("sweep 02 -p seed 0,one", "seed='one' is not a whole number"),
        ("rum 02", "Did you mean 'run'?"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(lab, capsys, arguments, message):
    try:
        code = command(arguments)
    except SystemExit as stopped:  # argparse's own refusals
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (lab / "runs").exists()


def test_values_take_the_type_of_the_default():
    parameters = read_parameters(tiny_notebooks.PARAMETERS)
    given = {
        "seed": "3",
        "gamma": "2",
        "gate": "topk",
        "sizes": "[8, 2]",
        "verbose": "True",
        "marker": "1",
        "note": "x",
    }
    values = {name: parse_value(text, parameters[name]) for name, text in given.items()}
    expected = {"seed": 3, "gamma": 2.0, "gate": "topk", "sizes": [8, 2], "verbose": True, "marker": "1", "note": "x"}
    assert values == expected
    assert type(values["gamma"]) is float
    assert parse_value("[1, None]", parameters["note"]) == [1, None]


def test_a_parameters_cell_with_something_else_than_literals_is_refused():
    with pytest.raises(ValueError, match="'seed = 2 \\*\\* 3' is not `name = literal`"):
        read_parameters("gamma = 1.0\nseed = 2 ** 3")
    with pytest.raises(ValueError, match="import os"):
        read_parameters("import os")


def test_a_comment_gives_choices_only_if_the_default_is_one_of_them():
    found = read_parameters('a = "x"  # x | y: the way\nb = "x"  # y | z\nc = 1  # 1 | 2\nd = "x"  # either x or y')
    assert [parameter.choices for parameter in found.values()] == [("x", "y"), (), (), ()]
    assert found["a"].help == "x | y: the way"


BOUNDED = """\
seed = 0  # >= 0: of everything
gamma = 1.0  # > 0: width
share = 0.5  # 0 .. 1: of the loss
k = None  # >= 1: trees
data = None  # None | digits | mnist: which
gate = "comet"  # softmax|topk+|comet
"""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("seed", "-1", "seed=-1 is not allowed; it must be >= 0."),
        ("seed", str(10**20), "too large"),
        ("gamma", "0", "it must be > 0."),
        ("share", "1.01", "it must be 0 .. 1."),
        ("k", "0", "it must be >= 1."),
        ("k", "many", "'many' is not a number; it must be >= 1."),
        ("data", "mnits", "Did you mean 'mnist'?"),
        ("gate", "commet", "Did you mean 'comet'?"),
    ],
)
def test_values_that_no_run_can_have_are_refused_before_anything_runs(name, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_value(text, read_parameters(BOUNDED)[name])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "0", 0),
        ("gamma", "1e-3", 1e-3),
        ("share", "1", 1.0),
        ("k", "3", 3),
        ("k", "None", None),
        ("data", "digits", "digits"),
        ("data", "None", None),
        ("gate", "topk+", "topk+"),
    ],
)
def test_values_at_the_edge_are_accepted(name, text, value):
    assert parse_value(text, read_parameters(BOUNDED)[name]) == value


def test_a_comment_that_only_mentions_numbers_is_no_bound():
    found = read_parameters("a = 1  # 8 are planted\nb = 2  # at most 3\nc = 1.0  # 0.9 in the paper: a share")
    assert [parameter.bound for parameter in found.values()] == ["", "", ""]


def test_commas_inside_brackets_and_quotes_do_not_separate_values():
    assert split_values("[1, 2],[3]") == ["[1, 2]", "[3]"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]


# --- what runs ------------------------------------------------------------------------------------------------------


def test_list_shows_title_summary_origin_and_defaults(lab, capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "02  Tiny trees",
        "A summary that `moe-lab list` shows: $",
        "Reproduces: Table 7",
        "-p gate 'comet'",
    ):
        assert expected in text
    assert "everything random hangs on it" in text


def test_a_run_uses_the_interpreter_of_moe_lab_whatever_kernel_is_registered(lab, monkeypatch):
    """A kernel named python3 that belongs to another program must not be started."""
    spec = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
    kernel = lab / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(lab / "jupyter"))
    assert command("run 02 -p gate topk -p gamma 2 --profile standard") == 0
    assert executed(lab) == ["02_tiny_trees-gamma-2.0-gate-topk-profile-standard.ipynb"]
    text = stdout_of(lab / "runs" / "notebooks" / executed(lab)[0])
    assert f"interpreter {sys.executable}\n" in text
    assert "values standard 0 2.0 topk [4, 4] None False\n" in text
    assert "reached the end" in text


def test_a_failing_cell_is_shown_and_what_finished_is_kept_and_the_others_run(lab, capsys):
    assert command("run --all -p seed 13") == 1
    shown = capsys.readouterr()
    assert 'raise RuntimeError("thirteen is not a seed")' in shown.err  # the cell
    assert "RuntimeError: thirteen is not a seed" in shown.err  # the traceback
    assert "\x1b" not in shown.err
    assert "1 of 2 notebooks finished" in shown.err
    assert executed(lab) == ["02_tiny_trees-seed-13.ipynb", "05_other-seed-13.ipynb"]
    kept = stdout_of(lab / "runs" / "notebooks" / "02_tiny_trees-seed-13.ipynb")
    assert "values quick 13" in kept and "reached the end" not in kept


def test_a_sweep_runs_all_combinations_and_the_report_shows_them_offline(lab, capsys):
    assert command("sweep 02 -p seed 0,13 -p verbose false,true") == 1
    names = [
        "02_tiny_trees-seed-13-verbose-True",
        "02_tiny_trees-seed-13",
        "02_tiny_trees-verbose-True",
        "02_tiny_trees",
    ]
    assert executed(lab) == sorted(f"{name}.ipynb" for name in names)
    capsys.readouterr()
    assert main(["report"]) == 0
    index = lab / "runs" / "report" / "index.html"
    assert str(index) in capsys.readouterr().out
    text = index.read_text()
    links = re.findall(r'<td><a href="([^"]+)"', text)
    assert links == sorted((f"{name}.html" for name in names), key=lambda name: name.removesuffix(".html"))
    assert all((index.parent / link).is_file() for link in links)
    assert text.count('<td class="failed">') == 2 and text.count('<td class="finished">') == 2
    assert text.count("data:image/png;base64,") == 4
    assert "torch" in text
    page = (index.parent / "02_tiny_trees.html").read_text()
    assert "<mfrac>" in page  # the formula, as MathML
    assert "it needs a running notebook" in page  # the widget
    for html in index.parent.glob("*.html"):  # nothing is asked from the network, nothing runs
        assert set(re.findall(r"https?://[\w./]+", html.read_text())) <= {"http://www.w3.org/1998/Math/MathML"}
        assert "<script" not in html.read_text()


def test_the_report_lists_results_with_metrics_and_status(lab):
    from moe_lab.results import Result

    for seed in (0, 1):
        result = Result.open("toy_study", {"gate": "comet", "seed": seed})
        result.finish({"auc": 0.75 + seed})
    Result.open("toy_study", {"gate": "comet", "seed": 2}).save()
    assert main(["report"]) == 0
    text = (lab / "runs" / "report" / "index.html").read_text()
    assert "toy_study (3)" in text
    assert "gate = comet" in text  # the same in all rows, so said once
    assert all(f"<td>{cell}</td>" in text for cell in ("0.75", "1.75", "finished", "running"))


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_control_c_interrupts_the_cell_says_what_is_kept_and_exits_130(lab):
    program = (
        "import pathlib, sys; from moe_lab import notebook_catalogue as c; "
        f"c.notebooks_dir = lambda: pathlib.Path({str(lab / 'notebooks')!r}); "
        "from moe_lab.cli import main; sys.exit(main())"
    )
    marker = lab / "marker"
    arguments = [sys.executable, "-c", program, "sweep", "02", "-p", "marker", str(marker), "-p", "seed", "1,2"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "KeyboardInterrupt" in err and "Kept: the cells that finished" in err
    assert "0 of 2 notebooks finished" in err
    assert len(executed(lab)) == 1  # the second was not started
    assert "values quick 1" in stdout_of(lab / "runs" / "notebooks" / executed(lab)[0])


def test_without_notebooks_the_message_says_where_they_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebook_catalogue, "notebooks_dir", lambda: tmp_path)
    assert main(["list"]) == 2
    assert "checkout" in capsys.readouterr().err
