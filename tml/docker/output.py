"""What the containers of a job say: shown in whole lines with their names before, kept in a file
each, the last lines remembered. Values of secrets are stars in all three.
"""

import datetime
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from tml.docker import terminal
from tml.docker.evidence import LINES_WANTED
from tml.docker.plan import Plan
from tml.docker.prefix import Printer, Stream

LONGEST_LINE = 1 << 16
"""Bytes of a line without an end that are held back; what is longer is shown in pieces."""
PROGRESS_EVERY_S = 5.0
"""A progress bar writes over its own line; of its states one is shown in so much time."""
SHORTEST_SECRET = 4
"""Shorter values are found everywhere: stars for them would only garble the output."""


class Output:
    """The output of all members of one job, through restarts.

    `on_broken` is called when whoever read our own output has gone.
    """

    def __init__(
        self,
        members: Sequence[Plan],
        *,
        logs: str | None,
        show: bool,
        timestamps: bool,
        on_broken: Callable[[], None],
    ) -> None:
        self.printer = Printer([plan.member for plan in members], timestamps=timestamps)
        self.show, self.on_broken = show, on_broken
        self.mask = mask(v.value for plan in members for v in plan.env if v.secret)
        self._lock = threading.Lock()
        self._told_of_logs = False
        self._logs = logs
        self._files = {plan.member: self._open(plan.member) for plan in members}

    @property
    def kept_in(self) -> str | None:
        """The folder that has the logs; None where they are not kept, or not whole."""
        return None if self._told_of_logs else self._logs

    def channel(self, member: str) -> "Channel":
        """Where one container's bytes go."""
        return Channel(self, member)

    def print(self, member: str, stream: Stream, lines: bytes) -> None:
        """Show whole lines."""
        if not self.show:
            return
        try:
            self.printer.write(member, stream, lines, _local_time())
        except BrokenPipeError:
            self.show = False
            self.on_broken()
        except OSError:
            self.show = False  # The terminal has gone; the signal that says so is on its way.

    def keep(self, member: str, data: bytes) -> None:
        """Write to the member's log. What the disk does not take is lost, and the job goes on."""
        file = self._files[member]
        if file is None:
            return
        try:
            file.write(data)
        except OSError as error:
            self._no_logs(error)

    def mark(self, text: str) -> None:
        """A line of ours in all logs, such as where a new attempt begins."""
        for member in self._files:
            self.keep(member, f"tml: {text}\n".encode())

    def close(self) -> None:
        """Close the logs."""
        for member, file in self._files.items():
            if file is not None:
                # Somebody may still have something to write: that is lost.
                self._files[member] = None
                file.close()

    def _open(self, member: str) -> BinaryIO | None:
        if self._logs is None:
            return None
        try:
            Path(self._logs).mkdir(parents=True, exist_ok=True)
            return (Path(self._logs) / f"{member}.log").open("ab", buffering=0)
        except OSError as error:
            self._no_logs(error)
            return None

    def _no_logs(self, error: OSError) -> None:
        with self._lock:
            told, self._told_of_logs = self._told_of_logs, True
        if not told:
            terminal.say(
                f"tml: cannot keep the output in {self._logs}: {error.strerror}; the job goes on "
                "without that"
            )


class Channel:
    """The bytes of one container, put together to lines. One thread feeds it."""

    def __init__(self, output: Output, member: str) -> None:
        self.output, self.member = output, member
        self.last_lines: deque[str] = deque(maxlen=LINES_WANTED)
        self._rest: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}
        self._shown_at = time.monotonic()

    def feed(self, stream: Stream, data: bytes) -> None:
        """Take what came; lines that it completes are shown, kept and remembered."""
        held = self._rest[stream] + data
        end = held.rfind(b"\n") + 1
        if not end and len(held) >= LONGEST_LINE:
            held, end = held + b"\n", len(held) + 1
        self._rest[stream] = held[end:]
        if end:
            self._take(stream, held[:end])
        elif b"\r" in held and time.monotonic() - self._shown_at >= PROGRESS_EVERY_S:
            # The states so far; nothing of the next one is there yet, or all of it is.
            self._rest[stream] = b""
            self._take(stream, held.rstrip(b"\r") + b"\n")

    def finish(self) -> None:
        """No more comes: take what has no end of line."""
        for stream, rest in self._rest.items():
            if rest:
                self._rest[stream] = b""
                self._take(stream, rest + b"\n")

    def _take(self, stream: Stream, lines: bytes) -> None:
        lines = self.output.mask(lines)
        self.output.keep(self.member, lines)
        # A carriage return goes back to the line's start: what stands last is what one would see.
        if b"\r" in lines:
            lines = b"".join(
                line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for line in lines[:-1].split(b"\n")
            )
        self._shown_at = time.monotonic()
        self.last_lines.extend(lines[:-1].decode(errors="replace").split("\n"))
        self.output.print(self.member, stream, lines)


def _local_time() -> str:
    return datetime.datetime.now().strftime("%H:%M:%S.%f")[:-3]


def mask(secrets: Iterable[str]) -> Callable[[bytes], bytes]:
    """What puts stars for secrets. Of a secret of several lines, each line is one."""
    words = {
        line.encode()
        for secret in secrets
        for line in secret.splitlines()
        if len(line) >= SHORTEST_SECRET
    }
    if not words:
        return lambda text: text
    # The longest first: a secret may begin as another does.
    pattern = re.compile(b"|".join(map(re.escape, sorted(words, key=len, reverse=True))))
    return lambda text: pattern.sub(b"***", text)
