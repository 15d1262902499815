"""Memory: a training process reuses freed memory."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from pretrain.build import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(16):
    torch.ones(16 * 2**20).add_(1)  # 64 MB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if turn == 11:
        before = faults
print(faults - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_blocks_are_not_faulted_in_again() -> None:
    given, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True).stdout)
        for what in ("give", "keep")
    )
    assert kept < 1000 < given  # 4 x 16,384 pages of 4 kB
