"""A cache folder for each test."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder that MOE_LAB_DATA points to."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("MOE_LAB_DATA", str(folder))
    return folder
