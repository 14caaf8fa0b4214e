"""Is everything here that moe_lab needs? Asked by notebook 00, answered from the package's own metadata."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Needed:
    """One requirement: `wanted` is a range like ">=2.11", `found` a version, empty if the package is missing."""

    name: str
    wanted: str
    found: str

    @property
    def met(self) -> bool:
        """The version found lies in the range; a pre-release or a local build (2.13.0+cpu) counts."""
        return bool(self.found) and SpecifierSet(self.wanted).contains(self.found, prereleases=True)


def requirements(distribution: str = "moe-lab") -> list[Needed]:
    """Python and every package that must be installed to use `distribution`, extras left out.

    Raises:
        ValueError: the distribution itself is not installed.
    """
    try:
        about = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{distribution} is not installed for {sys.executable}; in the project's folder: pip install -e ."
        ) from None
    python = Needed("python", about.metadata.get("Requires-Python", ""), "{}.{}.{}".format(*sys.version_info[:3]))
    named = [Requirement(line) for line in about.requires or []]
    wanted = [each for each in named if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [python, *(Needed(each.name, str(each.specifier), _version(each.name)) for each in wanted)]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
