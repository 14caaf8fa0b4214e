"""Results: one saved file per run (`Result`), read back instead of computed again (`run_cached`), found, tabulated."""

from moe_lab.results.result import Result, run_cached
from moe_lab.results.tables import find_results, to_frame

__all__ = ["Result", "find_results", "run_cached", "to_frame"]
