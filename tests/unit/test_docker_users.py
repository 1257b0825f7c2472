"""Which user a container runs as, for each kind of engine."""

from typing import Any

import pytest

from tml.docker.errors import LauncherError
from tml.docker.users import (
    ContainerUser,
    EngineInfo,
    EngineKind,
    container_user,
    engine_kind,
    lacks_gpus,
)

SOCKET = "unix:///var/run/docker.sock"
SECCOMP = "name=seccomp,profile=builtin"
REMOTE = {"url": "ssh://me@big", "here": False}
DESKTOP = {"here": False, "operating_system": "Docker Desktop"}
PODMAN = {"components": ("Podman Engine", "Conmon", "OCI Runtime (crun)")}
CALLER = ContainerUser(ids="1000:1001", name="me")
ROOT = ContainerUser(ids="0:0", name="root")
KEPT = ContainerUser(ids="1000:1001", name="me", namespace="keep-id")


@pytest.mark.parametrize(
    ("said", "kind", "user"),
    [
        ({}, "rootful", CALLER),
        ({"security_options": (SECCOMP, "name=cgroupns")}, "rootful", CALLER),
        ({"security_options": (SECCOMP, "name=rootless", "name=cgroupns")}, "rootless", ROOT),
        ({"security_options": (SECCOMP, "name=userns")}, "remapped", None),
        (PODMAN, "podman", CALLER),
        ({**PODMAN, "security_options": (SECCOMP, "name=rootless")}, "podman-rootless", KEPT),
        # A virtual machine of this machine, which shares its folders.
        ({"here": False}, "rootful", CALLER),
        (DESKTOP, "desktop", CALLER),
        ({**DESKTOP, "platform": "Docker Desktop 4.35.0 (172550)"}, "desktop", CALLER),
        ({**DESKTOP, "platform": "Docker Desktop 4.34.3 (170107)"}, "rootless", ROOT),
        ({**DESKTOP, "platform": "Docker Desktop 5.0.1 (1)"}, "desktop", CALLER),
        ({**DESKTOP, "url": "npipe:////./pipe/docker_engine"}, "desktop", CALLER),
        ({**DESKTOP, "url": "tcp://localhost:2375"}, "desktop", CALLER),
        ({"components": ("Engine",), "platform": "Docker Engine - Community"}, "rootful", CALLER),
        (REMOTE, "remote", None),
        ({"url": "tcp://10.0.0.7:2376", "here": False}, "remote", None),
        ({**REMOTE, **PODMAN, "security_options": ("name=rootless",)}, "remote", None),
        # An address, and yet this machine.
        ({"url": "tcp://127.0.0.1:2375"}, "rootful", CALLER),
        ({"url": "ssh://localhost", "security_options": ("name=rootless",)}, "rootless", ROOT),
    ],
)
def test_the_user_follows_from_what_the_engine_says(
    said: dict[str, Any], kind: EngineKind, user: ContainerUser | None
) -> None:
    assert engine_kind(EngineInfo(**{"url": SOCKET, "here": True, **said})) == kind
    if user is not None:
        assert container_user(kind, 1000, 1001, "me") == user
    else:
        with pytest.raises(LauncherError):
            container_user(kind, 1000, 1001, "me")


def test_root_of_a_rootful_engine_stays_root() -> None:
    assert container_user("rootful", 0, 0, "root") == ROOT


def test_a_user_that_was_chosen_is_taken_as_it_is() -> None:
    for kind in ("rootful", "rootless", "remapped", "podman", "podman-rootless", "desktop"):
        chosen = container_user(kind, 1000, 1001, "me", "5:6")
        assert chosen == ContainerUser(ids="5:6", name="me")
    assert container_user("rootful", 1000, 1001, "me", "0").name == "root"


def test_a_remapping_engine_is_refused_with_what_to_do() -> None:
    with pytest.raises(LauncherError, match=r"userns-remap.*--user UID:GID"):
        container_user("remapped", 1000, 1001, "me")


def test_a_remote_engine_is_refused_whatever_the_user() -> None:
    with pytest.raises(LauncherError, match=r"another machine.*DOCKER_HOST"):
        container_user("remote", 1000, 1001, "me", "5:6")


@pytest.mark.parametrize(
    ("said", "lacks"),
    [
        ({}, True),
        ({"gpu_runtime": "CDI"}, False),
        # Podman has CDI and does not say so; what a virtual machine has cannot be seen.
        (PODMAN, False),
        (DESKTOP, False),
    ],
)
def test_gpus_are_refused_only_where_the_engine_is_sure_to(
    said: dict[str, Any], lacks: bool
) -> None:
    assert lacks_gpus(EngineInfo(**{"url": SOCKET, "here": True, **said})) == lacks
