"""Freed memory is kept: the same block again costs no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moe_lab.allocator import keep_freed_memory

COUNT_FAULTS = """
import resource, sys, torch
from moe_lab.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(20):
        blocks = [torch.ones(2**20) for _ in range(4)]  # 4 MB each
        del blocks
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not keep_freed_memory(), reason="needs glibc")
def test_blocks_of_megabytes_are_used_again_without_page_faults():
    # glibc may raise its threshold by itself, which would hide the difference: the variable pins it for both modes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", COUNT_FAULTS, mode]
        faults[mode] = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert faults["return"] >= 80  # at least one for each of the 80 blocks, with the largest pages
    assert faults["keep"] < 20
