"""The registry is complete, and data/README.md says the same."""

import re

import pytest

from moe_lab.datasets.readme import render
from moe_lab.datasets.registry import DATASETS, SOURCES, TASKS, sources_of
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
    used = {source for entry in (*DATASETS.values(), *TASKS.values()) for source in entry.sources}
    assert used == set(SOURCES)
    assert list(sources_of("mnist-svhn")) == ["mnist", "svhn", "svhn-extra"]
    assert list(sources_of("svhn")) == ["svhn"]


def test_a_data_set_that_shares_its_name_with_a_source_is_made_of_that_source_alone():
    for name in DATASETS.keys() & SOURCES.keys():
        assert sources_of(name) == {name: SOURCES[name]}


def test_a_lossy_file_is_a_stand_in_and_the_readme_says_what_results_on_it_are_named():
    lossy = [file for _, file in FILES if file.lossy]
    assert [file.path for file in lossy] == ["cifar10-jpeg.npz"]
    assert not any(file.lossy for source in SOURCES.values() for file in source.files)
    assert "where they are missing; lossy: results on it are named (JPEG)" in render()
