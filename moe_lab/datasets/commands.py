"""``moe-lab data list | fetch NAME | check``: the text they print, and their exit codes (0 fine, 1 not)."""

from __future__ import annotations

import sys

from moe_lab.datasets import cache, download
from moe_lab.datasets.registry import DATASETS, SOURCES, TASKS, sources_of
from moe_lab.datasets.sources import Entry
from moe_lab.paths import data_dir


def megabytes(n: int) -> str:
    """1_329_278_602 -> "1.3 GB"."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.0f} kB"


def list_command() -> int:
    """Print every data set: whether it can be loaded now, what it is, what must be downloaded."""
    print(f"Data sets (cache: {data_dir()})\n")
    _print_entries(DATASETS)
    print("\nText tasks (moe_lab.datasets.glue, squad)\n")
    _print_entries(TASKS)
    print("\n`moe-lab data fetch NAME` downloads, `moe-lab data check` compares checksums.")
    print("Sources, licences, citations: data/README.md")
    return 0


def _print_entries(entries: dict[str, Entry]) -> None:
    width = max(map(len, {**DATASETS, **TASKS}))
    for name, entry in entries.items():
        size = sum(file.size for source in entry.sources for file in SOURCES[source].files)
        if entry.yours:
            state = "yours"
        elif not entry.sources:
            state = "embedded"
        elif cache.is_available(name):
            copies = [copy for source in entry.sources if (copy := cache.lossy_copy(source))]
            state = f"here ({', '.join(copies)})" if copies else "here"
        else:
            state = f"fetch {megabytes(size)}"
        made_of = [source for source in entry.sources if source != name]
        note = f"; from {', '.join(made_of)}" if made_of else ""
        print(f"  {name:<{width}}  {state:<14}  {entry.summary} ({entry.used_for}{note})")


def fetch_command(name: str, mirror: str | None = None) -> int:
    """Download the files of NAME into the cache; say under which licence."""
    try:
        sources = sources_of(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not sources:
        own = name in DATASETS and DATASETS[name].yours
        print(f"{name}: " + ("bring your own text, path=..." if own else "embedded, nothing to download."))
        return 0
    for source in sources.values():
        size = sum(file.size for file in source.files)
        print(f"{source.title} ({megabytes(size)}), {source.homepage}")
        print(f"  Licence: {source.licence}\n  Cite: {source.citation}")
    try:
        paths = download.fetch(name, mirror)
    except download.DownloadFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"ok  {path}" for path in paths))
    return 0


def check_command() -> int:
    """Compare every file in the cache with its checksum; 1 if one is corrupt (a missing file is no error)."""
    report = download.check()
    corrupt = [status for status in report if status.state == "corrupt"]
    notes = {"unpacked": "  (unpacked by hand, not compared)", "corrupt": "  (checksum differs)"}
    for status in report:
        if status.needed or status.state != "missing":
            print(f"{status.state:<9} {status.source:<14} {status.path}{notes.get(status.state, '')}")
    if corrupt:
        commands = ", ".join(f"`moe-lab data fetch {name}`" for name in dict.fromkeys(s.source for s in corrupt))
        print(f"Remove the {len(corrupt)} corrupt file(s), then {commands}.", file=sys.stderr)
    return 1 if corrupt else 0
