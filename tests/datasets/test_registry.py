"""The registry is complete, and data/README.md says the same."""

import re

import pytest

from moe_lab.datasets.readme import render
from moe_lab.datasets.registry import DATASETS, SOURCES, sources_of
from moe_lab.paths import project_root

FILES = [(name, file) for name, source in SOURCES.items() for file in (*source.files, *source.instead)]


def test_the_readme_is_the_registry():
    text = (project_root() / "data" / "README.md").read_text(encoding="utf-8")
    assert text == render(), "run `python -m moe_lab.datasets.readme`"


@pytest.mark.parametrize(("name", "file"), FILES, ids=[file.path for _, file in FILES])
def test_every_file_can_be_recognised_and_stays_in_the_cache(name, file):
    assert re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", file.checksum)
    assert file.size > 0
    assert not file.path.startswith("/") and ".." not in file.path
    assert all(url.startswith(("http://", "https://")) for url in file.urls)
    assert file.urls or file in SOURCES[name].instead


def test_no_two_files_share_a_place_or_a_checksum():
    assert len({file.path for _, file in FILES}) == len({file.checksum for _, file in FILES}) == len(FILES)


def test_every_data_set_names_known_sources_and_every_source_is_used():
    used = {source for entry in DATASETS.values() for source in entry.sources}
    assert used == set(SOURCES)
    assert list(sources_of("mnist-svhn")) == ["mnist", "svhn"]
    assert list(sources_of("svhn")) == ["svhn"]
