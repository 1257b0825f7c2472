"""Where the compiled library comes from.

It is looked for in the virtual environment (the image and scripts/setup_venv.sh put it there), then
in the user's cache folder, into which it is compiled when it is first wanted. Without it torch does
the work, more slowly.
"""

import _ctypes
import ctypes
import fcntl
import functools
import logging
import sys
from pathlib import Path

from tml.machines import environment
from tml.native.build import CompileError, compile_into, library_name

logger = logging.getLogger(__name__)

FUNCTIONS = ("tml_update_rows", "tml_hide", "tml_softmax", "tml_pairs", "tml_derive_pairs")
"""What the C files define."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library; None, said once, where there is none."""
    if not environment.wants_native():
        return None
    try:
        path = find_library()
        try:
            return _load(path)
        except OSError as error:
            if path == _installed():
                raise
            logger.debug("%s is damaged, it is made anew: %s", path, error)
            path.unlink(missing_ok=True)
            return _load(find_library())
    except CompileError as error:
        reason = str(error)
        logger.debug("%s: %s", error, error.details)
    except OSError as error:  # of another C library, or no memory may be executed
        reason = str(error)
    logger.warning("rows are updated by torch, which takes longer: %s", reason)
    return None


def _load(path: Path) -> ctypes.CDLL:
    """OSError where it is no library, or none of ours."""
    library = ctypes.CDLL(str(path))
    missing = [name for name in FUNCTIONS if not hasattr(library, name)]
    if missing:
        _ctypes.dlclose(library._handle)  # or what is made under this name would be this one again
        raise OSError(f"{path}: without {', '.join(missing)}")
    return library


def _installed() -> Path:
    """Where the image and scripts/setup_venv.sh put it."""
    return Path(sys.prefix) / "lib" / "tml" / library_name()


def find_library() -> Path:
    """Its path; it is compiled where it is nowhere. CompileError where it cannot be."""
    installed = _installed()
    if installed.exists():
        return installed
    name = installed.name
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
            if not cached.exists():
                logger.debug("compiling %s", cached)
                compile_into(cached.parent)
            return cached
    except OSError as error:
        raise CompileError(f"{cached.parent} cannot be written: {error}") from error
