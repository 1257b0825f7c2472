"""Who removes a container: the launcher's process that made it, as a label that outlives it.

`host:pid:boot-id:start:namespace`, where start is the process's start in clock ticks since boot,
and namespace that in which its number counts. It tells a living owner from a later process of the
same number, from a process before a reboot, and from one within a container on the host's network,
which has the host's name. Where there is no /proc the last two are empty.
"""

import getpass
import os
import socket
from pathlib import Path
from typing import Literal

Liveness = Literal["alive", "dead", "elsewhere"]


def this_process() -> str:
    """The label of what this process makes."""
    pid = os.getpid()
    parts = (socket.gethostname(), pid, _boot_id(), _start_ticks(pid) or "", _namespace())
    return ":".join(map(str, parts))


def user_name() -> str:
    """Login name of the caller."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "user"  # An id without a name.


def liveness(owner: str) -> Liveness:
    """Whether the process that `owner` names still lives; "elsewhere" where it is, or was, on
    another machine or in a container, of which nothing is known here.
    """
    host, pid, boot, start, namespace = [*owner.split(":"), *[""] * 4][:5]
    if host != socket.gethostname() or not pid.isdigit():
        return "elsewhere"
    if boot != _boot_id():
        return "dead"
    if namespace and namespace != _namespace():
        return "elsewhere"
    now = _start_ticks(int(pid))
    if now is None:
        # No /proc, or one that hides what others run (hidepid).
        return "alive" if _is_there(int(pid)) else "dead"
    return "alive" if now and (not start or now == start) else "dead"


def pid_of(owner: str) -> int:
    """The number of the process that `owner` names."""
    return int(owner.split(":")[1])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _start_ticks(pid: int) -> str | None:
    """Start of a process in clock ticks since boot; "" of a zombie, None where it is not seen."""
    try:
        # The second field, the program's name, may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _namespace() -> str:
    try:
        # Such as pid:[4026531836].
        return os.readlink("/proc/self/ns/pid").partition("[")[2].rstrip("]")
    except OSError:
        return ""


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # Somebody else's.
    return True
