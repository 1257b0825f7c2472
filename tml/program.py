"""What programs share: the flag `--set`, and an end in which errors become a line and a code."""

import errno
import hashlib
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from tml.checkpoint import CheckpointError
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.distributed import ORPHANED
from tml.machines import environment
from tml.train import DivergedError

__all__ = ["ORPHANED", "add_overrides", "announce", "exit_code", "fail"]

PATIENCE_S = 2.0
"""How long a process waits for another one to say what is wrong for both."""
_LOST_PEER = (
    # gloo
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "Application timeout caused pair closure",
    # NCCL
    "ncclRemoteError",
    "remote process exited",
    # the store of the job, which is the chief's
    "Failed to recv, got 0 bytes",
    "failed to recv",
)
"""What torch says, in errors of several classes, when another process of the job has gone."""


def exit_code(run: Callable[[], int | None], where: Path | str | None = None) -> int:
    """Call `run`, which returns None or the number of the signal that stopped it; returns 0, 2 for
    what the caller can mend (said in one line on stderr), 128 + n when signal n stopped it,
    ORPHANED when another process of the job has gone.

    where: named when the system's error names no file.
    """
    try:
        stopped_by = run()
    except (ConfigError, DataError, CheckpointError, DivergedError) as error:
        return fail(str(error))
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or where}"
        if error.errno == errno.ENOSPC:
            what += "; make room and start the same command again"
        return fail(what)
    except KeyboardInterrupt:  # before or after what ends cleanly by itself
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if environment.world_size() == 1 or not any(said in str(error) for said in _LOST_PEER):
            raise
        return _orphaned()
    return 0 if stopped_by is None else 128 + stopped_by


def _orphaned() -> int:
    print(
        f"process {environment.rank()} lost the connection to another process of the job; "
        "what failed is said there",
        file=sys.stderr,
    )
    return ORPHANED


def role() -> environment.Role:
    """This process's role; raises ConfigError where the environment names none that there is."""
    try:
        return environment.spec_type()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def announce(what: str) -> None:
    """Say on stderr what begins now and takes its time; stdout is for results."""
    print(f"{what} …", file=sys.stderr, flush=True)


def add_overrides(parser: ArgumentParser, what: str = "change one setting") -> None:
    """Add `--set a.b=value`, which `tml.config.load_config` takes as overrides."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="a.b=value",
        help=f"{what}; repeatable",
    )


def fail(message: str) -> int:
    """Print `error: message` to stderr, unless another process of this torchrun did; returns 2."""
    note = _note_of(message)
    try:
        if note is not None:
            note.parent.mkdir(mode=0o700, exist_ok=True)
            note.touch(exist_ok=False)
    except FileExistsError:
        assert note is not None
        if _is_said(note):
            return 2
    except OSError:  # better said twice than not at all
        note = None
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"error: {message}", markup=False, style="red"
    )
    if note is not None:
        with suppress(OSError):
            note.write_text("said")
    return 2


def _note_of(message: str) -> Path | None:
    """The file by which processes of one torchrun know who says it; None without a torchrun."""
    folder = environment.get(environment.TML_SAID)
    return Path(folder) / hashlib.blake2b(message.encode()).hexdigest()[:32] if folder else None


def _is_said(note: Path) -> bool:
    """Whether the process that was first has come to say it, as it does in a moment."""
    ends_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends_at:
        try:
            if note.stat().st_size:
                return True
        except OSError:
            return False
        time.sleep(0.01)
    return False
