"""The verb `exec`: a command inside a container of a job that runs, on the caller's terminal or
pipes.

Its exit status is ours. A signal to us goes to everything that the command started, so that nothing
of it is left inside; the engine itself would leave it running.

    exec --json   {job, member, command, exit_code, stdout, stderr}, once the command has ended; it
                  has no terminal then
"""

import argparse
import json
import os
import queue
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from tml.docker import jobs, secrets, signals, terminal
from tml.docker.connection import connect
from tml.docker.container import in_thread
from tml.docker.errors import LauncherError
from tml.docker.jobs import POLL_S, Job, Member
from tml.docker.prefix import Stream
from tml.machines import environment

if TYPE_CHECKING:
    from docker import APIClient

CHUNK = 1 << 16
GRACE_S = 10.0
"""From the signal that was passed on to SIGKILL."""
NOT_STARTED = (b"OCI runtime exec failed", b"unable to find user", b"unable to find group")
"""How what the engine says begins, as output of a command that it could not start."""

SIGNAL_ALL = (
    'for p in /proc/[0-9]*; do grep -qzxF "$2" "$p/environ" 2>/dev/null && '
    'kill -s "$1" "${p#/proc/}" 2>/dev/null; done; true'
)
"""Sends $1 to all processes that have the variable $2: the command and what it started. That works
with engines on other machines, too, whose process numbers mean nothing here.
"""


