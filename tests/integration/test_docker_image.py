"""Image builds on the real engine, with the real Dockerfile and an installer that only looks at
what it was given.

The images made here have names of their own; local/torch is left alone.
"""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tml.docker import build, image, plan
from tml.docker.errors import LauncherError

pytestmark = pytest.mark.docker

NAME = "local/tml-test-image"
PLANTED = "planted-7f3c1a"

INSTALLER = f"""#!/bin/bash
set -e
grep -q 'index-url = http://user:{PLANTED}@127.0.0.1:1/simple' "$PIP_CONFIG_FILE"
ls /build/wheels
test -s "$PIP_CERT"
echo "variant $2 ${{3:-}}"
"""


@pytest.fixture
def checkout(bare_launcher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout whose images have other names, on a host whose pip has much to offer."""
    base: Path = bare_launcher.base
    # Builds of other tests may take minutes: those here do not wait for them.
    monkeypatch.setattr(build, "LOCK", f"tml-build-{tmp_path.name}.lock")
    for kernel in (base / "tml" / "native").iterdir():
        kernel.write_text("")  # to compile them would take a compiler, half a minute to install
    (base / "requirements" / "install.sh").write_text(INSTALLER)
    for variant in plan.IMAGES:
        monkeypatch.setitem(plan.IMAGES, variant, f"{NAME}:{variant}")
    links = tmp_path / "links"
    links.mkdir()
    for wheel in ("torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", "stranger-1.0-py3-none-any.whl"):
        (links / wheel).write_text(f"wheel {PLANTED}")
    (tmp_path / "certificates.pem").write_text(f"certificate {PLANTED}")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:{PLANTED}@127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "certificates.pem"))
    return base


@pytest.fixture
def remove_images(client: Any) -> Iterator[None]:
    """Afterwards the images made here are gone."""
    yield
    for variant in ("cpu", "gpu", "dev"):
        if client.images(f"{NAME}:{variant}"):
            client.remove_image(f"{NAME}:{variant}", force=True)


@pytest.mark.usefixtures("remove_images")
def test_what_pip_knows_reaches_the_build_and_no_layer_history_or_label(
    checkout: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    build.build_image(client, checkout, "cpu")
    assert "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl" in caplog.text
    assert "stranger" not in caplog.text
    assert "variant cpu" in caplog.text

    built = client.inspect_image(f"{NAME}:cpu")
    assert built["Config"]["Labels"][image.LABEL_INPUTS] == image.hash_inputs(checkout, "cpu")
    assert PLANTED not in json.dumps([built, client.history(f"{NAME}:cpu")])
    saved = b"".join(client.get_image(f"{NAME}:cpu"))
    assert PLANTED.encode() not in saved
    assert PLANTED not in caplog.text
    # Nothing of the stages that held it is kept either.
    assert client.images(filters={"dangling": True, "label": build.STAGE_LABEL}) == []


@pytest.mark.usefixtures("remove_images")
def test_an_image_is_current_until_its_inputs_change(checkout: Path, client: Any) -> None:
    assert image.built_from(client, "cpu") is None
    build.build_image(client, checkout, "cpu")
    assert image.built_from(client, "cpu") == image.hash_inputs(checkout, "cpu")
    before = client.inspect_image(f"{NAME}:cpu")["Id"]
    (checkout / "requirements" / "cpu.txt").write_text("# changed\n")
    assert image.built_from(client, "cpu") != image.hash_inputs(checkout, "cpu")
    build.build_image(client, checkout, "cpu")
    assert image.built_from(client, "cpu") == image.hash_inputs(checkout, "cpu")
    # The one before it is not left without a name.
    assert before not in [found["Id"] for found in client.images(all=True)]


@pytest.mark.usefixtures("remove_images")
def test_two_builds_at_once_take_turns_and_the_second_finds_it_built(
    checkout: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(build.build_image, client, checkout, "cpu", even_if_current=False)
            for _ in range(2)
        ]
        for one in both:
            one.result()
    assert caplog.text.count("another build is running on this machine") == 1
    assert caplog.text.count(f"built {NAME}:cpu in") == 1


def test_a_failing_build_shows_the_last_lines_of_the_step_and_leaves_nothing(
    checkout: Path, client: Any
) -> None:
    before = {found["Id"] for found in client.images(filters={"dangling": True})}
    (checkout / "requirements" / "install.sh").write_text(
        "for i in $(seq 50); do echo line $i; done; sleep 0.5; echo the cause >&2; exit 3\n"
    )
    with pytest.raises(LauncherError) as caught:
        build.build_image(client, checkout, "cpu")
    message = str(caught.value)
    assert message.startswith(f"image {NAME}:cpu was not built: it returned a non-zero code: 3\n")
    assert "at step 8 of " in message
    assert "RUN python3 -m venv /opt/venv" in message
    assert "the cause" in message
    assert "line 50" in message
    assert "line 5\n" not in message
    assert client.images(f"{NAME}:cpu") == []
    assert {found["Id"] for found in client.images(filters={"dangling": True})} <= before
    assert client.containers(all=True, filters={"ancestor": "local/tml-test-image"}) == []


def test_a_failing_build_ends_run_with_a_message_and_no_traceback(bare_launcher: Any) -> None:
    (bare_launcher.base / "requirements" / "install.sh").write_text("echo the cause; exit 3\n")
    done = bare_launcher("run", "standin", TMPDIR=str(bare_launcher.home))  # a lock of its own
    assert done.returncode == 125
    assert "tml: building local/torch (its inputs changed); --no-build takes" in done.stderr
    assert "tml: image local/torch was not built" in done.stderr
    assert "the cause" in done.stderr
    assert "Traceback" not in done.stderr


def test_staging_offers_the_same_to_buildkit(checkout: Path, bare_launcher: Any) -> None:
    folder = build.stage(checkout, "cpu")
    assert sorted(path.name for path in folder.iterdir()) == ["cert.pem", "pip.conf", "wheels"]
    assert (folder / "pip.conf").stat().st_mode & 0o777 == 0o600
    command = ["docker", "build", "--quiet", "--target", "runtime", "--network", "host"]
    (checkout / ".dockerignore").write_bytes(
        (Path(__file__).resolve().parents[2] / ".dockerignore").read_bytes()
    )
    done = subprocess.run(
        [*command, "--tag", f"{NAME}:buildkit", str(checkout)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    history = subprocess.run(
        ["docker", "history", "--no-trunc", f"{NAME}:buildkit"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    subprocess.run(["docker", "rmi", f"{NAME}:buildkit"], capture_output=True, check=True)
    assert PLANTED not in history


@pytest.mark.slow
def test_the_pinned_sets_are_what_the_image_holds(image: str) -> None:
    done = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", image, "python", "-m", "pip", "freeze"],
        capture_output=True,
        text=True,
        check=True,
    )
    held = {line.partition("+")[0].lower() for line in done.stdout.splitlines()}
    folder = Path(__file__).resolve().parents[2] / "requirements"
    for name in ("launcher", "train", "cpu"):
        for line in (folder / f"{name}.txt").read_text().splitlines():
            pinned = line.strip().lower()
            if "==" in pinned and not pinned.startswith(("#", "setuptools")):
                assert pinned in held
