"""Who removes a container: the launcher's process that made it, as a label that outlives it.

`host:pid:boot-id:start`, where start is the process's start in clock ticks since boot. It tells a
living owner from a later process of the same number, and from a process before a reboot.
"""

import os
import socket
from pathlib import Path
from typing import Literal

Liveness = Literal["alive", "dead", "elsewhere"]


def this_process() -> str:
    """The label of what this process makes."""
    return f"{socket.gethostname()}:{os.getpid()}:{_boot_id()}:{_start_ticks(os.getpid())}"


def liveness(owner: str) -> Liveness:
    """Whether the process that `owner` names still lives; "elsewhere" where it is, or was, on
    another machine, of which nothing is known here.
    """
    host, pid, boot, start = [*owner.split(":"), "", "", ""][:4]
    if host != socket.gethostname() or not pid.isdigit():
        return "elsewhere"
    if boot != _boot_id():
        return "dead"
    now = _start_ticks(int(pid))
    return "alive" if now and (not start or now == start) else "dead"


def pid_of(owner: str) -> int:
    """The number of the process that `owner` names."""
    return int(owner.split(":")[1])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _start_ticks(pid: int) -> str:
    """Start of a process in clock ticks since boot; "" where there is none, or it is a zombie."""
    try:
        # The second field, the program's name, may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
