"""doctor's judgements, from made-up facts: each level of each check; and what it prints."""

import json
import re
import subprocess
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tml.docker import checks, connection, doctor
from tml.docker.checks import Check
from tml.docker.connection import Endpoint, _no_engine, _no_permission
from tml.docker.plan import SHM_BYTES

GIB, MIB = 1 << 30, 1 << 20


def only(found: Check | list[Check]) -> Check:
    """The one check that is not ok, or the first."""
    if isinstance(found, Check):
        return found
    return next((check for check in found if check.level != "ok"), found[0])


CASES: dict[str, tuple[Check | list[Check], str, str]] = {
    "engine": (
        checks.engine("26.1.5", "unix:///var/run/docker.sock", "the default", None),
        "ok",
        r"26.1.5 at unix:///var/run/docker.sock \(from the default\)",
    ),
    "engine of a context": (
        checks.engine("27.0", "tcp://x", "DOCKER_HOST", "far"),
        "ok",
        r"\(from context far\)",
    ),
    "API": (checks.api("1.45"), "ok", r"1.45 \(1.40 is needed\)"),
    "API at the edge": (checks.api("1.40"), "ok", "1.40"),
    "API too old": (checks.api("1.39"), "error", "1.39; 1.40 is needed → update the engine"),
    "socket": (checks.socket_mode("unix:///s", 0o660, False), "ok", r"/s takes this user \(mode"),
    "socket for all": (checks.socket_mode("unix:///s", 0o666, False), "warning", "chmod 660 /s"),
    "bare TCP": (checks.socket_mode("tcp://far:2375", None, False), "warning", "neither encrypted"),
    "TCP with TLS": (checks.socket_mode("tcp://far:2376", None, True), "ok", "tcp://far"),
    "TCP to here": (checks.socket_mode("tcp://127.0.0.1:2375", None, False), "ok", "tcp://127"),
    "rootful": (checks.user("rootful", 1000, 100, "me"), "ok", "run as 1000:100, files are yours"),
    "rootless": (checks.user("rootless", 1000, 100, "me"), "ok", "run as 0:0"),
    "podman": (checks.user("podman-rootless", 1000, 100, "me"), "ok", "in namespace keep-id"),
    "remapped": (checks.user("remapped", 1000, 100, "me"), "error", "remaps users.*→.*rootless"),
    "remote": (checks.user("remote", 1000, 100, "me"), "error", "on another machine.*→.*ssh"),
    "storage": (checks.storage("overlay2", "/d", 50 * GIB), "ok", "driver overlay2"),
    "vfs": (checks.storage("vfs", "/d", 50 * GIB), "warning", "whole copy → .*overlay2"),
    "aufs": (checks.storage("aufs", "/d", None), "warning", "no longer maintained"),
    "little room": (checks.storage("overlay2", "/d", 5 * GIB), "warning", "5 GiB free at /d"),
    "no room": (checks.storage("overlay2", "/d", GIB), "error", "2 GiB are needed → docker system"),
    "machine": (checks.machine(16 * GIB, 8), "ok", "8 processors, 16 GiB of memory"),
    "little memory": (checks.machine(2 * GIB, 8), "warning", "half a GiB.*→.*nproc-per-node 1"),
    "one processor": (checks.machine(16 * GIB, 1), "warning", "two processes → --nproc"),
    "limits": (
        checks.limits({"MemoryLimit": True, "PidsLimit": True, "CgroupVersion": "2"}),
        "ok",
        "cgroup v2",
    ),
    "no limits": (
        checks.limits({"MemoryLimit": False, "CpuCfsQuota": True, "PidsLimit": False}),
        "warning",
        "cannot hold to --memory, the limit of processes:.*→.*Delegate=yes",
    ),
    # 2 GiB over 2 processes × 4 loaders × 2 batches
    "/dev/shm": (checks.shared_memory(2, 16 * GIB), "ok", "2 GiB.*2 batches of 128 MiB"),
    # 512 MiB over 8 × 4 × 2 = 8 MiB a batch, 16 are wanted: 1 GiB
    "/dev/shm for many": (
        checks.shared_memory(8, 64 * GIB, 512 * MIB),
        "warning",
        "batches of 8 MiB → --shm-size 1024m",
    ),
    "/dev/shm above memory": (checks.shared_memory(2, 3 * GIB), "warning", "→ --shm-size 384m"),
    "no GPU": (checks.gpus([], 0, None), "ok", "none here"),
    "GPU": (checks.gpus(["H100", "H100"], 2, "CDI"), "ok", r"2: H100 \(by CDI\)"),
    "GPU, no runtime": (checks.gpus(["H100"], 1, None), "warning", "nvidia-ctk runtime configure"),
    "GPU, no driver": (checks.gpus([], 1, "CDI"), "warning", "1 NVIDIA card.*→.*driver"),
    "image": (checks.image("cpu", "ab", "ab", GIB), "ok", "local/torch is current, 1 GiB"),
    "image stale": (
        checks.image("cpu", "cd", "ab", GIB),
        "warning",
        "local/torch is stale.*→ python -m tml.docker build; --no-build",
    ),
    "image without a label": (checks.image("dev", "", "ab", GIB), "warning", "says nothing.*--dev"),
    "image absent": (checks.image("cpu", None, "ab", None), "warning", "first run builds it"),
    "image absent, unneeded": (checks.image("gpu", None, "ab", None), "ok", "build --gpu"),
    "jobs": (checks.jobs(["tml-a"], [], []), "ok", "1 running: tml-a"),
    "no jobs": (checks.jobs([], [], []), "ok", "none running"),
    "stale runs": (
        checks.jobs([], ["tml-b-chief", "tml-b-worker-1"], ["tml-b"]),
        "warning",
        r"2 container\(s\) and 1 network\(s\).*tml-b-chief, .* → python -m tml.docker gc",
    ),
    "runs": (checks.run_disk("/r", 9 * GIB, 1, True, 1), "ok", "9 GiB free at /r"),
    "runs, little room": (checks.run_disk("/r", GIB, 1, True, 1), "warning", "--save_dir"),
    "runs, no room": (checks.run_disk("/r", 50 * MIB, 1, True, 1), "error", "100 MiB are needed"),
    "runs of root": (
        checks.run_disk("/r", 9 * GIB, 0, False, 1000),
        "error",
        r"/r cannot be written to: it belongs to user id 0 → sudo chown",
    ),
    "temporary": (checks.temporary_disk("/tmp", 2 * GIB), "ok", "free at /tmp"),
    "temporary, none": (checks.temporary_disk("/tmp", MIB), "error", "make room in /tmp"),
    "port": (checks.port(6006, "TensorBoard", True), "ok", "free, for TensorBoard"),
    "port taken": (
        checks.port(6006, "TensorBoard", False),
        "warning",
        "→ ss -ltnp 'sport = :6006'",
    ),
    "docker": (checks.command_line("Docker version 28.2.2"), "ok", "28.2.2"),
    "no docker": (checks.command_line(None), "warning", "no command docker.*→ install"),
    "Compose": (checks.compose("2.40.0"), "ok", "2.40.0$"),
    "Compose, a note": (checks.compose("2.26.1-4"), "ok", "came with 2.27"),
    "Compose 1": (checks.compose("1.29.2"), "warning", "1.29.2; 2.0 is needed"),
    "no Compose": (checks.compose(None), "warning", "tml.docker up. does not need it"),
    "Python": (checks.python((3, 12, 1), True, "/v", "7.2.0"), "ok", "3.12.1 at /v, a virtual"),
    "Python too old": (checks.python((3, 10, 1), True, "/v", "7.2.0"), "error", "3.11 is needed"),
    "docker-py too old": (checks.python((3, 11), True, "/v", "7.1.0"), "error", "contexts → ./scr"),
    "no docker-py": (checks.python((3, 11), False, "/v", None), "error", "not installed in /v → "),
    ".venv": (checks.environments({"cpu": "a", "dev": "a"}, "a", True), "ok", "cpu, dev current"),
    ".venv absent": (checks.environments({}, "a", False), "ok", "none in the checkout"),
    ".venv half made": (checks.environments({}, "a", True), "warning", "half made"),
    ".venv stale": (
        checks.environments({"launcher": "a", "cpu": "b", "dev": "b"}, "a", True),
        "warning",
        "cpu, dev stale.*→ ./scripts/setup_venv.sh cpu dev",
    ),
    ".venv launcher stale": (
        checks.environments({"launcher": "b"}, "a", True),
        "warning",
        "→ ./scripts/setup_venv.sh launcher",
    ),
    ".env absent": (checks.compose_file(None, {}), "ok", "defaults"),
    ".env": (checks.compose_file({"TML_USER": "0:0"}, {"TML_USER": "0:0"}), "ok", "current"),
    ".env stale": (
        checks.compose_file({"TML_USER": "0:0"}, {"TML_USER": "7:7", "TML_IMAGE_INPUTS": "a"}),
        "warning",
        "TML_USER is 0:0, not 7:7 → python -m tml.docker compose-env",
    ),
    "pip": (checks.pip({"index-url": "x"}, []), "ok", "a build takes over index-url x"),
    "pip's defaults": (checks.pip({}, []), "ok", "its defaults"),
    "pip, what is not there": (checks.pip({}, ["/wheels"]), "warning", "not there: /wheels → mend"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_check_judges_and_says_what_to_do(case: str) -> None:
    found, level, pattern = CASES[case]
    check = only(found)
    assert check.level == level
    assert re.search(pattern, f"{check.text} → {check.remedy}" if check.remedy else check.text)
    assert bool(check.remedy) == (level != "ok")


def test_each_failure_to_reach_an_engine_is_told_apart() -> None:
    none = checks.no_engine(_no_engine(["unix:///s (from DOCKER_HOST): no such file or directory"]))
    assert none.level == "error"
    assert none.text.endswith("Tried: unix:///s (from DOCKER_HOST): no such file or directory")
    assert none.remedy.startswith("Start it (")
    refused = checks.no_engine(_no_permission(Endpoint(url="unix:///s", origin="the default")))
    assert "may not speak to it" in refused.text
    assert refused.remedy.startswith("Join its group")


def test_the_rule_for_shared_memory_is_the_one_that_is_stated() -> None:
    assert checks.shared_memory(1, 64 * GIB).text == (
        "2 GiB a container: 1 process × 4 data loaders × 2 batches of 256 MiB"
    )
    assert SHM_BYTES == 1 * checks.LOADERS * checks.PREFETCHED * 256 * MIB


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.26.1-4", (2, 26)), ("v2.40.0", (2, 40)), ("26.1.5+dfsg1", (26, 1)), ("dev", ())],
)
def test_versions_are_read_as_people_write_them(text: str, version: tuple[int, ...]) -> None:
    assert checks.version_of(text) == version


@pytest.mark.parametrize(
    ("info", "runtime"),
    [
        ({}, None),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, "the runtime nvidia"),
        ({"DiscoveredDevices": [{"ID": "nvidia.com/gpu=0", "Source": "cdi"}]}, "CDI"),
        ({"DiscoveredDevices": None, "Runtimes": None}, None),
    ],
)
def test_the_gpu_runtime_is_found_in_what_the_engine_says(
    info: dict[str, Any], runtime: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert connection.gpu_runtime(info) == runtime


def test_passwords_in_addresses_are_not_shown() -> None:
    assert doctor._without_password("https://me:pw@host/simple /wheels https://other/x@1") == (
        "https://host/simple /wheels https://other/x@1"
    )


def test_the_stamp_is_the_one_that_setup_venv_writes(tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    for name in ("cpu.txt", "install.sh", "train.txt"):
        (tmp_path / "requirements" / name).write_text(name)
    command = 'cat "$0"/requirements/* | sha256sum | cut -c1-16'  # scripts/setup_venv.sh
    written = subprocess.run(
        ["bash", "-c", command, tmp_path], capture_output=True, text=True, check=True
    )
    assert doctor._environments(tmp_path) == ({}, written.stdout.strip(), False)


def test_an_engine_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ENGINE_TIMEOUT_S", 0.05)
    silent = threading.Event()
    asked: Any = doctor._Later(silent.wait)
    found = doctor._engine_checks(asked, doctor._Later(list))
    silent.set()
    assert (found[0].name, found[0].level) == ("engine", "error")
    assert "has not answered for 0.05 s" in found[0].text
    assert "systemctl restart docker" in found[0].remedy


def test_off_a_terminal_it_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._show([checks.api("1.45"), checks.port(6006, "TensorBoard", False)], "the end")
    first, second, remedy, last = capsys.readouterr().out.splitlines()
    assert first == "ok       API          1.45 (1.40 is needed)"
    assert second.startswith("warning  port 6006    taken")
    assert remedy.strip().startswith("→ ss -ltnp")
    assert last == "the end"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_errors_alone_decide_the_exit_status(
    level: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(name="x", level=level, text="t", remedy="r")
    monkeypatch.setattr(doctor, "examine", lambda checkout: [check])
    assert doctor.main(Namespace(json=True), []) == code
    told = json.loads(capsys.readouterr().out)
    assert told["checks"] == [{"name": "x", "level": level, "text": "t", "remedy": "r"}]
    assert (told["errors"], told["warnings"]) == (level == "error", level == "warning")
    assert doctor.main(Namespace(json=False), []) == code
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{told['errors']} error{'' if told['errors'] == 1 else 's'}, "
        f"{told['warnings']} warning{'' if told['warnings'] == 1 else 's'}"
    )
