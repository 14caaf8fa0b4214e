"""Notebooks are executed in place, without what changes every time; a failing one stays as it was."""

import base64
import io
import json
import os

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image
from tiny_notebooks import code, write_notebook

from moe_lab.notebook_refresh import clean, fewer_colours, main

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


def as_png(picture):
    stream = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(stream, format="PNG")
    else:
        picture.savefig(stream, format="png")
    return base64.b64encode(stream.getvalue()).decode() + "\n"


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), dtype=float)


def test_a_figure_is_stored_with_fewer_colours_and_looks_the_same():
    figure, ax = plt.subplots()
    for shift in range(8):
        ax.plot(np.sin(np.linspace(0, 9, 50) + shift), label=f"line {shift}")
    ax.legend()
    png = as_png(figure)
    plt.close(figure)
    packed = fewer_colours(png)
    assert len(packed) < 0.6 * len(png)
    assert np.abs(pixels(packed) - pixels(png)).mean() < 0.5
    assert fewer_colours(packed) == packed
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"image/png": png})])
    cleaned = clean(nbformat.v4.new_notebook(cells=[cell]))
    assert cleaned.cells[0].outputs[0].data["image/png"] == packed


def test_a_small_picture_on_a_white_page_is_looked_at_too():
    page = np.full((480, 640, 3), 255, dtype=np.uint8)
    y, x = np.mgrid[:96, :96] / 96
    inset = np.stack([x, y, (np.sin(9 * x) * np.cos(7 * y) + 1) / 2], -1)
    inset += np.random.default_rng(0).normal(0, 0.1, inset.shape)
    page[40:136, 40:136] = (255 * inset.clip(0, 1)).astype(np.uint8)
    png = as_png(Image.fromarray(page))
    assert fewer_colours(png) == png


@pytest.mark.parametrize("channels", [3, 4], ids=["thousands of colours", "transparent"])
def test_a_picture_that_needs_its_colours_keeps_them(channels):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, channels), dtype=np.uint8)
    png = as_png(Image.fromarray(noise))
    assert fewer_colours(png) == png
