"""Standard streams between this process and a container: raw terminal, window size, bytes in both
directions.
"""

import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPT = b"\x03"
SUSPEND = b"\x1a"


def is_terminal(descriptor: int = 0) -> bool:
    """Whether this is a terminal that we may read: a background job may not, and would be stopped
    for trying.
    """
    try:
        return os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def raw_mode(descriptor: int = 0) -> Iterator[None]:
    """Every key goes to the container as typed; what was set before is restored on the way out."""
    before = termios.tcgetattr(descriptor)
    try:
        # Not the default TCSAFLUSH, which throws away what was typed while the container started.
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def window_size(descriptor: int = 0) -> tuple[int, int]:
    """(rows, columns); of stdin, since stdout may be a file."""
    size = os.get_terminal_size(descriptor)
    return size.lines, size.columns


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte, whatever a pipe takes at a time."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # Somebody made this terminal non-blocking; wait until it takes more.
            select.select([], [descriptor], [])


def say(message: str) -> None:
    """A line on stderr that also stands straight on a raw terminal, and never raises."""
    try:
        sys.stderr.write(
            message.replace("\n", "\r\n") + "\r\n" if sys.stderr.isatty() else message + "\n"
        )
        sys.stderr.flush()
    except OSError:
        pass


def pump_input(
    connection: socket.socket, on_interrupt: Callable[[], None] | None, stop: int
) -> None:
    """Send stdin to the container until it ends or `stop` becomes readable.

    With `on_interrupt`, Ctrl-C is not sent but reported, and Ctrl-Z is dropped: inside the
    container is no shell that could wake a suspended job.
    """
    while True:
        ready, _, _ = select.select([0, stop], [], [])
        if stop in ready:
            return
        data = os.read(0, 4096)
        if not data:
            # The container's stdin ends too; its output goes on.
            connection.shutdown(socket.SHUT_WR)
            return
        if on_interrupt is not None:
            for _ in range(data.count(INTERRUPT)):
                on_interrupt()
            data = data.replace(INTERRUPT, b"").replace(SUSPEND, b"")
        if data:
            connection.sendall(data)
