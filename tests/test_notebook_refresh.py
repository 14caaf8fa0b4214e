"""Notebooks are executed in place, without what changes every time; a failing one stays as it was."""

import json
import os

import nbformat
from tiny_notebooks import code, write_notebook

from moe_lab.notebook_refresh import clean, main

PRINTS = """\
import os
from moe_lab.paths import runs_dir
print(runs_dir().exists(), os.environ["OMP_NUM_THREADS"])
"""


def test_a_notebook_is_executed_in_an_empty_runs_folder_and_has_no_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_LAB_RUNS", str(tmp_path / "mine"))
    path = write_notebook(
        tmp_path,
        "01_good",
        [
            code("seed = 0", "parameters"),
            code(PRINTS),
            code("import ipywidgets\nipywidgets.interact(lambda depth=2: print(depth));", "nbval-ignore-output"),
        ],
    )
    assert main([str(path)]) == 0
    assert "01_good.ipynb: executed" in capsys.readouterr().out
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["metadata"] for cell in notebook["cells"]] == [
        {"tags": ["parameters"]},
        {},
        {"tags": ["nbval-ignore-output"]},
    ]
    assert [cell["execution_count"] for cell in notebook["cells"]] == [1, 2, 3]
    assert notebook["cells"][1]["outputs"][0]["text"] == ["False 1\n"]
    assert os.environ["MOE_LAB_RUNS"] == str(tmp_path / "mine")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failing_notebook_stays_as_it_was_and_the_reason_is_shown(tmp_path, capsys):
    path = write_notebook(tmp_path, "02_bad", [code("seed = 0", "parameters"), code("1 / 0")])
    before = path.read_bytes()
    assert main([str(path)]) == 1
    assert path.read_bytes() == before
    shown = capsys.readouterr().err
    assert "left as it was" in shown and "ZeroDivisionError" in shown


def test_cleaning_twice_changes_nothing(tmp_path):
    path = write_notebook(tmp_path, "01_good", [code("seed = 0", "parameters")])
    once = nbformat.writes(clean(nbformat.read(path, 4)))
    assert nbformat.writes(clean(nbformat.reads(once, 4))) == once
