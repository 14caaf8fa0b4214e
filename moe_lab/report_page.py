"""One executed notebook as one HTML file: figures and formulas inside, code folded, readable offline.

nbconvert's own pages ask the network for MathJax and require.js. Here formulas become MathML, which browsers draw
themselves (what the converter does not know stays LaTeX source), and there is no script at all; a widget needs a kernel
and is replaced by a line that says so.
"""

from __future__ import annotations

import html
from typing import Any

from latex2mathml.converter import convert as latex_to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

_WIDGET = "application/vnd.jupyter.widget-view+json"

# Folds code away; open where it is short and says what was run (parameters), or where it failed.
_TEMPLATE = """{%- extends 'classic/base.html.j2' -%}
{%- block input -%}
{%- set tags = cell.metadata.get('tags', []) -%}
{%- set failed = cell.outputs | selectattr('output_type', 'equalto', 'error') | list -%}
<details {% if failed or 'parameters' in tags or 'injected-parameters' in tags %}open{% endif %}>
<summary>code, In [{{ cell.execution_count or ' ' }}]</summary>
{{ cell.source | highlight_code(metadata=cell.metadata) }}
</details>
{%- endblock input -%}
"""

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
pre, code { font: 13px/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; margin: .4rem 0; }
img { max-width: 100%; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; margin: .8rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }
summary { color: #555; font-size: 13px; cursor: pointer; }
details > div, details > pre { background: #f6f6f6; padding: .3rem .8rem; border-left: 3px solid #ccc; }
.output_error pre { background: #fbeceb; padding: .5rem; }
.prompt, .anchor-link { display: none; }
.figures img { max-width: 19rem; margin: .3rem; border: 1px solid #ddd; vertical-align: top; }
.failed, .interrupted, .incomplete { color: #a11; font-weight: 600; }
.note { color: #555; font-size: 14px; }
"""


def page(title: str, body: str) -> str:
    """A complete HTML document with the report's style; `body` is HTML, `title` is text."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_CSS}{HtmlFormatter().get_style_defs('.highlight')}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def notebook_page(notebook: NotebookNode, title: str) -> str:
    """HTML of an executed notebook, self-contained."""
    body, _ = _Exporter(raw_template=_TEMPLATE).from_notebook_node(_without_widgets(notebook))
    return page(title, f'<p class="note"><a href="index.html">All notebooks</a></p>\n{body}')


class _Exporter(HTMLExporter):
    """nbconvert's HTML with formulas as MathML."""

    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _MathMLRenderer(escape=False, attachments=attachments, embed_images=True)
        return MarkdownWithMath(renderer=renderer).render(source)

    markdown2html.jinja_pass_arg = HTMLExporter.markdown2html.jinja_pass_arg


class _MathMLRenderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return _mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def _mathml(latex: str, display: str) -> str:
    try:
        return latex_to_mathml(latex, display=display)
    except Exception:  # the converter has a dozen kinds of errors; the source is readable too, and nothing is lost
        mark = "$$" if display == "block" else "$"
        return f"<code>{html.escape(mark + latex + mark)}</code>"


def _without_widgets(notebook: NotebookNode) -> NotebookNode:
    """A copy whose widgets are a line of text; progress bars are left out."""
    notebook = notebook.copy()
    notebook.metadata = {key: value for key, value in notebook.metadata.items() if key != "widgets"}
    notebook.cells = [cell.copy() for cell in notebook.cells]
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        widgets = [output for output in outputs if _WIDGET in output.get("data", {})]
        kept = [output for output in outputs if output not in widgets]
        if any(str(output["data"].get("text/plain", "")).startswith("interactive(") for output in widgets):
            note = {"text/plain": "(A slider: it needs a running notebook, `make lab`. The static view is beside it.)"}
            kept.append(NotebookNode(output_type="display_data", data=NotebookNode(note), metadata=NotebookNode()))
        if "outputs" in cell:
            cell.outputs = kept
    return notebook
