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


POOLS = """
import ctypes, threading
import numpy as np
import pyarrow as pa
from tml.memory import keep_freed_memory
assert keep_freed_memory()
together = threading.Barrier(4)
def allocate():
    blocks = [np.ones(5000) for _ in range(50)]
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(pa.default_memory_pool().backend_name, flush=True)
library = ctypes.CDLL(None)
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
library.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_threads_and_arrow_share_one_pool() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", POOLS], cwd=root, capture_output=True, text=True, check=True
    )
    arrow, pools = done.stdout.split("\n", 1)
    assert arrow == "system"
    assert pools.count("<heap nr=") < 4, "four threads have pools of their own"
