"""Where the compiled library comes from.

It is looked for in the virtual environment (the image and scripts/setup_venv.sh put it there), then
in the user's cache folder, into which it is compiled when it is first wanted. Without it torch does
the work, more slowly.
"""

import ctypes
import fcntl
import functools
import logging
import sys
from pathlib import Path

from tml.machines import environment
from tml.native.build import CompileError, compile_into, library_name

logger = logging.getLogger(__name__)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library; None, said once, where there is none."""
    if not environment.wants_native():
        return None
    try:
        return ctypes.CDLL(str(find_library()))
    except CompileError as error:
        reason = str(error)
        logger.debug("%s: %s", error, error.details)
    except OSError as error:  # of another C library, or no memory may be executed
        reason = str(error)
    logger.warning("rows are updated by torch, which takes longer: %s", reason)
    return None


def find_library() -> Path:
    """Its path; it is compiled where it is nowhere. CompileError where it cannot be."""
    name = library_name()
    installed = Path(sys.prefix) / "lib" / "tml" / name
    if installed.exists():
        return installed
    try:
        cached = environment.cache_home() / "tml" / name
    except ValueError as error:  # no home
        raise CompileError(str(error)) from error
    if cached.exists():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with (cached.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one compiles, the others wait
            return cached if cached.exists() else compile_into(cached.parent)
    except OSError as error:
        raise CompileError(f"{cached.parent} cannot be written: {error}") from error
