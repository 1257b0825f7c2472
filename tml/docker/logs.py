"""The verb `logs`: what the containers of a job say, while it runs and afterwards.

A job that keeps its output (all but a `run` on a terminal) is read from those files: they go on
through restarts and outlive the containers, and secrets in them are stars. Others, and --timestamps
of a job that runs and has no secrets, are read from the engine.

    logs --json   one JSON object a line: {job, member, stream, line, time}; stream (stdout or
                  stderr) and time (RFC 3339) are null where only the kept file tells
"""

import argparse
import heapq
import json
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tml.docker import jobs, records, secrets, terminal
from tml.docker.container import in_thread
from tml.docker.errors import LauncherError
from tml.docker.jobs import POLL_S, Job, Member
from tml.docker.output import mask
from tml.docker.prefix import Printer, Stream

if TYPE_CHECKING:
    from docker import APIClient

BROKEN_PIPE = 141
"""Exit status, as a program has that SIGPIPE ended."""
CHUNK = 1 << 16
IN_FLIGHT_S = 5.0
"""What the engine noted so long before a launcher's last write has reached its logs."""
CLOCK_STEP_S = 0.1
"""A file's time may be so much before the writing."""

Say = Callable[[str, Stream | None, bytes, str | None], None]
"""Takes member, stream, one line, time."""


