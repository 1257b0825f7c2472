"""Our programs as processes, as people start them, without the seconds in which each of them would
import torch: `run` and `start` stand for subprocess's `run` and `Popen` of `sys.executable`.

Each is a fork of a process that has imported what is not ours (tests/fork_server.py), started once
per process of tests; and so is each rank that tml.torchrun starts (tests/rank.py).
"""

import atexit
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from tests.rank import ask

REPOSITORY = Path(__file__).resolve().parents[1]


def torchrun(ranks: int, always: bool = False) -> list[str]:
    """What stands before a script for so many ranks; nothing for one, unless with `always`."""
    if ranks == 1 and not always:
        return []
    return ["-m", "tml.torchrun", "--standalone", "--nproc_per_node", str(ranks)]


def run(
    *argv: str, timeout_s: float = 240, **env: str | None
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end. argv: the words after `python`. env: changes of this process's own
    environment; None takes a name out.
    """
    program = start(*argv, **env)
    try:
        output, errors = program.communicate(timeout_s)
    finally:
        program.kill()
    return subprocess.CompletedProcess(list(argv), program.wait(), output, errors)


def start(*argv: str, log: Path | None = None, fork: bool = True, **env: str | None) -> "Program":
    """Start a program, as `run` does.

    log: takes what it writes to stdout and to stderr; without one `communicate` returns that.
    fork: false where Python's own start, or what precedes the import of torch, is what is tested.
    """
    return Program(argv, log, fork, env)


class Program:
    """A process, with what subprocess.Popen has for one."""

    def __init__(
        self, argv: tuple[str, ...], log: Path | None, fork: bool, env: dict[str, str | None]
    ) -> None:
        self.argv = argv
        self.returncode: int | None = None
        self._process: subprocess.Popen[str] | None = None
        # They stay open as long as it may be asked what it wrote.
        if log is None:
            self._streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        else:
            self._streams = [log.open("w+")] * 2
        with open(os.devnull) as nothing:
            streams = [nothing.fileno(), *(stream.fileno() for stream in self._streams)]
            if fork:
                path = _server()
                given = _environment({"PYTHON_EXEC": f"{path}.python", **env})
                self._connection, self.pid = ask(
                    path, streams, argv=argv, env=given, cwd=os.getcwd(), tied=False
                )
                return
            stdin, stdout, stderr = streams
            self._process = subprocess.Popen(
                [sys.executable, *argv],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=_environment(env),
                text=True,
            )
            self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, where it has ended."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit status."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.argv, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it wrote to stdout and to stderr."""
        self.wait(timeout)
        return self._written(0), self._written(1)

    def said(self) -> str:
        """What it has written to stdout so far."""
        return self._written(0)

    def _written(self, stream: int) -> str:
        # It goes on writing where it is, so that place is not to be moved.
        number = self._streams[stream].fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode()

    def catches(self, number: int) -> bool:
        """Whether it has a handler for a signal by now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (number - 1) & 1)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL, and its ranks where it is torchrun."""
        if self.poll() is not None:
            return
        ranks = psutil.Process(self.pid).children()
        self.send_signal(signal.SIGKILL)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        psutil.wait_procs(ranks)
        self.wait()

    def _ended(self, timeout: float | None) -> int | None:
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.returncode = self._process.wait(timeout)
        elif self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._connection.recv(64)))
        return self.returncode


@cache
def _server() -> str:
    """The socket of this process's server; beside it lies what stands for Python in ranks."""
    folder = tempfile.TemporaryDirectory(prefix="tml-tests-")
    path = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        number = str(listener.fileno())
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), number],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # What torchrun sets for its ranks before torch is loaded.
            env=_environment({"TORCH_CPP_LOG_LEVEL": "ERROR"}),
            pass_fds=[listener.fileno()],
        )
    words = [sys.executable, "-IS", str(Path(__file__).with_name("rank.py")), path]
    python = Path(f"{path}.python")
    python.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    python.chmod(0o755)

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return path


def _environment(changes: dict[str, str | None]) -> dict[str, str]:
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    merged = {**os.environ, **own, **changes}
    return {name: value for name, value in merged.items() if value is not None}
