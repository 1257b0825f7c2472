"""What all tests share: the `docker` marker, and a launcher to be called as people call it.

Tests marked `docker` are left out where no engine answers, and the end of the run says so; with
TML_REQUIRE_DOCKER=1 they fail instead.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in import Launcher, containers, networks
from tml.docker import connection
from tml.docker.errors import LauncherError
from tml.machines import environment

REPOSITORY = Path(__file__).resolve().parents[1]
# Under nohup SIGHUP is ignored, and so it would be by the launchers that tests end with it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
LEFT_OUT = pytest.StashKey[list[str]]()
NO_ENGINE = pytest.StashKey[str]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the long files where processes share them out, and leave the tests out that need
    an engine, where there is none and none is required.
    """
    if hasattr(config, "workerinput"):  # of pytest-xdist: what comes last, one process does alone
        _begin_with_long_files(items)
    needing = [item for item in items if item.get_closest_marker("docker")]
    if not needing:
        return
    try:
        connection.connect()[0].close()
    except LauncherError as error:
        config.stash[NO_ENGINE] = str(error)
    if NO_ENGINE not in config.stash or os.environ.get(environment.TML_REQUIRE_DOCKER) == "1":
        return
    config.stash[LEFT_OUT] = [item.nodeid for item in needing]
    for item in needing:
        item.add_marker(pytest.mark.skip(reason="no Docker Engine answers"))


def _begin_with_long_files(items: list[pytest.Item]) -> None:
    seconds: dict[Path, float] = defaultdict(float)  # roughly
    for item in items:
        slow, own_process = item.get_closest_marker("slow"), "integration" in item.path.parts
        seconds[item.path] += 15 if slow else 3 if own_process else 0.1
    items.sort(key=lambda item: -seconds[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A required engine that is missing is a failure, told in the engine's own message."""
    if item.get_closest_marker("docker") and NO_ENGINE in item.config.stash:
        pytest.fail(f"{environment.TML_REQUIRE_DOCKER}=1: {item.config.stash[NO_ENGINE]}", False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what was left out and how to have it run."""
    config = terminalreporter.config
    left_out = config.stash.get(LEFT_OUT, [])
    if not left_out:
        return
    terminalreporter.section("left out: no Docker Engine")
    terminalreporter.write_line(config.stash[NO_ENGINE])
    for file in sorted({test.partition("::")[0] for test in left_out}):
        count = sum(test.startswith(f"{file}::") for test in left_out)
        terminalreporter.write_line(f"  {file}: {count} tests")
    terminalreporter.write_line(
        "To have them run: start an engine, then call ./scripts/test.sh again."
    )


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not so within {timeout_s} s")


@pytest.fixture
def until() -> Callable[..., Any]:
    """`wait_until`."""
    return wait_until


@pytest.fixture
def bare_launcher(tmp_path: Path) -> Launcher:
    """A launcher that needs no engine. Its checkout has what the real image is made of: any other
    Dockerfile, requirement or kernel, and each `run` would build the image anew.
    """
    base, home = tmp_path / "checkout", tmp_path / "home"
    home.mkdir()
    base.mkdir()
    shutil.copy(REPOSITORY / "Dockerfile", base)
    shutil.copytree(REPOSITORY / "requirements", base / "requirements")
    native = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "tml" / "native", base / "tml" / "native", ignore=native)
    launcher = Launcher(base, home)
    launcher.script("true\n")
    return launcher


@pytest.fixture
def client() -> Iterator[Any]:
    """The engine itself."""
    client, _ = connection.connect()
    yield client
    client.close()


@pytest.fixture(scope="session")
def image() -> str:
    """The real image, built where it is not current."""
    subprocess.run([sys.executable, "-m", "tml.docker", "build"], cwd=REPOSITORY, check=True)
    return "local/torch"


@pytest.fixture
def launcher(bare_launcher: Launcher, client: Any, image: str) -> Iterator[Launcher]:
    """A launcher with a real engine; afterwards no container of it may be left, running or not, and
    no network.
    """
    yield bare_launcher
    left, joined = containers(client), networks(client)
    for container in left:
        client.remove_container(container["Id"], force=True)
    for network in joined:
        client.remove_network(network["Id"])
    assert [container["Names"] for container in left] == []
    assert [network["Name"] for network in joined] == []