def logs(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Print what a job's containers said; with -f go on until it ends."""
    if flags.tail is not None and flags.tail < 0:
        raise LauncherError(f"--tail {flags.tail}: expected 0 or more lines")
    client, known = jobs.find_all_that_can_be()
    job = jobs.choose(known, flags.job, ended=True)
    names = list(job.record.members if job.record else [m.member for m in job.members])
    chosen = jobs.choose_members(job, names, flags.role) if names else []
    kept = _kept(job, chosen)
    live = client is not None and (bool(job.members) or job.exists)
    wanted = live and (not kept or flags.timestamps or job.owned == "dead")
    # The engine has them as they were printed.
    shows_secrets = wanted and bool(kept) and client is not None and _has_secrets(client, job)
    from_engine = wanted and not shows_secrets
    if not from_engine and not kept:
        raise LauncherError(_nothing_kept(job))
    if shows_secrets:
        terminal.say(
            "tml: this job was given secrets; what its launcher kept has stars for them, but no "
            "times, and nothing from after the launcher's end"
        )
    elif flags.timestamps and not from_engine:
        terminal.say("tml: the kept output has no times; --timestamps is for jobs that run")
    printer = Printer(chosen, timestamps=flags.timestamps and from_engine)
    say = _json_lines(job.name) if flags.json else _plain_lines(printer)
    try:
        if from_engine and client is not None:
            _Engine(client, job, chosen, say, flags.tail).print(flags.follow)
        else:
            _print_files(job, kept, say, flags.tail, flags.follow)
    except BrokenPipeError:
        # Whoever read this has had enough. Python must not try to flush on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    _say_failure(job)
    return 0


def _say_failure(job: Job) -> None:
    """Of a job that has failed, why."""
    record = records.read(job.name, job.run_id) if job.record else None
    if record and record.state == "ended" and record.exit_code:
        first, *more = (record.post_mortem or record.cause or "").splitlines() or [""]
        # A program that refused to go on has said why: the post-mortem leaves that out.
        why = f": {record.cause}" if first and first == record.cause else ""
        terminal.say(f"tml: {job.name} ended with exit status {record.exit_code}{why}")
        for line in more:
            terminal.say(f"tml: {line}")


def _has_secrets(client: "APIClient", job: Job) -> bool:
    """Whether some container of a job was given secrets."""
    from docker.errors import NotFound

    for member in job.members:
        with suppress(NotFound):  # Removed in this moment.
            if secrets.are_in(client.inspect_container(member.id)["Config"]["Env"] or ()):
                return True
    return False


def _nothing_kept(job: Job) -> str:
    if job.record and job.record.logs:
        return f"{job.name}: its output is no longer in {job.record.logs}"
    return (
        f"{job.name} has ended and its output was not kept: it went to a terminal; that of all "
        "other jobs is in the run folder"
    )


def _json_lines(job: str) -> Say:
    lock = threading.Lock()

    def say(member: str, stream: Stream | None, line: bytes, time: str | None) -> None:
        text = line.decode(errors="replace")
        data = {"job": job, "member": member, "stream": stream, "line": text, "time": time}
        with lock:
            terminal.write_all(1, json.dumps(data).encode() + b"\n")

    return say


def _plain_lines(printer: Printer) -> Say:
    def say(member: str, stream: Stream | None, line: bytes, time: str | None) -> None:
        printer.line(member, stream or "stdout", line, time)

    return say


def _last_state(line: bytes) -> bytes:
    """What of a line one would see: a progress bar goes back and writes over itself."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _end_if_unread() -> None:
    """Raise BrokenPipeError where nobody reads our output any more, though there is none now."""
    poll = select.poll()
    poll.register(1, 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise BrokenPipeError


# Kept files


def _kept(job: Job, members: Sequence[str]) -> dict[str, Path]:
    """The members' logs, as far as there are any."""
    if job.record is None or job.record.logs is None:
        return {}
    folder = Path(job.record.logs)
    if not any((folder / f"{member}.log").exists() for member in job.record.members):
        return {}
    return {member: folder / f"{member}.log" for member in members}


def _print_files(
    job: Job, files: dict[str, Path], say: Say, tail: int | None, follow: bool
) -> None:
    readers = [_File(member, path, say) for member, path in files.items()]
    for reader in readers:
        reader.print_all(tail)
    while follow:
        # Looked at before the files are read: what was said before the end is in them then.
        over = jobs.is_over(job)
        for reader in readers:
            reader.print_new()
        if over:
            break
        _end_if_unread()
        time.sleep(POLL_S)
    for reader in readers:
        reader.close()


class _File:
    """One kept log, read as it grows."""

    def __init__(self, member: str, path: Path, say: Say) -> None:
        self.member, self.path, self.say = member, path, say
        self._file: BinaryIO | None = None
        self._rest = b""

    def print_all(self, tail: int | None) -> None:
        """Print what is there, or the last `tail` lines of it."""
        lines: deque[bytes] = deque(maxlen=tail)
        for line in self._lines():
            lines.append(line)
            if tail is None:
                self._say(lines.popleft())
        if tail is not None and self._rest:
            # What has no end of line yet is the last of them.
            if tail == 0:
                self._rest = b""
            elif len(lines) == tail:
                lines.popleft()
        for line in lines:
            self._say(line)

    def print_new(self) -> None:
        """Print the lines that came since."""
        for line in self._lines():
            self._say(line)

    def close(self) -> None:
        """Print what has no end of line."""
        if self._rest:
            self._say(self._rest)
        if self._file is not None:
            self._file.close()

    def _say(self, line: bytes) -> None:
        self.say(self.member, None, _last_state(line), None)

    def _lines(self) -> Iterator[bytes]:
        if self._file is None:
            try:
                self._file = self.path.open("rb")
            except FileNotFoundError:
                return  # Its container has not started yet.
            except OSError as error:
                raise LauncherError(f"cannot read {self.path}: {error.strerror}") from error
        while data := self._file.read(CHUNK):
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from lines


# The engine


class _Engine:
    """What the engine has of a job's containers, one thread for each that is followed."""

    def __init__(
        self, client: "APIClient", job: Job, members: Sequence[str], say: Say, tail: int | None
    ) -> None:
        self.client, self.job, self.members, self.say, self.tail = client, job, members, say, tail
        self.unread = threading.Event()
        self.failed: list[Exception] = []

    def print(self, follow: bool) -> None:
        """Print what there is; with `follow` until the job has ended, also what containers say
        that take the place of those that failed.
        """
        now = self._wanted()
        if not follow:
            # By time; the lines of one member stay in their order.
            said = [self._read(member, self.tail, follow=False) for member in now]
            for time_, name, stream, line in heapq.merge(*said, key=lambda found: found[0]):
                self.say(name, stream, line, time_)
            return
        threads: dict[str, threading.Thread] = {}
        # Of containers that start while we watch, all lines are new.
        tail = self.tail
        while not self._is_over(now, threads):
            for member in now:
                if member.id not in threads and member.state != "created":
                    threads[member.id] = in_thread(self._follow, member, tail)
            tail = None
            if self.unread.is_set():
                raise BrokenPipeError
            if self.failed:
                raise LauncherError(f"lost the output of {self.job.name}: {self.failed[0]}")
            _end_if_unread()
            time.sleep(POLL_S)
            now = self._wanted()

    def _is_over(self, now: Sequence[Member], threads: dict[str, threading.Thread]) -> bool:
        if any(thread.is_alive() for thread in threads.values()):
            return False
        if any(member.id not in threads for member in now):
            return False
        # Nothing writes down how an attached job ends: it is over when its containers are.
        gone = not now and self.job.owned != "alive"
        return self.job.record is None or gone or jobs.is_over(self.job)

    def _wanted(self) -> list[Member]:
        now = jobs.look_again(self.client, self.job)
        return [member for member in now.members if member.member in self.members]

    def _follow(self, member: Member, tail: int | None) -> None:
        try:
            for time_, name, stream, line in self._read(member, tail, follow=True):
                self.say(name, stream, line, time_)
        except BrokenPipeError:
            self.unread.set()
        except Exception as error:
            if getattr(error, "status_code", None) not in (404, 409):
                self.failed.append(error)

    def _read(
        self, member: Member, tail: int | None, *, follow: bool
    ) -> Iterator[tuple[str, str, Stream, bytes]]:
        """(time, member, stream, line) of one container."""
        for time_, stream, line in _said(self.client, member, tail, follow=follow):
            yield time_, member.member, stream, _last_state(line)


def _said(
    client: "APIClient", member: Member, tail: int | None, *, follow: bool
) -> Iterator[tuple[str, Stream, bytes]]:
    """(time, stream, line) of one container, the line as it was written."""
    url = f"{client.base_url}/v{client.api_version}/containers/{member.id}/logs"
    asked = {"stdout": 1, "stderr": 1, "timestamps": 1, "follow": int(follow)}
    params = {**asked, "tail": "all" if tail is None else tail}
    tty = bool(client.inspect_container(member.id)["Config"]["Tty"])
    response = client.get(url, params=params, stream=True, timeout=None)
    if response.status_code == 404:
        return  # Removed in this moment.
    if response.status_code >= 400:
        raise LauncherError(
            f"the engine does not show what {member.container} said: {response.text.strip()}"
        )
    rest: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}
    times: dict[Stream, str] = {}
    for stream, piece in _messages(response.raw, tty):
        stamp, _, text = piece.partition(b" ")
        # A long line comes in pieces, each with the time of its beginning.
        times.setdefault(stream, stamp.decode(errors="replace"))
        rest[stream] += text
        if rest[stream].endswith(b"\n"):
            line, rest[stream] = rest[stream].removesuffix(b"\n"), b""
            yield times.pop(stream), stream, line
    for stream, line in rest.items():
        if line:
            yield times[stream], stream, line


