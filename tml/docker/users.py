"""Which user the container runs as, from what the engine says of itself: one pure function.

What the container writes into the mounts must belong to the caller, and what that takes differs:

  rootful, podman    ids mean the same inside and outside: the caller's own
  rootless           root inside is the caller outside: 0:0
  podman-rootless    the same, unless asked to keep the caller's ids: the caller's own, keep-id
  desktop            file sharing shows each file as its reader's, whoever that is: the caller's own
  remapped           nobody inside is the caller outside: refused, unless a user was chosen
  remote             the folders of this machine are not there: refused
"""

import re
from dataclasses import dataclass
from typing import Literal

from tml.docker.errors import LauncherError

EngineKind = Literal[
    "rootful", "rootless", "remapped", "podman", "podman-rootless", "desktop", "remote"
]

KEEP_ID = "keep-id"
"""Podman's user namespace in which the caller has the same ids inside as outside."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself, as far as it matters here."""

    url: str
    here: bool
    """It runs under this machine's kernel and name; not so in a virtual machine of this machine."""
    operating_system: str = ""
    platform: str = ""
    """Such as "Docker Desktop 4.40.0 (187762)"; often nothing."""
    components: tuple[str, ...] = ()
    """Names of its parts, such as "Engine" or "Podman Engine"."""
    security_options: tuple[str, ...] = ()
    num_processors: int = 1
    gpu_runtime: str | None = None
    """By what it would hand a GPU to a container, as far as that can be seen from here."""


@dataclass(frozen=True, kw_only=True)
class ContainerUser:
    """`ids` is what --user takes; `name` is what USER and LOGNAME say, since the image knows no
    such user.
    """

    ids: str
    name: str
    namespace: str | None = None
    """User namespace to ask for; None is the engine's own."""


def engine_kind(info: EngineInfo) -> EngineKind:
    """What kind of engine says this of itself."""
    desktop = "Docker Desktop" in (info.operating_system, info.platform[:14])
    if not info.url.startswith(("unix:", "npipe:")) and not info.here and not desktop:
        return "remote"
    options = {option.partition(",")[0].removeprefix("name=") for option in info.security_options}
    if "Podman Engine" in info.components:
        return "podman-rootless" if "rootless" in options else "podman"
    if "rootless" in options:
        return "rootless"
    if "userns" in options:
        return "remapped"
    if desktop:
        return "rootless" if _desktop_maps_root(info.platform) else "desktop"
    return "rootful"


def lacks_gpus(info: EngineInfo) -> bool:
    """Whether the engine is sure to refuse GPUs. Podman does not say by what it hands them out, and
    into a virtual machine nobody can look.
    """
    return info.gpu_runtime is None and info.here and "Podman Engine" not in info.components


def _desktop_maps_root(platform: str) -> bool:
    """Whether it is Docker Desktop before 4.35. Under Linux that shows the caller's files as
    root's, as a rootless engine does; under macOS and Windows any user will do.
    """
    version = re.search(r"Docker Desktop (\d+)\.(\d+)", platform)
    return version is not None and (int(version[1]), int(version[2])) < (4, 35)


def container_user(
    kind: EngineKind, uid: int, gid: int, name: str, requested: str | None = None
) -> ContainerUser:
    """The user of a container that `uid`:`gid`, called `name`, starts on such an engine."""
    if kind == "remote":
        raise LauncherError(
            "this engine is on another machine, and so would be the folders that it mounts: the "
            "checkout, the data and the run folder are here. Log in there (ssh) and start the job "
            "there, or use an engine of this machine: unset DOCKER_HOST; docker context use default"
        )
    if requested is not None:
        return ContainerUser(
            ids=requested, name="root" if requested.partition(":")[0] in ("0", "root") else name
        )
    if kind == "rootless":
        return ContainerUser(ids="0:0", name="root")
    if kind == "remapped":
        raise LauncherError(
            "this engine remaps users (userns-remap): no user of a container is you outside, so "
            "files in the mounted folders cannot be written as yours. Use a rootful or a rootless "
            "engine, or choose the user yourself with --user UID:GID"
        )
    namespace = KEEP_ID if kind == "podman-rootless" else None
    return ContainerUser(ids=f"{uid}:{gid}", name=name, namespace=namespace)
