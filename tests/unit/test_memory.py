"""What glibc does with freed memory."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from tml.memory import keep_freed_memory
    assert keep_freed_memory()
def touch():
    block = np.empty(1 << 25, dtype=np.uint8)
    block[:: 4096] = 1
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Page faults of using 32 MiB five times anew."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "NUMPY_MADVISE_HUGEPAGE": "0"},
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_block_that_was_freed_is_used_again_without_page_faults() -> None:
    assert faults("default") > 5 * 8000
    assert faults("keep") < 2000
