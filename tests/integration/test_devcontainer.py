"""The dev container, started by the dev containers' own command line: up, work in it, remove.

`.devcontainer/cli.sh` installs that command line by npm. Where npm is missing these tests are left
out, or fail with TML_REQUIRE_DOCKER=1.
"""

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tml.docker import connection
from tml.machines import environment

pytestmark = [pytest.mark.docker, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
IDS = (4242, 4343)
"""User and group of the second caller: ids that neither this machine nor the image knows."""
# A mount namespace of its own, in which the caller has a name: the command line asks for it.
AS_SECOND = """
mount --bind "$1" /etc/passwd
exec setpriv --reuid 4242 --regid 4343 --groups "$(stat -c %g "$2")" "${@:3}"
"""


class DevContainer:
    """`.devcontainer/cli.sh` of a checkout, as one caller, on a container of this test's own."""

    def __init__(self, checkout: Path, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.checkout, self.prefix = checkout, prefix
        self.label = f"tml.test={uuid.uuid4().hex}"
        # The command line keeps files below TMPDIR.
        self.env = {**os.environ, "TMPDIR": str(folder)}
        self.env.pop("TML_DEVCONTAINER_USER", None)

    def __call__(self, verb: str, *args: str) -> str:
        """What `verb` prints; it must succeed."""
        argv = [*self.prefix, str(self.checkout / ".devcontainer" / "cli.sh"), verb]
        done = subprocess.run(
            [*argv, "--id-label", self.label, *args],
            cwd=self.checkout,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"cli.sh {verb} {args}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def up(self) -> dict[str, Any]:
        """Start it; what the command line says of it."""
        said: dict[str, Any] = json.loads(self("up").splitlines()[-1])
        assert said["outcome"] == "success"
        assert said["remoteWorkspaceFolder"] == "/usr/src/app/tml"
        return said


@pytest.fixture(scope="module")
def npm() -> None:
    """The command line can be installed."""
    if shutil.which("npm"):
        return
    message = "npm is missing, which installs the dev containers' command line: install Node.js 20"
    if os.environ.get(environment.TML_REQUIRE_DOCKER) == "1":
        pytest.fail(f"{environment.TML_REQUIRE_DOCKER}=1: {message}", False)
    pytest.skip(message)


@pytest.fixture
def folder(npm: None) -> Iterator[Path]:
    """A folder that a second user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="tml-devcontainer-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def dev_container(folder: Path, client: Any) -> Iterator[DevContainer]:
    """The dev container of this checkout, for the caller of the tests."""
    yield from _removed(DevContainer(REPOSITORY, folder), client)


@pytest.fixture
def second_dev_container(folder: Path, client: Any) -> Iterator[DevContainer]:
    """The dev container of a second user's own checkout."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a second user")
    url = connection.connect()[1].url
    if not url.startswith("unix://"):
        pytest.skip(f"the engine at {url} sees no file of this machine")
    socket = url.removeprefix("unix://")
    checkout, home = folder / "checkout", folder / "home"
    _copy_checkout(checkout)
    # What the caller has and the second needs: pip's settings, and the command line.
    _copy_if_there(Path.home() / ".config" / "pip", home / ".config" / "pip")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tml"
    subprocess.run([REPOSITORY / ".devcontainer" / "cli.sh", "read-configuration"], check=True)
    _copy_if_there(cache, home / ".cache" / "tml")
    users = folder / "passwd"
    entry = f"second:x:{IDS[0]}:{IDS[1]}::{home}:/bin/bash\n"
    users.write_text(Path("/etc/passwd").read_text() + entry)
    subprocess.run(["chown", "-R", f"{IDS[0]}:{IDS[1]}", str(folder)], check=True)
    prefix = ["unshare", "--mount", "bash", "-ec", AS_SECOND, "as-second", str(users), socket]
    container = DevContainer(checkout, folder, prefix)
    container.env |= {"HOME": str(home), "USER": "second", "LOGNAME": "second"}
    container.env.pop("XDG_CACHE_HOME", None)
    yield from _removed(container, client)


def _copy_checkout(target: Path) -> None:
    """This checkout as it stands, without what git ignores, as a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target / name)
    subprocess.run(["git", "init", "--quiet", str(target)], check=True)


def _copy_if_there(source: Path, target: Path) -> None:
    if source.exists():
        shutil.copytree(source, target, symlinks=True)


def _removed(container: DevContainer, client: Any) -> Iterator[DevContainer]:
    """Afterwards it is removed, and nothing is left."""
    images = _made_images(client)
    staged = (container.checkout / ".build").exists()
    try:
        yield container
    finally:
        container("remove")
    assert client.containers(all=True, filters={"label": container.label}) == []
    assert _made_images(client) == images
    assert (container.checkout / ".build").exists() == staged


def _made_images(client: Any) -> set[str]:
    """The images that the command line makes."""
    tags = [tag for found in client.images() for tag in found["RepoTags"] or []]
    return {tag for tag in tags if tag.startswith("vsc-")}


def test_the_dev_container_and_the_plan_agree(dev_container: DevContainer, launcher: Any) -> None:
    launcher.base = REPOSITORY
    launcher.env |= {"TML_BASE": str(REPOSITORY), "HOME": str(Path.home())}
    plan = json.loads(launcher("run", "twhin", "--json").stdout)
    said = json.loads(dev_container("read-configuration"))["configuration"]
    assert said["image"] == "local/torch:dev"
    mounts = [_read_mount(text) for text in [said["workspaceMount"], *said["mounts"]]]
    assert mounts == plan["mounts"]
    planned = {variable["name"]: variable["value"] for variable in plan["env"]}
    for name in ("PYTHONPATH", "SPEC_TYPE", "TORCHINDUCTOR_CACHE_DIR"):
        assert said["containerEnv"][name] == planned[name]
    assert said["init"] is True
    assert said["hostRequirements"] == {"gpu": "optional"}
    assert said["remoteUser"] == said["containerUser"] == "dev"


def _read_mount(text: str) -> dict[str, Any]:
    parts: Mapping[str, str] = dict(part.partition("=")[::2] for part in text.split(","))
    assert parts["type"] == "bind"
    read_only = "readonly" in parts
    return {"source": parts["source"], "target": parts["target"], "read_only": read_only}


def test_the_checkout_is_tested_and_checked_in_the_dev_container(
    dev_container: DevContainer, client: Any, launcher: Any
) -> None:
    launcher.base = REPOSITORY
    launcher.env |= {"TML_BASE": str(REPOSITORY)}
    plan = json.loads(launcher("run", "twhin", "--json").stdout)
    said = dev_container.up()
    assert said["remoteUser"] == "dev"
    there = client.inspect_container(said["containerId"])
    limits = there["HostConfig"]
    assert limits["ShmSize"] == plan["shm_bytes"]
    assert limits["CapDrop"] == ["ALL"]
    assert limits["SecurityOpt"] == ["no-new-privileges"]
    assert limits["PidsLimit"] == 8192
    assert limits["Init"] is True
    assert not limits["Privileged"]
    assert {mount["Type"] for mount in there["Mounts"]} == {"bind"}
    assert not [mount for mount in there["Mounts"] if mount["Source"].endswith(".sock")]

    def run(command: str) -> str:
        return dev_container("exec", "bash", "-c", command).strip()

    assert run("id -un; echo $HOME; pwd; command -v python") == "\n".join(
        ["dev", "/root", "/usr/src/app/tml", "/opt/venv/bin/python"]
    )
    assert run("bash -lc 'command -v python'") == "/opt/venv/bin/python"
    assert run("id -u") != "0"
    tests = "tests/unit/test_losses.py tests/unit/test_config.py tests/unit/test_machines.py"
    assert " passed" in run(f"python -m pytest -q -m 'not docker' {tests}")
    assert "All checks passed" in run("ruff check tml/machines && ruff format --check tml/machines")
    assert "no issues" in run("mypy tml/machines")
    # Where there is a repository at all, whoever it belongs to.
    if (REPOSITORY / ".git").is_dir():
        assert run("git rev-parse --show-toplevel") == "/usr/src/app/tml"
    # A tool may keep settings although ~/.config is read-only.
    run('mkdir -p "$XDG_CONFIG_HOME/tool" && ! touch ~/.config/tool')


def test_files_made_in_the_dev_container_belong_to_the_caller(
    second_dev_container: DevContainer, image: str
) -> None:
    container = second_dev_container
    container.up()
    made = "touch made ~/tmp/made && python -m pytest -q tests/unit/test_machines.py && id"
    assert f"uid={IDS[0]}(dev) gid={IDS[1]}(dev)" in container("exec", "bash", "-c", made)
    home = Path(container.env["HOME"])
    for path in (container.checkout / "made", home / "tmp" / "made", home / ".config"):
        assert (path.stat().st_uid, path.stat().st_gid) == IDS
    strangers = [path for path in container.checkout.rglob("*") if path.lstat().st_uid != IDS[0]]
    assert strangers == []
