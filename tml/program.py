"""What programs share: the flag `--set`, and an end in which errors become a line and a code."""

import errno
import signal
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tml.checkpoint import CheckpointError
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.train import DivergedError

ORPHANED = 3
"""Exit code of a process that stopped because another one, which has said why, is gone."""


def exit_code(run: Callable[[], int | None], where: Path | str | None = None) -> int:
    """Call `run`, which returns None or the number of the signal that stopped it; returns 0, 2 for
    what the caller can mend (said in one line on stderr), 128 + n when signal n stopped it.

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
        if "closed by peer" not in str(error) and "Connection reset" not in str(error):
            raise
        return ORPHANED
    return 0 if stopped_by is None else 128 + stopped_by


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
    """Print `error: message` to stderr; returns 2."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"error: {message}", markup=False, style="red"
    )
    return 2
