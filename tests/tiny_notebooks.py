"""Not a test: makes small notebooks for the tests of the command line, the report and the browser."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """\
profile = "quick"  # quick | standard | paper
seed = 0           # everything random hangs on it
gamma = 1.0
gate = "comet"     # softmax | topk | comet: which one
sizes = [4, 4]
note = None
verbose = False
marker = ""
"""

BODY = """\
import pathlib, sys, time
print("interpreter", sys.executable)
print("values", profile, seed, gamma, gate, sizes, note, verbose)
"""

FIGURE = """\
from IPython.display import Image, display
from base64 import b64decode
display(Image(b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")))
"""

MAYBE_STOPS = """\
if marker:
    pathlib.Path(marker).write_text("in the cell")
    time.sleep(60)
if seed == 13:
    raise RuntimeError("thirteen is not a seed")
"""

LAST = """\
import ipywidgets
ipywidgets.interact(lambda depth=2: print(depth))
print("reached the end")
"""


def write_notebook(folder: Path, name: str, cells: list, kernel: str = "python3") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kernelspec = {"name": kernel, "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def code(source: str, *tags: str):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def write_two(folder: Path) -> None:
    """02 prints, may wait for Ctrl-C, fails for seed 13; 05 has no profile."""
    title = (
        "# 02 · Tiny trees\n\nA summary that `moe-lab list` shows:\n$\\frac{a}{b}$ of it.\n\n**Reproduces:** Table 7"
    )
    write_notebook(
        folder,
        "02_tiny_trees",
        [
            new_markdown_cell(title),
            code(PARAMETERS, "parameters"),
            code(BODY),
            code(FIGURE),
            code(MAYBE_STOPS),
            code(LAST),
        ],
    )
    write_notebook(
        folder, "05_other", [new_markdown_cell("# 05 · Other"), code("seed = 0", "parameters"), code("print(seed)")]
    )
