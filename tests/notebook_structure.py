"""What every committed notebook must be, as one function; `tests/notebooks/test_structure.py` applies and breaks it."""

import json
import re
from pathlib import Path

from moe_lab.notebook_catalogue import PROFILES, read_parameters

HEADINGS = ("Question", "Prediction", "Exercises", "References")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|tmp|opt|usr|mnt|var)/[\w.-]+|\b[A-Z]:\\\\\w+")
WIDGETS = re.compile(r"\b(?:interact|interactive|interactive_output|interact_manual)\(")


def problems(path: Path) -> list[str]:
    """Everything that is wrong with a notebook, in words; empty if all is well."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [Cell(cell) for cell in notebook["cells"]]
    code = [cell for cell in cells if cell.kind == "code" and cell.source.strip()]
    found = []
    if len(text) > 1_000_000:
        found.append(f"{len(text) / 1e6:.1f} MB: figures with a lower dpi (plots.use_style), fewer of them")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not called python3")
    if [cell.count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not executed from top to bottom in a fresh kernel: restart, run all, save")
    found += [f"an absolute path: {match[0]}" for match in ABSOLUTE.finditer(text)]
    for cell in code:
        where = f"In [{cell.count}]"
        for output in cell.outputs:
            if output["output_type"] == "error":
                found.append(f"{where} holds an error: {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"{where} wrote to stderr (a warning or a progress bar): {''.join(output['text'])[:80]!r}")
        if "nbval-check-output" in cell.tags and not cell.outputs:
            found.append(f"{where} claims something, but has no output to compare with")
    found += _widget_problems(code)
    is_solution = path.parent.name == "solutions"
    found += [] if is_solution else _chapter_problems(path, cells, code)
    found += _link_problems(path, cells)
    return found


class Cell:
    """A cell of the JSON file, with defaults for what may be missing."""

    def __init__(self, cell: dict):
        self.kind = cell["cell_type"]
        self.source = "".join(cell["source"])
        self.tags = cell["metadata"].get("tags", [])
        self.outputs = cell.get("outputs", [])
        self.count = cell.get("execution_count")

    @property
    def shows_a_figure(self) -> bool:
        return any("image/png" in output.get("data", {}) for output in self.outputs)


def _widget_problems(code: list[Cell]) -> list[str]:
    found = []
    for before, cell in zip([None, *code], code, strict=False):
        if WIDGETS.search(cell.source):
            if "nbval-ignore-output" not in cell.tags:
                found.append(f"In [{cell.count}] has a widget, but not the tag nbval-ignore-output")
            if before is None or not before.shows_a_figure:
                found.append(f"In [{cell.count}] has a widget; the cell before it must call the view once and show it")
    return found


def _chapter_problems(path: Path, cells: list[Cell], code: list[Cell]) -> list[str]:
    found = []
    text = [cell.source for cell in cells if cell.kind == "markdown"]
    headings = " ".join(re.findall(r"^#+ *(.+)", "\n".join(text), flags=re.MULTILINE))
    found += [f"no heading with {word!r}" for word in HEADINGS if word not in headings]
    if not re.match(rf"# {path.stem[:2]} · \S", text[0] if text else ""):
        found.append(f"does not begin with the title '# {path.stem[:2]} · ...'")
    tagged = [cell for cell in code if "parameters" in cell.tags]
    if len(tagged) != 1:
        return [*found, f"{len(tagged)} cells are tagged parameters, not one"]
    try:
        parameters = read_parameters(tagged[0].source)
    except ValueError as problem:
        return [*found, str(problem)]
    if "seed" not in parameters:
        found.append("no parameter called seed")
    if "profile" in parameters and (parameters["profile"].default, parameters["profile"].choices) != (
        "quick",
        PROFILES,
    ):
        found.append(f'the profile is not: profile = "quick"  # {" | ".join(PROFILES)}')
    if not any("nbval-check-output" in cell.tags for cell in code):
        found.append("claims nothing: no cell is tagged nbval-check-output")
    # A table whose head or heading says "differ", in whatever grammatical form.
    tables = [part for part in text if re.search(r"^\|.*\|", part, flags=re.MULTILINE)]
    if "Reproduces:" in " ".join(text) and not any("differ" in part for part in tables):
        found.append("reproduces a paper without a table that says where we differ")
    if not (path.parent / "solutions" / f"{path.stem}_solutions.ipynb").is_file():
        found.append(f"no solutions/{path.stem}_solutions.ipynb")
    return found


def _link_problems(path: Path, cells: list[Cell]) -> list[str]:
    links = [
        link
        for cell in cells
        if cell.kind == "markdown"
        for link in re.findall(r"\]\(([^)#:]+\.\w+)[#)]", cell.source + ")")
    ]
    return [f"a dead link: {link}" for link in links if not (path.parent / link).exists()]
