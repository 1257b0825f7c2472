"""Secrets: who reads the file, what is in it, and that nothing of it stays."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tml.docker import plan as plans
from tml.docker import render, secrets
from tml.docker.errors import LauncherError
from tml.docker.plan import Host, Plan, Request

VALUES = {
    "PLAIN": "planted",
    "QUOTES": 'it\'s "quoted" `id` $(id) $HOME \\ !',
    "LINES": "-----BEGIN-----\nab\n\n c\t-----END-----\n",
    "BYTES": os.fsdecode(b"\xff\xfe\x01 \xc3\xa9"),
    "EMPTY": "",
    "LONG": "x" * 100_000,
}


def plan(run_id: str = "12ab", shares_memory: bool = True, **request: Any) -> Plan:
    """A plan of a shell, with every value of VALUES as a secret unless `env` is given."""
    host = Host(
        checkout=Path("/c"),
        home=Path("/h"),
        cwd=Path("/h"),
        uid=1,
        gid=1,
        user="me",
        environment=VALUES,
        terminal=False,
        engine="rootful" if shares_memory else "desktop",
    )
    return plans.plan_shell(Request(**{"env": tuple(VALUES), **request}), host, run_id)


def environment_of(command: list[str], file: Path) -> dict[bytes, bytes]:
    """The variables that `command` has, where bash is told of `file`."""
    env = {"PATH": os.environ["PATH"], "BASH_ENV": str(file)}
    output = subprocess.run([*command, "env", "-0"], env=env, capture_output=True, check=True)
    assert output.stderr == b""
    lines = [item.partition(b"=") for item in output.stdout.split(b"\0") if item]
    return {name: value for name, _, value in lines}


@pytest.fixture
def staged() -> Any:
    """The file of `plan()`, and nothing of it afterwards."""
    file = secrets.stage(plan())
    yield file
    secrets.discard(file)


def test_every_value_arrives_byte_for_byte_by_way_of_bash(staged: Path) -> None:
    found = environment_of(secrets.wrapped([]), staged)
    for name, value in VALUES.items():
        assert found[name.encode()] == os.fsencode(value)


def test_what_a_script_sets_is_not_set_back_in_the_bash_that_it_starts(staged: Path) -> None:
    script = 'export PLAIN=changed; exec bash -c \'exec "$@"\' x "$@"'
    found = environment_of(["bash", "-c", script, "x"], staged)
    assert found[b"PLAIN"] == b"changed"
    assert b"BASH_ENV" not in found


def test_only_the_caller_reaches_the_file_which_any_user_inside_can_read(staged: Path) -> None:
    assert staged.stat().st_mode & 0o777 == 0o444
    folder = staged.parent.stat()
    assert (folder.st_mode & 0o777, folder.st_uid) == (0o700, os.getuid())
    assert staged.parent.name.startswith(f"tml-secrets-12ab-{os.getpid()}-")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
def test_it_lies_in_memory(staged: Path) -> None:
    assert staged.parent.parent == Path("/dev/shm")


def test_without_dev_shm_it_goes_to_the_next_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(secrets, "MEMORY", tmp_path / "missing")
    file = secrets.stage(plan(), {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert file is not None
    assert file.parent.parent == tmp_path
    secrets.discard(file)
    assert list(tmp_path.iterdir()) == []


def test_a_virtual_machine_is_given_a_folder_below_home(tmp_path: Path) -> None:
    file = secrets.stage(plan(shares_memory=False), {"HOME": str(tmp_path)})
    assert file is not None
    assert file.parent.parent == tmp_path / ".local/state/tml"
    secrets.discard(file)


def test_no_place_at_all_is_an_error_that_names_those_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(secrets, "MEMORY", tmp_path / "no-memory")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "no-tmp"))
    with pytest.raises(LauncherError, match=r"no-memory .*no-tmp "):
        secrets.stage(plan(), {})


def test_no_secrets_no_file() -> None:
    assert secrets.stage(plan(env=("A=1",))) is None
    sent = render.to_engine(plan(env=("A=1",)), "owner")
    assert sent["Cmd"] == ["bash"]
    assert "secrets" not in str(sent)


def test_the_engine_is_told_of_the_file_and_of_no_value(staged: Path) -> None:
    sent = render.to_engine(plan(env=("PLAIN", "API_KEY=planted", "A=1")), "owner", staged)
    assert "planted" not in str(sent)
    assert "API_KEY" not in str(sent)
    assert {"A=1", "BASH_ENV=/run/secrets/tml.env"} <= set(sent["Env"])
    assert sent["HostConfig"]["Mounts"][-1] == {
        "Type": "bind",
        "Source": str(staged),
        "Target": "/run/secrets/tml.env",
        "ReadOnly": True,
    }


@pytest.mark.parametrize(
    ("command", "is_read"),
    [
        (["bash", "tml/run.sh", "x"], True),
        (["bash"], False),
        (["bash", "-i"], False),
        (["bash", "-c", "id"], False),
        (["python", "-m", "pytest"], False),
    ],
)
def test_a_command_that_does_not_read_the_file_is_wrapped(
    command: list[str], is_read: bool
) -> None:
    assert secrets.is_read_by(command) == is_read
    sent = render.to_engine(plan(args=tuple(command[1:])), "owner", Path("/x/tml.env"))
    assert (sent["Cmd"][:2] == ["bash", "-c"]) == (not secrets.is_read_by(["bash", *command[1:]]))


def test_only_what_the_dead_left_is_left_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(secrets, "MEMORY", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"12ab-{dead.pid}-x", f"12ab-{os.getpid()}-y", "other"):
        (tmp_path / f"tml-secrets-{name}").mkdir()
    assert secrets.leftovers({"HOME": str(tmp_path)}) == [
        tmp_path / f"tml-secrets-12ab-{dead.pid}-x"
    ]


def test_a_write_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secrets, "MEMORY", tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(LauncherError, match=r"cannot write the secrets to .*No space left"):
        secrets.stage(plan())
    assert list(tmp_path.iterdir()) == []
