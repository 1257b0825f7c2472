"""Which user the container runs as, from what the engine says of itself: one pure function.

What the container writes into the mounts must belong to the caller. On a rootful engine user ids
mean the same inside and outside, so the container takes the caller's. On a rootless engine the
container's root is the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tml.docker.errors import LauncherError

EngineKind = Literal["rootful", "rootless", "remapped"]


@dataclass(frozen=True, kw_only=True)
class ContainerUser:
    """`ids` is what --user takes; `name` is what USER and LOGNAME say, since the image knows no
    such user.
    """

    ids: str
    name: str


def engine_kind(security_options: Sequence[str]) -> EngineKind:
    """Kind of an engine from SecurityOptions of its own information, such as ["name=rootless"]."""
    names = {option.partition(",")[0].removeprefix("name=") for option in security_options}
    if "rootless" in names:
        return "rootless"
    return "remapped" if "userns" in names else "rootful"


def container_user(
    kind: EngineKind, uid: int, gid: int, name: str, requested: str | None = None
) -> ContainerUser:
    """The user of a container that `uid`:`gid`, called `name`, starts on such an engine."""
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
    return ContainerUser(ids=f"{uid}:{gid}", name=name)
