"""`run` and `shell` on a terminal: a real pseudo-terminal is ours, the container has its own."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.docker

STOPPABLE = """exec python3 -u -c '
import signal, sys, time
def stop(*_):
    print("saved", flush=True)
    if len(sys.argv) == 1: sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True: time.sleep(1)
'
"""


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, launcher: Any, *argv: str, **popen: Any) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(30, 100)
        self.modes = termios.tcgetattr(theirs)
        self.theirs = theirs
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, **popen}
        self.process = subprocess.Popen(
            [*launcher.argv, *argv],
            env=launcher.env,
            cwd=launcher.home,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
            **streams,
        )
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        """Change the window, as dragging its corner does."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.ours, keys.encode())

    def read_until(self, text: str, timeout_s: float = 20.0) -> None:
        """Read what appears until it has `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not appear in {self.seen!r}"
            self.seen += os.read(self.ours, 65536).decode()

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(20)


@pytest.fixture
def terminals(launcher: Any) -> Iterator[Any]:
    """Opens terminals, and closes them."""
    opened: list[Terminal] = []

    def open_terminal(*argv: str, **popen: Any) -> Terminal:
        opened.append(Terminal(launcher, *argv, **popen))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        # Not kill: of a test that failed, too, no container may be left.
        terminal.process.terminate()
        terminal.process.wait(60)
        os.close(terminal.ours)
        os.close(terminal.theirs)


def test_the_container_has_a_terminal_of_our_size(launcher: Any, terminals: Any) -> None:
    launcher.script("tty; echo size $(stty size); read line; echo got $line; exit 6\n")
    terminal = terminals("run", "standin")
    terminal.read_until("size 30 100")
    assert "/dev/" in terminal.seen
    terminal.type("hello\n")
    terminal.read_until("got hello")
    assert terminal.wait() == 6


def test_a_resize_reaches_the_container(launcher: Any, terminals: Any) -> None:
    launcher.script("for i in $(seq 200); do stty size; sleep 0.05; done\n")
    terminal = terminals("run", "standin")
    terminal.read_until("30 100")
    terminal.resize(44, 132)
    terminal.read_until("44 132")
    terminal.type("\x03")
    assert terminal.wait() == 130


def test_ctrl_c_stops_with_grace_and_the_terminal_is_as_before(
    launcher: Any, terminals: Any
) -> None:
    launcher.script(STOPPABLE)
    terminal = terminals("run", "standin")
    terminal.read_until("ready")
    assert termios.tcgetattr(terminal.theirs) != terminal.modes
    terminal.type("\x03")
    assert terminal.wait() == 130
    terminal.read_until("saved")
    assert termios.tcgetattr(terminal.theirs) == terminal.modes


def test_a_second_ctrl_c_kills(launcher: Any, terminals: Any) -> None:
    launcher.script(STOPPABLE.replace("while True", "sys.argv.append(1)\nwhile True"))
    terminal = terminals("run", "standin")
    terminal.read_until("ready")
    terminal.type("\x03")
    terminal.read_until("saved")
    assert terminal.process.poll() is None
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert termios.tcgetattr(terminal.theirs) == terminal.modes


def test_the_status_and_the_last_line_come_through_a_terminal(
    launcher: Any, terminals: Any
) -> None:
    launcher.script("seq 5000; echo the end; exit 42\n")
    terminal = terminals("run", "standin")
    terminal.read_until("the end")
    assert terminal.wait() == 42


def test_output_may_go_to_a_file_while_stdin_is_a_terminal(
    launcher: Any, terminals: Any, tmp_path: Any
) -> None:
    launcher.script("stty size; echo to the file; exit 3\n")
    with (tmp_path / "log").open("wb") as log:
        assert terminals("run", "standin", stdout=log).wait() == 3
    assert "30 100" in (tmp_path / "log").read_text()
    assert "to the file" in (tmp_path / "log").read_text()


def test_a_shell_takes_ctrl_c_as_a_key(launcher: Any, terminals: Any) -> None:
    terminal = terminals("shell")
    terminal.type("echo begun; sleep 60\n")  # At once: what is typed ahead is not lost.
    terminal.read_until("\rbegun")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.type("echo status $?; exit 4\n")
    terminal.read_until("status 130")
    assert terminal.wait() == 4


def test_a_shell_reads_commands_from_a_pipe(launcher: Any) -> None:
    done = subprocess.run(
        [*launcher.argv, "shell"],
        input="pwd\nexit 3\n",
        env=launcher.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "/usr/src/app\n")
