"""Finding an engine, and the message when there is none; an image build's progress. No engine is
needed.
"""

import http.server
import json
import os
import re
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any

import pytest

from tml.docker import build, connection, image
from tml.docker.errors import LauncherError, NoEngineError


@pytest.fixture
def listening(tmp_path: Path) -> Any:
    """A socket at which something listens."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "docker.sock"))
        server.listen()
        yield tmp_path / "docker.sock"


def make_context(home: Path, name: str, host: str, current: bool = False) -> None:
    """What `docker context create` writes."""
    folder = home / ".docker" / "contexts" / "meta" / name
    folder.mkdir(parents=True)
    meta = {"Name": name, "Endpoints": {"docker": {"Host": host}}}
    (folder / "meta.json").write_text(json.dumps(meta))
    if current:
        (home / ".docker" / "config.json").write_text(json.dumps({"currentContext": name}))


def test_no_engine_says_what_was_tried_what_to_do_and_what_works_without(tmp_path: Path) -> None:
    env = {"DOCKER_HOST": f"unix://{tmp_path}/none.sock", "HOME": str(tmp_path)}
    with pytest.raises(NoEngineError) as caught:
        connection.find_endpoint(env)
    message = str(caught.value)
    assert f"unix://{tmp_path}/none.sock (from DOCKER_HOST): no such file or directory" in message
    assert "systemctl start docker" in message
    assert "./scripts/run.sh --venv" in message
    assert caught.value.exit_code == 125


def test_a_socket_that_nobody_listens_at_is_no_engine(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "stale.sock"))
    with pytest.raises(NoEngineError, match="connection refused"):
        connection.find_endpoint({"DOCKER_HOST": f"unix://{tmp_path}/stale.sock"})


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody else")
def test_no_permission_is_told_apart(bare_launcher: Any, listening: Path) -> None:
    listening.chmod(0o600)
    for folder in (listening.parent, listening.parent.parent, listening.parent.parent.parent):
        folder.chmod(0o755)
    become = ["setpriv", "--reuid", "4321", "--regid", "4321", "--clear-groups"]
    readable = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    bare_launcher.argv = [*become, *readable, *bare_launcher.argv]
    done = bare_launcher("run", "standin", DOCKER_HOST=f"unix://{listening}")
    assert done.returncode == 125
    assert f"listens at {listening}, but user id 4321 may not speak to it" in done.stderr
    assert "usermod -aG docker" in done.stderr


def test_an_unknown_context_is_an_error_that_names_those_there(tmp_path: Path) -> None:
    make_context(tmp_path, "there", "unix:///x.sock")
    env = {"HOME": str(tmp_path), "DOCKER_CONTEXT": "gone"}
    with pytest.raises(NoEngineError, match=r"no Docker context 'gone' .* default, there"):
        connection.find_endpoint(env)


def test_the_current_context_is_followed(tmp_path: Path, listening: Path) -> None:
    make_context(tmp_path, "mine", f"unix://{listening}", current=True)
    found = connection.find_endpoint({"HOME": str(tmp_path)})
    assert (found.url, found.context) == (f"unix://{listening}", "mine")


def test_docker_host_wins_over_a_context(tmp_path: Path, listening: Path) -> None:
    make_context(tmp_path, "mine", "unix:///elsewhere.sock", current=True)
    env = {"HOME": str(tmp_path), "DOCKER_HOST": f"unix://{listening}"}
    assert connection.find_endpoint(env).origin == "DOCKER_HOST"


def test_a_launcher_without_an_engine_ends_with_one_message(bare_launcher: Any) -> None:
    done = bare_launcher("run", "standin", DOCKER_HOST="unix:///none.sock")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("tml: no Docker Engine answers. Tried:\n")
    assert "Traceback" not in done.stderr


def test_a_dry_run_and_json_work_without_an_engine(bare_launcher: Any) -> None:
    shown = bare_launcher("run", "standin", "--dry-run", DOCKER_HOST="unix:///none.sock")
    assert (shown.returncode, shown.stdout.count("\n")) == (0, 1)
    assert shown.stdout.startswith("docker run --rm --init --name tml-standin-")
    assert shown.stderr.splitlines()[0] == (
        "tml: no Docker Engine answers; showing what an ordinary engine would be told"
    )
    assert not (bare_launcher.home / "tmp").exists()
    plan = bare_launcher("run", "standin", "--json", DOCKER_HOST="unix:///none.sock")
    assert json.loads(plan.stdout)["image"] == "local/torch"


def test_a_variable_that_is_not_set_here_is_named(bare_launcher: Any) -> None:
    flags = ("--env", "NOT_SET_HERE", "--env", "SET_HERE", "--env", "GIVEN=x", "--dry-run")
    engine = {"DOCKER_HOST": "unix:///none.sock"}
    for verb in ("run", "up"):
        said = bare_launcher(verb, "standin", *flags, SET_HERE="", **engine).stderr
        assert "tml: NOT_SET_HERE is not set here: the container does without it\n" in said
        assert said.count("is not set here") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("run", "--memory", "4x"),
        ("run", "--shm-size", "0"),
        ("run", "--nproc-per-node", "two"),
        ("run", "--env", "1BAD=2"),
        ("run", "--publish", "foo"),
        ("run", "--name", "a b"),
        ("run", "--gpus", "some"),
        ("run", "--mount", "/run:/x"),
        ("up", "--workers", "-1"),
        ("up", "--max-restarts", "-1"),
    ],
)
def test_a_mistaken_value_of_a_flag_ends_with_2(bare_launcher: Any, flags: tuple[str, ...]) -> None:
    verb, flag, value = flags
    engine = {"DOCKER_HOST": "unix:///none.sock"}
    done = bare_launcher(verb, "standin", flag, value, "--dry-run", **engine)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_a_project_that_is_not_there_needs_no_engine_to_be_missed(bare_launcher: Any) -> None:
    done = bare_launcher("run", "nope", DOCKER_HOST="unix:///none.sock")
    assert done.returncode == 2
    assert "project 'nope' not found" in done.stderr
    assert re.search(r"there are: p\d+/standin\.", done.stderr)


@pytest.mark.parametrize("verb", ["ps", "stop", "gc", "logs", "wait", "exec"])
def test_an_engine_that_fails_while_it_is_asked_is_told_in_a_line(
    bare_launcher: Any, tmp_path: Path, verb: str
) -> None:
    class Broken(http.server.BaseHTTPRequestHandler):
        """Says its version, and fails at everything else."""

        def do_GET(self) -> None:
            good = self.path == "/version"
            self.send_response(200 if good else 500)
            self.end_headers()
            self.wfile.write(b'{"ApiVersion": "1.45"}' if good else b'{"message": "out of sorts"}')

        def address_string(self) -> str:
            return ""

        def log_message(self, *_: object) -> None:
            pass

    path = tmp_path / "broken.sock"
    with socketserver.UnixStreamServer(str(path), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = bare_launcher(verb, DOCKER_HOST=f"unix://{path}")
        server.shutdown()
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"tml: the engine did not do what {verb} asked: 500")
    assert "out of sorts" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody without a home")
def test_a_user_without_a_home_is_told_so(bare_launcher: Any) -> None:
    become = ["setpriv", "--reuid", "4321", "--regid", "4321", "--clear-groups"]
    readable = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    bare_launcher.argv = [*become, *readable, *bare_launcher.argv]
    del bare_launcher.env["HOME"]
    done = bare_launcher("ps")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == (
        "tml: HOME is not set and this user has no entry in the user database: export HOME\n"
    )


def test_an_unknown_flag_is_refused_and_no_abbreviation_is_guessed(bare_launcher: Any) -> None:
    assert bare_launcher("run", "standin", "--mem", "1g").returncode == 2
    assert bare_launcher("build", "--", "x").returncode != 0


def test_inputs_are_hashed_by_content_and_variant(bare_launcher: Any) -> None:
    base = bare_launcher.base
    before = image.hash_inputs(base, "cpu")
    assert image.hash_inputs(base, "cpu") == before
    assert len({image.hash_inputs(base, variant) for variant in ("cpu", "gpu", "dev")}) == 3
    (base / "projects" / "code.py").write_text("pass\n")
    assert image.hash_inputs(base, "cpu") == before
    (base / "requirements" / "dev.txt").write_text("pytest==1\n")
    assert image.hash_inputs(base, "cpu") == before
    (base / "requirements" / "launcher.txt").write_text("docker==7.2.1\n")
    after = image.hash_inputs(base, "cpu")
    assert after != before
    (base / "tml" / "native" / "rows.c").write_text("int rows;\n")
    assert image.hash_inputs(base, "cpu") != after


def events(*lines: str) -> list[dict[str, str]]:
    """A build as the engine tells it."""
    return [{"stream": f"{line}\n"} for line in lines]


def test_a_build_is_followed_step_by_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    build.follow(
        "x", events("Step 1/2 : FROM a", " ---> 12", "Step 2/2 : RUN b", "\x1b[91mred\x1b[0m")
    )
    told = [record.getMessage() for record in caplog.records]
    assert told == ["x: step 1 of 2, 0 s: FROM a", "x: step 2 of 2, 0 s: RUN b", "    red"]


def test_a_failed_build_ends_with_the_last_lines_of_its_step() -> None:
    output = events("Step 1/1 : RUN b", *(f"line {n}" for n in range(30)))
    with pytest.raises(LauncherError) as caught:
        build.follow("x", [*output, {"error": "returned a non-zero code: 3"}])
    lines = str(caught.value).splitlines()
    assert lines[0] == "image x was not built: returned a non-zero code: 3"
    assert lines[1] == "  at step 1 of 1: RUN b"
    assert lines[2:] == [f"    line {n}" for n in range(10, 30)]


def test_a_build_on_a_terminal_shows_one_step_and_one_line() -> None:
    from rich.console import Console

    progress = build._LiveProgress("x")
    progress.step(2, 7, "RUN b")
    progress.line("now")
    console = Console(width=60)
    with console.capture() as captured:
        console.print(progress)
    first, second = captured.get().splitlines()
    assert first.split() == ["building", "x", "step", "2", "of", "7", "0:00", "RUN", "b"]
    assert second.rstrip() == "  now"
