from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from prima_ray.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(20):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(16 * 1024 * 1024) for _ in range(2)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_that_was_freed_is_not_faulted_in_again():
    def faults(way: str) -> int:
        # In a process of its own: the setting is the process's.
        return int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, check=True).stdout)

    # Now and then the heap of one process grows a few steps later than usual, so the best of some counts.
    assert min(faults("keep") for _ in range(4)) * 100 < faults("give back")
