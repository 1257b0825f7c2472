"""compose-env: .env from the plan of `up`, beside what the user wrote there."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tml.docker import compose

REPOSITORY = Path(__file__).resolve().parents[2]


def read(file: Path) -> dict[str, str]:
    """Names and values, as they stand."""
    lines = [line for line in file.read_text().splitlines() if "=" in line and line[0] != "#"]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_file_has_the_values_of_the_plan(bare_launcher: Any) -> None:
    flags = ["--project=standin", "--workers=3", "--shm-size=1g", "--memory=2g", "--cpus=1.5"]
    done = bare_launcher("compose-env", *flags, "--nproc-per-node=2", "--data=.", "--", "--x", "1")
    assert done.returncode == 0, done.stderr
    assert "next, in" in done.stderr
    values = read(bare_launcher.base / ".env")
    assert values["TML_SCRIPT"].endswith("/standin/scripts/run_in_docker.sh")
    assert values["TML_ARGS"] == '"--x 1"'
    assert (values["TML_WORKERS"], values["TML_MACHINE_SHARE"]) == ("3", "4")
    assert (values["TML_NPROC_PER_NODE"], values["TML_CPUS"]) == ("2", "1.5")
    assert (values["TML_SHM_SIZE"], values["TML_MEMORY"]) == (str(1 << 30), str(2 << 30))
    assert values["TML_HOME"] == values["TML_DATA"] == str(bare_launcher.home)


def test_mounted_folders_are_made_by_the_caller(bare_launcher: Any) -> None:
    assert bare_launcher("compose-env", "--project=standin").returncode == 0
    assert (bare_launcher.home / ".config").is_dir()
    assert (bare_launcher.home / "tmp").is_dir()


def test_a_dash_prints_and_makes_nothing(bare_launcher: Any) -> None:
    done = bare_launcher("compose-env", "--project=standin", "--output=-")
    assert "TML_WORKERS=1" in done.stdout.splitlines()
    assert not (bare_launcher.base / ".env").exists()
    assert not (bare_launcher.home / "tmp").exists()


def test_what_the_user_wrote_stays_and_a_clash_is_named(bare_launcher: Any) -> None:
    file = bare_launcher.base / ".env"
    file.write_text("MINE=1\nexport TML_WORKERS=9")
    first = bare_launcher("compose-env", "--project=standin", "--workers=2")
    assert "also sets TML_WORKERS" in first.stderr
    file.write_text(file.read_text() + "LAST=x\n")
    assert bare_launcher("compose-env", "--project=standin", "--workers=4").returncode == 0
    text = file.read_text()
    assert text.startswith("MINE=1\nexport TML_WORKERS=9\n" + compose.BEGIN)
    assert text.endswith(compose.END + "\nLAST=x\n")
    assert text.count("TML_WORKERS=4") == 1
    assert "TML_WORKERS=2" not in text


def test_no_secret_reaches_the_file(bare_launcher: Any) -> None:
    bare_launcher("compose-env", "--project=standin", HF_TOKEN="planted", TML_TOKEN="planted")
    assert "planted" not in (bare_launcher.base / ".env").read_text()


def test_a_mistake_is_said_and_writes_nothing(bare_launcher: Any) -> None:
    done = bare_launcher("compose-env", "--project=standin", "--workers=-1")
    assert (done.returncode, "--workers -1: expected 0 or more" in done.stderr) == (2, True)
    assert bare_launcher("compose-env", "--project=none").returncode == 2
    assert bare_launcher("compose-env", "--project=standin", "--data=absent").returncode == 2
    assert not (bare_launcher.base / ".env").exists()


@pytest.mark.skipif(shutil.which("docker") is None, reason="reads the file as Compose does")
@pytest.mark.parametrize("value", ["a b", 'x="y z"', "it's $HOME", "back\\slash", "a`b`"])
def test_compose_reads_each_value_as_it_was(tmp_path: Path, value: str) -> None:
    (tmp_path / ".env").write_text("\n".join(["", f"VALUE={compose._quoted(value)}", ""]))
    (tmp_path / "compose.yml").write_text(
        "services: {a: {image: a, environment: {VALUE: '${VALUE}'}}}\n"
    )
    done = subprocess.run(
        ["docker", "compose", "config", "--format", "json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    # What is printed could be read again: a dollar stands twice there.
    written = json.loads(done.stdout)["services"]["a"]["environment"]["VALUE"]
    assert written.replace("$$", "$") == value
