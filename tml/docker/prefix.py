"""Output of several containers on one terminal: whole lines, `chief | ` or `worker-1 | ` before
each, each container in its colour. `up` and `logs` print with it.
"""

import datetime
import os
import threading
from collections.abc import Sequence
from typing import Literal

from tml.docker import terminal
from tml.machines import environment

Stream = Literal["stdout", "stderr"]

COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
"""ANSI numbers, taken in turn; red is left to those who report errors."""
LONGEST_LINE = 1 << 20
"""Bytes of a line without an end that are held back; what is longer is printed in pieces."""
_DESCRIPTORS: dict[Stream, int] = {"stdout": 1, "stderr": 2}


class Printer:
    """Prints bytes of several members, from several threads, in whole lines; those of stderr go to
    stderr.

    A single member has no prefix. `colour`: None is "where stdout is a terminal". A reader that has
    gone shows as BrokenPipeError.
    """

    def __init__(
        self, members: Sequence[str], *, timestamps: bool = False, colour: bool | None = None
    ) -> None:
        coloured = _colour_wanted() if colour is None else colour
        self.timestamps = timestamps
        width = max(map(len, members), default=0)
        self._prefixes = {
            member: _prefix(member.ljust(width), number, coloured) if len(members) > 1 else b""
            for number, member in enumerate(members)
        }
        self._rest: dict[tuple[str, Stream], bytearray] = {}
        self._lock = threading.Lock()

    def write(self, member: str, stream: Stream, data: bytes, time: str | None = None) -> None:
        """Print the lines that `data` completes, and keep the rest of it for later."""
        with self._lock:
            rest = self._rest.setdefault((member, stream), bytearray())
            rest += data
            end = rest.rfind(b"\n") + 1
            if not end and len(rest) < LONGEST_LINE:
                return
            lines = bytes(rest[:end]) if end else bytes(rest)
            del rest[: len(lines)]
            self._print(member, stream, lines.removesuffix(b"\n").split(b"\n"), time or now())

    def line(self, member: str, stream: Stream, line: bytes, time: str | None = None) -> None:
        """Print one line, given without its end; `time` is when it was said, if not now."""
        with self._lock:
            self._print(member, stream, [line], time or now())

    def end(self, member: str) -> None:
        """No more comes from `member`: print what it said without an end of line."""
        with self._lock:
            for stream in _DESCRIPTORS:
                if rest := self._rest.pop((member, stream), None):
                    self._print(member, stream, bytes(rest).split(b"\n"), now())

    def _print(self, member: str, stream: Stream, lines: list[bytes], time: str) -> None:
        before = self._prefixes.get(member, b"")
        if self.timestamps:
            before += f"{time} ".encode()
        # A progress bar's carriage returns would write over the prefix: each state is a line.
        parts = [part for line in lines for part in line.rstrip(b"\r").split(b"\r")]
        text = b"".join(before + part + b"\n" for part in (parts if before else lines))
        terminal.write_all(_DESCRIPTORS[stream], text)


def now() -> str:
    """The time as --timestamps shows it: UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _colour_wanted() -> bool:
    return os.isatty(1) and not environment.get(environment.NO_COLOR)


def _prefix(member: str, number: int, coloured: bool) -> bytes:
    text = f"{member} | "
    return (
        f"\x1b[{COLOURS[number % len(COLOURS)]}m{text}\x1b[0m".encode()
        if coloured
        else text.encode()
    )