def execute(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Run a command, or bash, inside a container of a job; returns its exit status."""
    client, _ = connect()
    job = jobs.choose(jobs.find_all(client), flags.job)
    member = _choose_member(job, flags.role)
    tty = terminal.is_terminal() and not flags.json
    command = tuple(args) or ("bash",)
    with _explained(job, member):
        run = _Run(client, member, command, user=flags.user or "", tty=tty, keep=flags.json)
        code = run.to_its_end()
    if flags.json:
        texts = {name: data.decode(errors="replace") for name, data in run.kept.items()}
        who = {"job": job.name, "member": member.member}
        print(json.dumps({**who, "command": command, "exit_code": code, **texts}, indent=2))
    return code


def _choose_member(job: Job, role: str) -> Member:
    if not job.members:
        raise LauncherError(f"{job.name}: no container of it runs ({job.state})")
    by_name = {member.member: member for member in job.members}
    chosen = jobs.choose_members(job, list(by_name), role)
    if len(chosen) > 1:
        raise LauncherError(f"--role {role} may be any of {', '.join(chosen)}: say which")
    member = by_name[chosen[0]]
    if not member.alive:
        raise LauncherError(f"{member.container}: the container does not run ({member.state})")
    return member


@contextmanager
def _explained(job: Job, member: Member) -> Iterator[None]:
    from docker.errors import APIError, DockerException

    try:
        yield
    except APIError as error:
        said = str(error.explanation).strip()
        raise LauncherError(f"the engine refused exec in {member.container}: {said}") from error
    except (DockerException, OSError) as error:
        raise LauncherError(f"lost the engine while exec ran in {job.name}: {error}") from error


@dataclass(frozen=True)
class _Event:
    kind: Literal["stop", "resize", "output-ended"]
    signal: int = 0


class _Run:
    """One command inside a container, from its start to its end."""

    def __init__(
        self,
        client: "APIClient",
        member: Member,
        command: Sequence[str],
        *,
        user: str,
        tty: bool,
        keep: bool,
    ) -> None:
        self.client, self.member, self.command = client, member, command
        self.user, self.tty, self.keep = user, tty, keep
        self.kept: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self.mark = f"{environment.TML_EXEC}={os.urandom(8).hex()}"
        self.refusal = b""
        self.stop_signal = 0
        self.kill_at = float("inf")
        # A job in the background may not read its terminal.
        self.stdin = tty or not os.isatty(0)
        self.id = self._create(self._command(), stdin=self.stdin, tty=tty, env=[self.mark])

    def to_its_end(self) -> int:
        """The exit status that the launcher should have."""
        with ExitStack() as stack:
            resized = (lambda: self.events.put(_Event("resize"))) if self.tty else None
            stack.enter_context(signals.as_calls(self._told, resized))
            reader, connection = self._start(self.id, self.tty)
            stack.callback(reader.close)
            in_thread(self._pump_output, reader)
            if self.tty:
                stack.enter_context(terminal.raw_mode())
                self._resize()
            if self.stdin:
                stop_read, stop_write = os.pipe()
                pump = in_thread(self._pump_input, connection, stop_read)
                # Run first of these: the thread lets go of stdin before the terminal is restored.
                stack.callback(pump.join, 1.0)
                stack.callback(os.close, stop_write)
            self._follow()
        return self._exit_code()

    def _command(self) -> list[str]:
        config = self.client.inspect_container(self.member.id)["Config"]
        given = secrets.are_in(config["Env"] or ())
        return secrets.wrapped(self.command) if given else list(self.command)

    def _create(
        self, command: Sequence[str], *, stdin: bool = False, tty: bool = False, env: Any = None
    ) -> str:
        made = self.client.exec_create(
            self.member.id,
            list(command),
            stdin=stdin,
            tty=tty,
            environment=env,
            user=self.user,
            # As of a container: the default would hold back every Ctrl-P.
            detach_keys="ctrl-_,ctrl-_,ctrl-_",
        )
        return str(made["Id"])

    def _start(self, identifier: str, tty: bool) -> tuple[BinaryIO, socket.socket]:
        """What is read from, and the connection, which is written to."""
        body: dict[str, Any] = {"Tty": tty, "Detach": False}
        if tty:
            body["ConsoleSize"] = list(terminal.window_size())
        response = self.client.post(
            f"{self.client.base_url}/v{self.client.api_version}/exec/{identifier}/start",
            json=body,
            headers={"Connection": "Upgrade", "Upgrade": "tcp"},
            stream=True,
        )
        response.raise_for_status()
        # Not docker-py's own way to the socket: it passes over this buffer, which may have taken
        # the first output together with the headers.
        raw: Any = response.raw
        reader = raw._fp.fp
        connection: socket.socket = reader.raw._sock
        connection.settimeout(None)
        self._response = response  # Whoever drops it closes the connection.
        return reader, connection

    def _told(self, number: int) -> None:
        self.events.put(_Event("stop", number))

    def _pump_output(self, reader: BinaryIO) -> None:
        wanted = True
        # The connection may be closed under us, when it is over.
        with suppress(OSError, ValueError):
            for stream, data in _messages(reader, self.tty):
                try:
                    if wanted:
                        self._take(stream, data)
                except BrokenPipeError:
                    # Whoever read our output has gone. Ours goes on being read, or the engine would
                    # wait for that and never say that the command has ended.
                    wanted = False
                    self._told(signal.SIGPIPE)
        self.events.put(_Event("output-ended"))

    def _take(self, stream: Stream, data: bytes) -> None:
        if (self.refusal or data).startswith(NOT_STARTED):
            self.refusal += data
        elif self.keep:
            self.kept[stream] += data
        else:
            terminal.write_all(2 if stream == "stderr" else 1, data)

    def _pump_input(self, connection: socket.socket, stop: int) -> None:
        try:
            terminal.pump_input(connection, None, stop)
        except OSError:
            # We have no stdin, or the command has gone.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        finally:
            os.close(stop)

    def _follow(self) -> None:
        output_ended = False
        while not (output_ended and not self._state()["Running"]):
            try:
                event = self.events.get(
                    timeout=POLL_S if output_ended or self.stop_signal else None
                )
            except queue.Empty:
                if time.monotonic() >= self.kill_at:
                    self._kill()
                if self.stop_signal and not self._state()["Running"]:
                    break
                continue
            if event.kind == "output-ended":
                output_ended = True
            elif event.kind == "resize":
                self._resize()
            elif self.stop_signal:
                self._kill()
            else:
                self._stop(event.signal)
        if self.stop_signal:
            self._kill()  # What it started and what did not end with it.

    def _stop(self, number: int) -> None:
        self.stop_signal, self.kill_at = number, time.monotonic() + GRACE_S
        # A shell on a terminal ignores SIGTERM, and ends when its terminal goes.
        names: dict[int, str] = {signal.SIGINT: "INT", signal.SIGHUP: "HUP"}
        self._signal_all("HUP" if self.tty else names.get(number, "TERM"))

    def _kill(self) -> None:
        self.kill_at = float("inf")
        self._signal_all("KILL")

    def _signal_all(self, name: str) -> None:
        from docker.errors import APIError

        # It may be over, with its container.
        with suppress(APIError):
            sender = self._create(["sh", "-c", SIGNAL_ALL, "sh", name, self.mark])
            self.client.exec_start(sender)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.client.exec_inspect(self.id)
        return state

    def _resize(self) -> None:
        from docker.errors import APIError

        with suppress(APIError, OSError):  # It has ended, or the terminal has gone.
            self.client.exec_resize(self.id, *terminal.window_size())

    def _exit_code(self) -> int:
        if self.stop_signal:
            return 128 + self.stop_signal
        state = self._state()
        code = int(state["ExitCode"])
        if self.refusal and not state["Pid"]:
            said = self.refusal.decode(errors="replace").strip()
            missing = "executable file not found" in said or "no such file" in said
            raise LauncherError(
                f"{self.member.container} could not start {self.command[0]}: {said}",
                127 if missing else code,
            )
        if self.refusal:
            terminal.write_all(1, self.refusal)
        return code


def _messages(reader: Any, tty: bool) -> Iterator[tuple[Stream, bytes]]:
    """What arrives, as it arrives; a terminal has one stream and no frames."""
    if tty:
        while data := reader.read1(CHUNK):
            yield "stdout", data
        return
    while len(header := reader.read(8)) == 8:
        length = int.from_bytes(header[4:], "big")
        while length and (data := reader.read1(min(length, CHUNK))):
            length -= len(data)
            yield ("stderr" if header[0] == 2 else "stdout"), data
