"""How the C library hands memory out: what training on processors gains by."""

import ctypes

import pyarrow as pa

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let memory that is freed from now on stay with this process, to be given out again; what was
    freed before goes back to the system. Called when all is built, before the first step.

    By default glibc returns every large block to the system when it is freed and gets it anew, page
    by page, with the next allocation: 46,000 page faults a step for a model of 48 million
    parameters, whose gradients are freed at each step; at a batch of 128 a fifth of the time. The
    process then holds the most that it ever needed, of one pool for threads that are started from
    now on: what one thread frees serves the others too. Arrow, which has an allocator of its own,
    takes part. Returns whether the C library is one that knows the settings.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError):  # not glibc
        return False
    pa.set_memory_pool(pa.system_memory_pool())
    trim(0)
    never = -1  # as an unsigned size: more than there is
    # mallopt answers 1 for yes.
    return bool(
        mallopt(_M_MMAP_MAX, 0)
        and mallopt(_M_TRIM_THRESHOLD, never)
        and mallopt(_M_TOP_PAD, 1 << 26)
        and mallopt(_M_ARENA_MAX, 1)
    )
