"""Whether the process that a label names still lives."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tml.docker import owner
from tml.docker.owner import liveness, pid_of, this_process


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def label_of(pid: int) -> str:
    """The label that the process itself would write."""
    host, _, boot, _, namespace = this_process().split(":")
    return f"{host}:{pid}:{boot}:{owner._start_ticks(pid)}:{namespace}"


def test_this_process_lives() -> None:
    assert liveness(this_process()) == "alive"
    assert pid_of(this_process()) == os.getpid()


def test_a_process_lives_until_it_ends_also_before_anybody_waited_for_it(
    other: "subprocess.Popen[bytes]",
) -> None:
    label = label_of(other.pid)
    assert liveness(label) == "alive"
    other.kill()
    # A zombie: its number is taken still, and it does nothing any more.
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert liveness(label) == "dead"
    other.wait()
    assert liveness(label) == "dead"


def test_a_later_process_of_the_same_number_is_another(other: "subprocess.Popen[bytes]") -> None:
    host, pid, boot, start, _ = label_of(other.pid).split(":")
    assert liveness(f"{host}:{pid}:{boot}:{int(start) - 1}") == "dead"


def test_a_process_before_a_reboot_is_dead(other: "subprocess.Popen[bytes]") -> None:
    host, pid, _, start, namespace = label_of(other.pid).split(":")
    # After a reboot the namespace may have another number, too.
    for there in (namespace, "1"):
        assert liveness(f"{host}:{pid}:an-earlier-boot:{start}:{there}") == "dead"


def test_of_a_process_in_a_container_with_this_machines_name_nothing_is_known(
    other: "subprocess.Popen[bytes]",
) -> None:
    label = label_of(other.pid).rpartition(":")[0]
    other.kill()
    other.wait()
    assert liveness(f"{label}:1") == "elsewhere"


def test_a_process_that_cannot_be_looked_at_lives_as_long_as_its_number_is_taken(
    other: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    label = label_of(other.pid)
    # As without /proc, and where it hides other people's processes.
    monkeypatch.setattr(owner, "_start_ticks", lambda _: None)
    assert liveness(label) == "alive"
    other.kill()
    other.wait()
    assert liveness(label) == "dead"


def test_of_another_machine_nothing_is_known() -> None:
    assert liveness(this_process().replace(socket.gethostname(), "another", 1)) == "elsewhere"


@pytest.mark.parametrize("label", ["", "nonsense", f"{socket.gethostname()}", "a:b:c:d"])
def test_a_label_that_names_no_process_is_nobody_here(label: str) -> None:
    # Not "dead": what no launcher of this machine has written is not to be removed.
    assert liveness(label) == "elsewhere"


def test_a_label_without_the_start_goes_by_number_and_boot(
    other: "subprocess.Popen[bytes]",
) -> None:
    assert liveness(":".join(label_of(other.pid).split(":")[:3])) == "alive"


def test_a_program_with_a_strange_name_is_read_right() -> None:
    code = (
        "import ctypes, sys\n"
        "ctypes.CDLL(None).prctl(15, b'a) b (c', 0, 0, 0)\n"
        "from tml.docker.owner import this_process, liveness\n"
        "print(liveness(this_process()), this_process().split(':')[3].isdigit())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "alive True\n"
