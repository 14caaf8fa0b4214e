"""The environment check finds what is missing or too old."""

import tomllib

import pytest

from moe_lab.installed import Needed, requirements
from moe_lab.paths import project_root


def test_requirements_are_those_of_pyproject_without_the_extras():
    project = tomllib.loads((project_root() / "pyproject.toml").read_text())["project"]
    if {each.name for each in requirements()} != {"python", *(line.split(">=")[0] for line in project["dependencies"])}:
        pytest.fail("the installed metadata are older than pyproject.toml: install again (pip install -e .)")


def test_python_comes_first_and_is_new_enough():
    python = requirements()[0]
    assert (python.name, python.wanted, python.met) == ("python", ">=3.11", True)


@pytest.mark.parametrize(
    ("found", "met"), [("2.11", True), ("2.13.0+cpu", True), ("3.0.dev1", True), ("2.10.9", False), ("", False)]
)
def test_a_version_is_compared_by_meaning_not_as_text(found, met):
    assert Needed("torch", ">=2.11", found).met is met


def test_a_package_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="not installed"):
        requirements("no-such-package-at-all")
