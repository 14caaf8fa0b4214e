"""Execute committed notebooks in place: `python -m moe_lab.notebook_refresh [NOTEBOOK.ipynb ...]`, for contributors.

From top to bottom in a fresh kernel, with an empty runs folder (nothing is read back from earlier runs) and one thread
per process, as the tests do it. What changes at every execution without meaning anything (times of cells, widget state,
paths) is left out of the file, so that a diff shows what really changed, and pictures that 256 colours can show are
stored with as many: a third of the bytes. A notebook that fails stays as it was.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from moe_lab.atomic import atomic_file
from moe_lab.notebook_catalogue import read_notebook
from moe_lab.notebook_runner import run_notebook
from moe_lab.paths import notebooks_dir

_KEPT = ("kernelspec", "language_info")
_INVISIBLE = 15.0  # of 255: what all but one pixel in a hundred may differ by, of those that are not background


def fewer_colours(png: str) -> str:
    """A PNG (base64) with a palette of 256 colours, if it then is smaller and looks the same; else as it was."""
    content = base64.b64decode(png)
    with Image.open(io.BytesIO(content)) as picture:
        if picture.mode == "P" or (picture.mode == "RGBA" and picture.getextrema()[3][0] < 255):
            return png
        before = picture.convert("RGB")
    after = before.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    shown, packed_pixels = (np.asarray(image, dtype=float).reshape(-1, 3) for image in (before, after.convert("RGB")))
    drawn = (shown != shown[0]).any(1)  # the first pixel is background
    differences = np.abs(shown - packed_pixels).max(1)[drawn]
    difference = np.quantile(differences, 0.99) if len(differences) else 0.0
    packed = io.BytesIO()
    after.save(packed, format="PNG", optimize=True)
    if difference > _INVISIBLE or len(packed.getvalue()) >= len(content):
        return png
    return base64.b64encode(packed.getvalue()).decode() + "\n"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without execution times, widget state and papermill's notes, pictures small; changes and returns the notebook."""
    notebook.metadata = nbformat.NotebookNode(
        {name: notebook.metadata[name] for name in _KEPT if name in notebook.metadata}
    )
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.NotebookNode({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = fewer_colours(output.data["image/png"])
    return notebook


def refresh(path: Path) -> bool:
    """Execute one notebook and write it back; False (and the reason on stderr) if a cell failed."""
    names = ("MOE_LAB_RUNS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(zip(names, (str(Path(folder) / "runs"), "1"), strict=True))
        try:
            outcome = run_notebook(read_notebook(path), {}, Path(folder))
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        if outcome.status != "finished":
            print(f"{path.name}: {outcome.status}, left as it was\n\n{outcome.error}", file=sys.stderr)
            return False
        text = nbformat.writes(clean(nbformat.read(outcome.path, as_version=4)))
    with atomic_file(path) as file:
        file.write((text.rstrip("\n") + "\n").encode())
    print(f"{path.name}: executed in {outcome.seconds:.0f} s")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if all finished."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.notebook_refresh", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK.ipynb", help="default: all, and solutions")
    paths = parser.parse_args(arguments).notebooks or sorted(notebooks_dir().rglob("[0-9][0-9]_*.ipynb"))
    return 0 if all([refresh(path.resolve()) for path in paths]) else 1


if __name__ == "__main__":
    sys.exit(main())
