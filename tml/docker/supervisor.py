"""A job in the background: `--detach`. A process of its own, out of reach of the caller's terminal,
carries the gang out, and removes everything in the end; the caller hears that it runs, or why not.

It is a fork of the launcher, so what the plan holds, secrets too, stays in memory.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from tml.docker import signals
from tml.docker.errors import ENGINE_FAILED, LauncherError
from tml.docker.plan import Gang

LOG = "launcher.log"
NEVER_RAN = "the job ended in the background before its containers ran"


def start(gang: Gang, endpoint: str, verb: Literal["run", "up"]) -> int:
    """Have the gang carried out in the background; returns once its containers run. Prints the
    job's name.
    """
    log = _open_log(gang.logs)
    ours, theirs = os.pipe()
    # What is buffered would be written by both.
    sys.stdout.flush()
    sys.stderr.flush()
    # Who is interrupted must know whom to stop: until then signals wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        os.close(ours)
        _become_daemon(gang, endpoint, verb, theirs, log, before)
    os.close(theirs)
    os.close(log)
    os.waitpid(child, 0)
    with open(ours) as told:
        first = told.readline()
        if not first:
            raise LauncherError(NEVER_RAN)
        supervisor = int(json.loads(first)["supervisor"])
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _wait_until_running(told)
            # From here on the end of our terminal is not the job's.
            signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
        except (KeyboardInterrupt, SystemExit):
            # It is in a session of its own, where our terminal's Ctrl-C does not reach it.
            with contextlib.suppress(OSError):
                os.kill(supervisor, signal.SIGTERM)
            raise
    print(gang.job, flush=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    python = "python -m tml.docker"
    logging.info("follow it: %s logs -f %s", python, gang.job)
    logging.info("wait for its end: %s wait %s; stop it: %s stop %s", *(python, gang.job) * 2)
    return 0


def _open_log(logs: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        Path(logs).mkdir(parents=True, exist_ok=True)
        return os.open(f"{logs}/{LOG}", flags, 0o644)
    except OSError as error:
        logging.warning("cannot keep the output in %s: %s", logs, error.strerror)
        return os.open(os.devnull, os.O_WRONLY)


def _wait_until_running(lines: Iterable[str]) -> None:
    """Until the supervisor says that all runs; raises what it says instead."""
    for line in lines:
        told: dict[str, Any] = json.loads(line)
        if told.get("running"):
            return
        if "error" in told:
            raise LauncherError(told["error"], told["code"])
    raise LauncherError(NEVER_RAN)


# The supervisor's own process


def _become_daemon(
    gang: Gang,
    endpoint: str,
    verb: Literal["run", "up"],
    pipe: int,
    log: int,
    mask: Iterable[int],
) -> NoReturn:
    """In the first child: a session without a terminal, and a second child that does the work."""
    code = ENGINE_FAILED
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        _redirect(log)
        _tell(pipe, supervisor=os.getpid())
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = _supervise(gang, endpoint, verb, pipe)
    except BaseException:
        logging.exception("the supervisor of %s ended", gang.job)
    finally:
        os._exit(code)


def _redirect(log: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for descriptor in (null, log):
        os.close(descriptor)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s tml: %(message)s"))


def _supervise(gang: Gang, endpoint: str, verb: Literal["run", "up"], pipe: int) -> int:
    from tml.docker import gang as gangs
    from tml.docker.connection import connect

    runs = False

    def on_running() -> None:
        nonlocal runs
        runs = True
        logging.info("%s runs: %s", gang.job, ", ".join(m.member for m in gang.members))
        _tell(pipe, running=True)
        os.close(pipe)

    try:
        # The parent's connections are the parent's.
        client, _ = connect()
        told = gangs.Told(verb=verb, endpoint=endpoint, show=False, on_running=on_running)
        code = gangs.run(client, gang, told)
    except LauncherError as error:
        logging.error("%s", error)
        # Later the number of the pipe may be that of another file.
        if not runs:
            _tell(pipe, error=str(error), code=error.exit_code)
        return error.exit_code
    logging.info("%s ended with exit code %d", gang.job, code)
    return code


def _tell(pipe: int, **what: Any) -> None:
    """Tell the parent, if it still listens."""
    with contextlib.suppress(OSError):
        os.write(pipe, json.dumps(what).encode() + b"\n")
