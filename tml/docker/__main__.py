"""The launcher: `python -m tml.docker VERB`. flags.py has the verbs, `--help` teaches them.

Exit status of run, up, shell, test, exec: the container's own; 125 where the launcher or the engine
failed, 126 or 127 where the command could not start; 130 after Ctrl-C, 143 after SIGTERM; 2 for a
mistake in the flags.
"""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from tml.docker import flags as verbs
from tml.docker import signals
from tml.docker.errors import ENGINE_FAILED, LauncherError
from tml.machines import environment

ENGINES_ERRORS = ("docker.", "requests.", "urllib3.")
"""Whose exceptions mean that the engine refused, went away or was too slow. Not imported here: most
of the time that a verb takes would go into that.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one verb; returns the exit status."""
    if environment.get(environment.ARGCOMPLETE):
        from tml.docker.completion import complete

        complete()  # A shell asks for words; does not return.
    flags, args = verbs.parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="tml: %(message)s", stream=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    signals.as_exceptions()
    module, _, function = flags.function.partition(":")
    try:
        _need_home()
        # Imported only now: a verb pays for its own modules alone.
        code = int(getattr(importlib.import_module(module), function)(flags, args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone, as in `doctor | head`; Python would say so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LauncherError as error:
        print(f"tml: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tml: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not type(error).__module__.startswith(ENGINES_ERRORS):
            raise
        print(f"tml: the engine did not do what {flags.verb} asked: {error}", file=sys.stderr)
        return ENGINE_FAILED


def _need_home() -> None:
    try:
        environment.home()
    except ValueError as error:
        raise LauncherError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
