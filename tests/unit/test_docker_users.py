"""Which user a container runs as."""

import pytest

from tml.docker.errors import LauncherError
from tml.docker.users import ContainerUser, container_user, engine_kind


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([], "rootful"),
        (["name=seccomp,profile=builtin", "name=cgroupns"], "rootful"),
        (["name=seccomp,profile=builtin", "name=rootless", "name=cgroupns"], "rootless"),
        (["name=userns"], "remapped"),
    ],
)
def test_the_engine_says_what_it_is(options: list[str], kind: str) -> None:
    assert engine_kind(options) == kind


def test_a_rootful_engine_runs_as_the_caller() -> None:
    assert container_user("rootful", 1000, 1001, "me") == ContainerUser(ids="1000:1001", name="me")
    assert container_user("rootful", 0, 0, "root").ids == "0:0"


def test_root_of_a_rootless_engine_is_the_caller() -> None:
    user = container_user("rootless", 1000, 1001, "me")
    assert user == ContainerUser(ids="0:0", name="root")


def test_a_remapping_engine_is_refused_unless_a_user_is_chosen() -> None:
    with pytest.raises(LauncherError, match="userns-remap"):
        container_user("remapped", 1000, 1001, "me")
    assert container_user("remapped", 1000, 1001, "me", "5:6").ids == "5:6"
