"""Inside a container: which folders outlive it."""

import os
from pathlib import Path

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
