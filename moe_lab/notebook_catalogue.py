"""The numbered notebooks: which there are, what they say about themselves, which parameters they take.

Everything is read from the notebooks, nothing is listed twice: the number from the file name, title and summary from
the first markdown cell, the paper's table or figure from a line "Reproduces: ...", parameters from the cell tagged
`parameters`. There each default is a plain literal, and its type is the parameter's type. A comment gives the meaning;
a comment that starts with alternatives, one of which is the default, or with a bound, gives the allowed values:

    profile = "quick"  # quick | standard | paper
    gate = "comet"     # softmax | topk | comet: which gate decides
    seed = 0           # >= 0: everything random hangs on it
    gamma = 1.0        # > 0: width; `0 .. 1: share` gives both ends
    dataset = None     # None | digits | mnist: the profile's, or this one

papermill ignores misspelt names with a log line; therefore names and values are checked here, before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.paths import notebooks_dir

PROFILES = ("quick", "standard", "paper")
HEADLINE = ("02", "03", "04")
"""What `make run` and `moe-lab run --headline` run: COMET's trees, and COMET in its two experiments."""

_CHOICES = re.compile(r"\s*([\w+.-]+(?:\s*\|\s*[\w+.-]+)+)")
_BOUND = re.compile(
    r"\s*(?:(?P<sign>>=?)\s*(?P<least>-?[\d.]+)|(?P<low>-?[\d.]+)\s*\.\.\s*(?P<high>-?[\d.]+))\s*(?=:|$)"
)


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell.

    Attributes:
        name, default, help: as written there.
        choices: allowed texts; empty if any value of the default's type is allowed.
        bound: ``>= 1``, ``> 0`` or ``0 .. 1`` for numbers; empty: any.
    """

    name: str
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    bound: str = ""

    def within(self, value: float) -> bool:
        """The number respects the bound."""
        found = _BOUND.match(self.bound)
        if found is None:
            return True
        if found["sign"]:
            least = float(found["least"])
            return value >= least if found["sign"] == ">=" else value > least
        return float(found["low"]) <= value <= float(found["high"])


@dataclass(frozen=True)
class Notebook:
    """What a notebook says about itself; `number` is the two digits of its file name."""

    path: Path
    number: str
    title: str
    summary: str = ""
    reproduces: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File name without the ending: `03_comet_recommender`."""
        return self.path.stem


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' with the closest known name, or nothing if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def read_notebook(path: Path) -> Notebook:
    """Read a notebook's own description.

    Raises:
        ValueError: the file name does not begin with two digits, or the parameters cell is not made of plain literals.
    """
    if not re.match(r"\d\d_", path.stem):
        raise ValueError(
            f"{path.name}: a notebook's name is two digits, an underscore and a topic, like 03_topic.ipynb."
        )
    # json, not nbformat: its import takes seconds, and `moe-lab list` should answer at once.
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = next((_source(cell) for cell in cells if cell["cell_type"] == "markdown"), "").strip().splitlines()
    title = re.sub(r"^#+\s*(\d\d\s*[·.:–-]\s*)?", "", lines[0]) if lines else path.stem
    reproduces = next((line for line in map(_plain, lines) if line.startswith("Reproduces:")), "")
    body = [line for line in map(_plain, lines[1:]) if not line.startswith("Reproduces:")]
    tagged = [_source(cell) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return Notebook(
        path=path,
        number=path.stem[:2],
        title=title.strip(),
        summary=_first_paragraph(body),
        reproduces=reproduces.removeprefix("Reproduces:").strip(),
        parameters=read_parameters(tagged[0], path.name) if tagged else {},
    )


def read_parameters(source: str, where: str = "parameters cell") -> dict[str, Parameter]:
    """Parse a parameters cell: `name = literal` lines, each with an optional comment.

    Raises:
        ValueError: a line is something else; papermill could not replace it.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = {}
    for line in ast.parse(source).body:
        target = line.targets[0] if isinstance(line, ast.Assign) and len(line.targets) == 1 else None
        try:
            if not isinstance(target, ast.Name):
                raise ValueError
            default = ast.literal_eval(line.value)
        except ValueError:
            text = ast.get_source_segment(source, line)
            raise ValueError(
                f"{where}: {text!r} is not `name = literal`; a parameters cell holds numbers, strings, booleans, None, "
                "and lists, tuples or dicts of them. Compute in the cell after it."
            ) from None
        help_text = comments.get(line.end_lineno, "")
        found = _BOUND.match(help_text)
        bound = found[0].strip() if found else ""
        choices = _choices(target.id, default, help_text)
        parameters[target.id] = Parameter(target.id, default, help_text, choices, bound)
    return parameters


def find_notebooks(folder: Path | None = None) -> list[Notebook]:
    """All numbered notebooks of a folder (default: the project's), in reading order."""
    folder = folder or notebooks_dir()
    return [read_notebook(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]


def select_notebook(spec: str, notebooks: list[Notebook]) -> Notebook:
    """The notebook meant by `3`, `03`, `03_comet_recommender`, `comet_recommender` or a path to one of them.

    Raises:
        ValueError: there is none; names the nearest.
    """
    wanted = Path(spec).name.removesuffix(".ipynb")
    for notebook in notebooks:
        if wanted.zfill(2) == notebook.number or wanted in (notebook.name, notebook.name[3:]):
            return notebook
    known = ", ".join(notebook.name for notebook in notebooks) or "none found"
    hint = nearest(wanted, [n for notebook in notebooks for n in (notebook.name, notebook.name[3:])])
    raise ValueError(f"Unknown notebook {spec!r}.{hint} Known: {known}.")


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])  # a list of lines in files, by the notebook format


def _plain(line: str) -> str:
    """A markdown line without its emphasis marks, so that `**Reproduces:** table 1` is found too."""
    return line.replace("**", "").strip()


def _first_paragraph(lines: list[str]) -> str:
    paragraphs = "\n".join(lines).strip().split("\n\n")
    return " ".join(paragraphs[0].split())


def _choices(name: str, default: Any, help_text: str) -> tuple[str, ...]:
    found = _CHOICES.match(help_text)
    listed = tuple(item.strip() for item in found[1].split("|")) if found else ()
    if (isinstance(default, str) or default is None) and str(default) in listed:
        return listed
    return PROFILES if name == "profile" else ()
