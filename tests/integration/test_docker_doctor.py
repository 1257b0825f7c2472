"""`doctor` as people call it: with the engine, without one, without permission, with what a dead
launcher left behind.
"""

import json
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tml.docker import owner
from tml.docker.plan import LABEL_JOB, LABEL_OWNER, LABEL_PROJECT

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="takes root to become somebody else")


def told(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """The checks by name."""
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["errors"] else 0), done.stderr
    return {check["name"]: check for check in report["checks"]}


@pytest.mark.docker
def test_a_machine_that_can_train_has_no_error(launcher: Any) -> None:
    found = told(launcher("doctor", "--json"))
    assert [check for check in found.values() if check["level"] == "error"] == []
    for name in (
        "engine",
        "API",
        "user",
        "storage",
        "/dev/shm",
        "jobs",
        "GPUs",
        "Compose",
        ".venv",
    ):
        assert name in found
    assert "local/torch is current" in found["image"]["text"]


@pytest.mark.docker
def test_a_changed_requirement_makes_the_image_stale(launcher: Any) -> None:
    with (launcher.base / "requirements" / "cpu.txt").open("a") as file:
        file.write("# changed\n")
    found = told(launcher("doctor", "--json"))["image"]
    assert (found["level"], found["remedy"][:28]) == ("warning", "python -m tml.docker build; ")
    assert "is stale" in found["text"]


@pytest.fixture
def dead_owner() -> str:
    """The label of a launcher that has ended."""
    program = "from tml.docker.owner import this_process; print(this_process())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def left_behind(client: Any, image: str, dead_owner: str) -> Iterator[str]:
    """A container and a network of a launcher that is dead."""
    name = f"tml-standin-doctor-{os.getpid()}"
    labels = {LABEL_OWNER: dead_owner, LABEL_JOB: name, LABEL_PROJECT: "standin"}
    client.create_container(image, ["true"], name=name, labels=labels)
    client.create_network(name, labels=labels)
    yield name
    client.remove_container(name, force=True)
    client.remove_network(name)


@pytest.mark.docker
def test_what_a_dead_launcher_left_is_a_warning(launcher: Any, left_behind: str) -> None:
    found = told(launcher("doctor", "--json"))["stale runs"]
    assert found["level"] == "warning"
    assert left_behind in found["text"]
    assert found["remedy"] == "python -m tml.docker gc"
    assert left_behind not in told(launcher("doctor", "--json"))["jobs"]["text"]


@pytest.mark.docker
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_job_whose_launcher_lives_is_no_stale_run(
    launcher: Any, client: Any, image: str, where: str
) -> None:
    name = f"tml-standin-alive-{os.getpid()}"
    lives = owner.this_process() if where == "here" else "another-host:1:boot:2"
    labels = {LABEL_OWNER: lives, LABEL_JOB: name, LABEL_PROJECT: "standin"}
    client.create_container(image, ["true"], name=name, labels=labels)
    try:
        found = told(launcher("doctor", "--json"))
    finally:
        client.remove_container(name, force=True)
    assert name in found["jobs"]["text"]
    assert name not in found.get("stale runs", {}).get("text", "")


@pytest.mark.docker
@ROOT_ONLY
def test_a_user_who_may_not_speak_to_the_engine_is_told_so(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    # This Python may lie in a folder that only root reads.
    become = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    done = subprocess.run(
        [*become, sys.executable, "-m", "tml.docker", "doctor", "--json"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    found = told(done)
    assert found["engine"]["level"] == "error"
    assert f"user id {nobody.pw_uid} may not speak to it" in found["engine"]["text"]
    assert "usermod -aG docker" in found["engine"]["remedy"]
    assert (
        f"{tmp_path} cannot be written to: it belongs to user id 0" in found["disk, runs"]["text"]
    )
    assert "API" not in found


def test_without_an_engine_the_rest_is_still_looked_at(bare_launcher: Any) -> None:
    found = told(bare_launcher("doctor", "--json", DOCKER_HOST="unix:///nothing"))
    assert found["engine"]["level"] == "error"
    assert "unix:///nothing (from DOCKER_HOST)" in found["engine"]["text"]
    assert "API" not in found
    for name in ("Python", "docker-py", ".venv", "disk, runs", "port 6006", "pip", ".env"):
        assert name in found


def test_a_context_that_is_not_there_is_an_error(bare_launcher: Any) -> None:
    found = told(bare_launcher("doctor", "--json", DOCKER_HOST="", DOCKER_CONTEXT="nosuch"))
    assert "there is no Docker context 'nosuch'" in found["engine"]["text"]


def test_without_docker_py_it_says_how_to_install_it(bare_launcher: Any) -> None:
    # As in a Python that has no such package.
    program = (
        "import sys, importlib.metadata as m; sys.modules['docker'] = None\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'docker': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from tml.docker.__main__ import main; sys.exit(main(['doctor', '--json']))"
    )
    bare_launcher.argv = [sys.executable, "-c", program]
    found = told(bare_launcher())
    assert found["docker-py"]["level"] == "error"
    assert "setup_venv.sh launcher" in found["docker-py"]["remedy"]
    assert found["engine"]["level"] == "error"


def test_an_engine_that_accepts_and_never_answers_is_an_error(
    bare_launcher: Any, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen(8)
        start = time.monotonic()
        found = told(bare_launcher("doctor", "--json", DOCKER_HOST=f"unix://{path}"))
        assert time.monotonic() - start < 30
    assert "has not answered for 8 s" in found["engine"]["text"]


def test_a_port_that_is_taken_is_a_warning(bare_launcher: Any) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        except OSError:
            pass  # Somebody else has it: as good.
        found = told(bare_launcher("doctor", "--json", DOCKER_HOST="unix:///nothing"))
    assert found["port 29500"]["level"] == "warning"
    assert "ss -ltnp" in found["port 29500"]["remedy"]


def test_a_stale_dot_env_is_a_warning(bare_launcher: Any) -> None:
    (bare_launcher.base / ".env").write_text("TML_USER=4711:4711\nTML_IMAGE_INPUTS=old\n")
    found = told(bare_launcher("doctor", "--json", DOCKER_HOST="unix:///nothing"))[".env"]
    assert found["level"] == "warning"
    assert "TML_USER is 4711:4711" in found["text"]
    assert "TML_IMAGE_INPUTS is old" in found["text"]


def test_a_password_of_pips_is_not_shown(bare_launcher: Any) -> None:
    done = bare_launcher(
        "doctor",
        "--json",
        DOCKER_HOST="unix:///nothing",
        PIP_INDEX_URL="https://me:planted@localhost/simple",
    )
    assert "https://localhost/simple" in told(done)["pip"]["text"]
    assert "planted" not in done.stdout + done.stderr


def test_as_text_it_ends_with_a_count_and_exit_status_1(bare_launcher: Any) -> None:
    done = bare_launcher("doctor", DOCKER_HOST="unix:///nothing")
    assert done.returncode == 1
    assert done.stdout.startswith("error    engine       no Docker Engine answers.")
    assert done.stdout.splitlines()[-1].startswith("1 error, ")
    assert "\x1b" not in done.stdout