def _messages(raw: Any, tty: bool) -> Iterator[tuple[Stream, bytes]]:
    """What the engine sends, one by one: a line, or a piece of a long one. A container with a
    terminal has one stream and no frames.
    """
    if tty:
        rest = b""
        for data in raw.stream(CHUNK):
            *lines, rest = (rest + data).split(b"\n")
            yield from (("stdout", line + b"\n") for line in lines)
        if rest:
            yield "stdout", rest
        return
    while len(header := raw.read(8)) == 8:
        data = raw.read(int.from_bytes(header[4:], "big"))
        yield ("stderr" if header[0] == 2 else "stdout"), data


# What a dead launcher did not keep


def secrets_of(client: "APIClient", member: Member) -> list[str] | None:
    """The values that a container was given as secrets; None where there are some, and they cannot
    be had: only while it runs can they be read, in it.
    """
    if not secrets.are_in(client.inspect_container(member.id)["Config"]["Env"] or ()):
        return []
    from docker.errors import APIError

    try:
        command = client.exec_create(member.id, ["cat", secrets.FILE], stderr=False)
        script = client.exec_start(command["Id"])
        if client.exec_inspect(command["Id"])["ExitCode"] == 0:
            return secrets.values_in(script)
    except (APIError, OSError):
        pass  # It has ended, or is paused.
    return None


def keep_rest(client: "APIClient", job: Job, member: Member, hidden: Sequence[str] | None) -> None:
    """Add to a member's log what it said after its launcher's death, before it is removed; hidden:
    what secrets_of returned.
    """
    if job.record is None or job.record.logs is None:
        return
    path = Path(job.record.logs) / f"{member.member}.log"
    try:
        kept_at = path.stat().st_mtime
        stars = mask(hidden or ())
        said = [
            (datetime.fromisoformat(time_).timestamp(), stars(line))
            for time_, _, line in _said(client, member, None, follow=False)
        ]
        lines = _not_kept(sorted(said, key=itemgetter(0)), kept_at, path)
        if lines and hidden is None:
            why = "it was given secrets, and had ended when this was written"
            lines = [f"tml: what it said after its launcher died is not kept: {why}".encode()]
        with path.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))
    except FileNotFoundError:
        return  # Somebody removed what was kept.
    except (OSError, LauncherError) as error:
        terminal.say(f"tml: cannot add to {path} what was said after the launcher died: {error}")


def _not_kept(said: Sequence[tuple[float, bytes]], kept_at: float, path: Path) -> list[bytes]:
    """The lines that are not in a log that was last written to at `kept_at`. What was said just
    before may or may not be.
    """
    earlier = [line for when, line in said if when <= kept_at - IN_FLIGHT_S]
    recent = said[len(earlier) :]
    num_unsure = sum(when <= kept_at + CLOCK_STEP_S for when, _ in recent)
    with path.open("rb") as file:
        ends = (line.removesuffix(b"\n") for line in file)
        kept = Counter(deque(ends, maxlen=len(earlier) + num_unsure)) - Counter(earlier)
    new = []
    for number, (_, line) in enumerate(recent):
        if number < num_unsure and kept[line]:
            kept[line] -= 1
        else:
            new.append(line)
    return new
