"""A reader opens a notebook in a browser, runs it, moves a slider with the keyboard, and sees the figure change."""

import os
import re
import shutil

import jupyter_server
import pytest
from nbformat.v4 import new_markdown_cell
from tiny_notebooks import code, write_notebook

from moe_lab.paths import notebooks_dir, project_root

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(420),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

TINY = """\
import ipywidgets
import matplotlib.pyplot as plt

def view(depth=2):
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.bar(range(2**depth), [2.0**-depth] * 2**depth)
    plt.show()
"""


def _write_tiny(folder):
    cells = [
        new_markdown_cell("# 90 · Tiny"),
        code(TINY),
        code("view()"),
        code("ipywidgets.interact(view, depth=(1, 5));"),
    ]
    write_notebook(folder, "90_tiny", cells)


# Number of a notebook -> the slider that is moved.
SLIDERS = {"02": "depth", "09": "soft share", "12": "threshold", "15": "unevenness"}
NOTEBOOKS = [("90_tiny", "depth")]
NOTEBOOKS += [
    (path.stem, SLIDERS[path.stem[:2]]) for path in sorted(notebooks_dir().glob("*.ipynb")) if path.stem[:2] in SLIDERS
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    if notebooks_dir().is_dir():
        shutil.copytree(notebooks_dir(), root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    _write_tiny(root)
    with jupyter_server.jupyter_lab(root, scratch) as address_and_token:
        yield address_and_token


@pytest.fixture(scope="module")
def browser():
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=[*sandbox, *QUIET.split(), "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.mark.parametrize(("name", "moved"), NOTEBOOKS)
def test_moving_a_slider_with_the_keyboard_changes_the_figure(server, browser, name, moved):
    address, token = server
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    artefacts = project_root() / "test-artifacts"
    artefacts.mkdir(exist_ok=True)
    try:
        # a workspace of its own: the default one brings back the tabs of the test before, hidden
        page.goto(f"{address}lab/workspaces/{name}/tree/{name}.ipynb?token={token}", wait_until="domcontentloaded")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
        jupyter_server.wait_for_kernel(address, token, f"{name}.ipynb")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(state="attached")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=re.compile("^Run All Cells")).first.click()

        label = page.locator(".widget-label", has_text=re.compile(f"^{moved}$"))
        slider = page.locator(".widget-slider").filter(has=label)
        slider.wait_for(timeout=120_000)
        cell = page.locator(".jp-CodeCell").filter(has=slider)
        figure = cell.locator(".jp-RenderedImage img, .widget-output img, .widget-image").first
        figure.wait_for(timeout=60_000)
        jupyter_server.wait_for_kernel(
            address, token, f"{name}.ipynb", 150
        )  # all ran: only the slider draws from here on
        before = figure.get_attribute("src")
        readout = slider.locator(".widget-readout").inner_text()

        slider.scroll_into_view_if_needed()
        slider.locator("[role=slider]").focus()
        page.keyboard.press("ArrowRight")

        page.wait_for_function(
            "([cell, before]) => { const image = cell.querySelector('img'); return image && image.src !== before; }",
            arg=[cell.element_handle(), before],
            timeout=60_000,
        )
        assert slider.locator(".widget-readout").inner_text() != readout
        page.screenshot(path=artefacts / f"{name}.png")
    except Exception:
        page.screenshot(path=artefacts / f"{name}-failed.png")
        raise
    finally:
        page.close()
