"""Inside a container: which folders outlive it, and how many processors are its own."""

import math
import os
from pathlib import Path

from tml.machines import environment

CHECKOUT = Path("/usr/src/app/tml")
"""Where the launcher mounts the checkout: a machine with that mount is a container of ours."""


def vanishes(path: Path) -> bool:
    """Whether what is written to `path` is lost with the container: no folder above it is mounted
    from outside.
    """
    if not os.path.ismount(CHECKOUT):
        return False
    parents = Path(os.path.realpath(path)).parents
    return not any(os.path.ismount(folder) for folder in (path, *parents) if str(folder) != "/")


def advice(flag: str, path: Path) -> str:
    """The message for a `path` given as `flag` that vanishes."""
    return (
        f"{flag} {path} lies inside the container and would be lost with it; use a folder below "
        "/root/tmp, which is ~/tmp outside, or mount one with the launcher's --mount"
    )


def outside(path: Path) -> str:
    """What to add to the message that there is no `path`, where the caller may have meant one of
    the machine around the container; else "".
    """
    if not vanishes(path):
        return ""
    return (
        "; in the container, ~/tmp is /root/tmp, /data is what the launcher's --data names, and "
        "other folders are there only below the checkout or where its --mount names them"
    )


def is_root_for_another(checkout: Path = CHECKOUT) -> bool:
    """Whether this is root while the checkout belongs to somebody else, who would find files of
    root's in their folders.
    """
    return os.getuid() == 0 and checkout.exists() and checkout.stat().st_uid != 0


def threads_of_process(num_processes: int) -> int:
    """Threads for one of `num_processes` here, so that all of the job on this machine together have
    a processor each: of those that the containers share, and no more than this one may use.
    """
    shared = len(os.sched_getaffinity(0)) / environment.machine_share()
    return max(1, math.floor(min(shared, _processor_limit()) / num_processes))


def _processor_limit(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that `docker run --cpus` allows; infinite where nothing is said."""
    both = folder / "cpu.max"  # cgroup v2; v1 has a file for each, and -1 for no limit
    files = [both] if both.exists() else [folder / f"cpu/cpu.cfs_{n}_us" for n in _QUOTA]
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError):
        return math.inf


_QUOTA = ("quota", "period")
