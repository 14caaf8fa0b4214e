"""Every committed notebook was executed as a whole, says what it claims, and can be run elsewhere."""

import json
import shutil

import pytest
from notebook_structure import problems
from tiny_notebooks import code, write_notebook

from moe_lab.notebook_catalogue import find_notebooks
from moe_lab.paths import notebooks_dir

ALL = sorted(notebooks_dir().rglob("[0-9][0-9]_*.ipynb"))
CHAPTER = """\
# 01 · Good

## Question and prediction: Prediction
## Exercises
## References

Reproduces: Table 1

## Where we differ
| we | they |
|---|---|
"""


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_is_in_order(path):
    assert problems(path) == []


def test_every_solution_belongs_to_a_notebook():
    numbered = {f"{notebook.name}_solutions" for notebook in find_notebooks()}
    assert {path.stem for path in (notebooks_dir() / "solutions").glob("*.ipynb")} <= numbered


def test_numbers_are_given_once():
    numbers = [notebook.number for notebook in find_notebooks()]
    assert len(numbers) == len(set(numbers))


@pytest.fixture
def good(tmp_path):
    """A notebook without problems, as a JSON value that a test may spoil."""
    from nbformat.v4 import new_markdown_cell

    source = [
        new_markdown_cell(CHAPTER),
        code("seed = 0", "parameters"),
        code("view(2)"),
        code("interact(view)", "nbval-ignore-output"),
        code("print(1)", "nbval-check-output"),
    ]
    path = write_notebook(tmp_path, "01_good", source)
    (tmp_path / "solutions").mkdir()
    shutil.copy(path, tmp_path / "solutions" / "01_good_solutions.ipynb")
    notebook = json.loads(path.read_text())
    for count, cell in enumerate(notebook["cells"][1:], 1):
        cell["execution_count"] = count
    notebook["cells"][2]["outputs"] = [{"output_type": "display_data", "data": {"image/png": "AA"}, "metadata": {}}]
    notebook["cells"][4]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]
    path.write_text(json.dumps(notebook))
    assert problems(path) == []
    return path, notebook


SPOILED = {
    "executed from top to bottom": lambda cells: cells[3].update(execution_count=9),
    "holds an error": lambda cells: cells[4]["outputs"].append({"output_type": "error", "ename": "E"}),
    "wrote to stderr": lambda cells: cells[4]["outputs"][0].update(name="stderr"),
    "no output to compare": lambda cells: cells[4]["outputs"].clear(),
    "an absolute path": lambda cells: cells[4]["outputs"][0].update(text=["/" + "home/me/runs/x.json\n"]),
    "not the tag nbval-ignore-output": lambda cells: cells[3]["metadata"].clear(),
    "call the view once": lambda cells: cells[2]["outputs"].clear(),
    "0 cells are tagged parameters": lambda cells: cells[1]["metadata"].clear(),
    "is not `name = literal`": lambda cells: cells[1].update(source="seed = int(0)"),
    "no parameter called seed": lambda cells: cells[1].update(source="sead = 0"),
    "the profile is not": lambda cells: cells[1].update(source='seed = 0\nprofile = "standard"'),
    "claims nothing": lambda cells: cells[4]["metadata"].clear(),
    "no heading with 'Exercises'": lambda cells: cells[0].update(source=CHAPTER.replace("Exercises", "Tasks")),
    "does not begin with the title": lambda cells: cells[0].update(source=CHAPTER.replace("01", "02")),
    "says where we differ": lambda cells: cells[0].update(source=CHAPTER.replace("differ", "do the same")),
    "a dead link: 09_no.ipynb": lambda cells: cells[0].update(source=CHAPTER + "[next](09_no.ipynb)"),
    "MB": lambda cells: cells[2]["outputs"][0]["data"].update({"image/png": "A" * 10**6}),
}


@pytest.mark.parametrize("problem", SPOILED)
def test_each_of_these_checks_can_fail(good, problem):
    path, notebook = good
    SPOILED[problem](notebook["cells"])
    path.write_text(json.dumps(notebook))
    assert [found for found in problems(path) if problem in found]


def test_a_notebook_without_solutions_is_found(good):
    path, _ = good
    shutil.rmtree(path.parent / "solutions")
    assert problems(path) == ["no solutions/01_good_solutions.ipynb"]
