"""`run` on the real engine: the contract, exit status, streams, signals, and that nothing is left
behind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError

from tests.stand_in import GRACEFUL, STAND_IN, containers, records, was_interrupted
from tml.docker import launch
from tml.docker import plan as plans
from tml.docker.container import explain
from tml.docker.errors import LauncherError
from tml.docker.plan import Variant

pytestmark = pytest.mark.docker

REPOSITORY = Path(__file__).resolve().parents[2]

DEAF = """
import sys
from tml.docker import __main__, container, engine
container.Container.when_ended = lambda *_, **__: None
engine.LOOK_EVERY_S = 0.5
sys.exit(__main__.main())
"""
"""The launcher with an engine that never tells of an exit, as one does that is so slow that it took
note of our waiting only after the exit.
"""


def test_the_running_container_matches_the_contract(launcher: Any, client: Any, until: Any) -> None:
    launcher.script("sleep 60\n")
    process = launcher.start("run", "standin")
    running = until(lambda: containers(client, status="running"))
    found = client.inspect_container(running[0]["Id"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143

    config, host = found["Config"], found["HostConfig"]
    mounts = {m["Destination"]: (m["Source"], m["RW"]) for m in found["Mounts"]}
    assert mounts == {
        "/usr/src/app/tml": (str(launcher.base), True),
        "/root/.config": (f"{launcher.home}/.config", False),
        "/root/tmp": (f"{launcher.home}/tmp", True),
    }
    env = dict(item.split("=", 1) for item in config["Env"])
    assert env["PYTHONPATH"].startswith("/usr/src/app/")
    assert env["SPEC_TYPE"] == "chief"
    assert config["Image"] == "local/torch"
    assert config["WorkingDir"] == "/usr/src/app"
    assert config["Cmd"] == [
        "bash",
        f"tml/projects/{STAND_IN}/scripts/run_in_docker.sh",
    ]
    assert config["User"] == f"{os.getuid()}:{os.getgid()}"
    assert config["StopTimeout"] == 45
    assert (config["Tty"], config["OpenStdin"]) == (False, False)
    assert host["NetworkMode"] == "host"
    assert host["ShmSize"] == 2 << 30
    assert host["Init"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["PidsLimit"] == 8192
    labels = config["Labels"]
    assert labels["tml.owner"].split(":")[1] == str(process.pid)
    assert (labels["tml.role"], labels["tml.project"]) == ("chief", STAND_IN)


@pytest.mark.parametrize("status", [0, 1, 3, 42, 125, 126, 127, 137, 143, 255])
def test_the_exit_status_is_the_containers(launcher: Any, status: int) -> None:
    launcher.script("exit $1\n")
    assert launcher("run", "standin", "--", str(status)).returncode == status


def test_a_container_that_ends_at_once_keeps_its_status_each_time(launcher: Any) -> None:
    launcher.script("exit 9\n")
    assert [launcher("run", "standin").returncode for _ in range(5)] == [9] * 5


def test_output_arrives_whole_and_the_two_streams_stay_apart(launcher: Any) -> None:
    launcher.script("seq 200000; echo told >&2; printf 'no newline'\n")
    done = launcher("run", "standin")
    assert done.stdout == "".join(f"{n}\n" for n in range(1, 200001)) + "no newline"
    assert "told\n" in done.stderr


def test_output_that_is_read_late_is_not_lost(launcher: Any, client: Any, until: Any) -> None:
    launcher.script("seq 60000\n")
    process = launcher.start("run", "standin")
    # The container is over, and its output fills every pipe on the way to us.
    until(lambda: containers(client, status="exited"))
    out, _ = process.communicate(timeout=20)
    assert out == "".join(f"{n}\n" for n in range(1, 60001))


def test_a_container_that_closes_its_output_is_waited_for(launcher: Any) -> None:
    launcher.script("exec >&- 2>&-; sleep 1; exit 7\n")
    assert launcher("run", "standin").returncode == 7


def test_arguments_reach_the_entry_script_as_they_were_given(launcher: Any) -> None:
    launcher.script('printf "[%s]" "$@"\n')
    done = launcher("run", "standin", "--", "--set", "a.b=1 2", "", "--", "$HOME")
    assert done.stdout == "[--set][a.b=1 2][][--][$HOME]"


def test_what_the_flags_ask_for_is_so_inside(launcher: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "edges").write_text("edges\n")
    launcher.script(
        "cat /data/edges; touch /data/x 2>/dev/null && echo written\n"
        "echo $PET_NPROC_PER_NODE $A $B\n"
        "df -k --output=size /dev/shm | tail -1; cat /sys/fs/cgroup/memory.max 2>/dev/null ||"
        " cat /sys/fs/cgroup/memory/memory.limit_in_bytes; ls /root/.config/tried; echo $?\n"
    )
    flags = ["--data", str(tmp_path / "data"), "--nproc-per-node=2", "--env=A=1", "--env=B"]
    flags += ["--shm-size=64m", "--memory=256m", "--config-mount=none", "--network=none"]
    done = launcher("run", "standin", *flags, B="by name")
    assert done.stdout.split() == ["edges", "2", "1", "by", "name", "65536", "268435456", "2"]


def test_the_first_signal_stops_with_grace(launcher: Any, client: Any) -> None:
    launcher.script(GRACEFUL)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        process = launcher.start("run", "standin")
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (status, "saving\nsaved\n"), err
        assert containers(client) == []


def test_the_second_signal_kills(launcher: Any, client: Any) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("run", "standin", "--env", "LINGER=60")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert time.monotonic() - started < 5
    assert containers(client) == []


def test_what_does_not_stop_is_killed_when_the_grace_is_over(launcher: Any) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("run", "standin", "--env", "LINGER=60", "--stop-grace", "1")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "saving\n")
    assert "not stopped after 1 s" in err


def test_a_signal_at_any_early_moment_leaves_nothing(launcher: Any, client: Any) -> None:
    launcher.script("sleep 60\n")
    for delay_s in (0.05, 0.15, 0.25, 0.3, 0.35, 0.4, 0.5):
        process = launcher.start("run", "standin")
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert was_interrupted(process.returncode, err), (delay_s, err)
        assert containers(client) == []


def test_output_that_nobody_reads_any_more_stops_the_run(launcher: Any) -> None:
    launcher.script("while true; do echo line; done\n")
    process = launcher.start("run", "standin")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE


def test_memory_that_runs_out_is_named(launcher: Any) -> None:
    launcher.script("exec python3 -c 'x = bytearray(1 << 30)'\n")
    done = launcher("run", "standin", "--memory", "64m")
    assert done.returncode == 137
    assert "out of memory: limit 64 MiB" in done.stderr
    assert "raise --memory" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_files_belong_to_the_caller_who_is_not_root(launcher: Any) -> None:
    group = os.stat("/var/run/docker.sock").st_gid
    launcher.script("touch /root/tmp/mine; id -u; python3 -c 'import getpass; getpass.getuser()'\n")
    for folder in (launcher.base, launcher.home):
        os.chown(folder, 4321, 4322)
        folder.chmod(0o755)
    # This Python may lie in a folder that only root reads.
    become = ["setpriv", "--reuid", "4321", "--regid", "4322", "--groups", str(group)]
    readable = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    launcher.argv = [*become, *readable, *launcher.argv]
    done = launcher("run", "standin")
    assert (done.returncode, done.stdout) == (0, "4321\n"), done.stderr
    mine = (launcher.home / "tmp" / "mine").stat()
    assert (mine.st_uid, mine.st_gid) == (4321, 4322)
    assert (launcher.home / "tmp").stat().st_uid == 4321
    assert (launcher.home / ".config").stat().st_uid == 4321


@pytest.mark.skipif(os.getuid() != 0, reason="only root can own what others cannot read")
def test_root_reads_in_the_container_what_root_reads_outside(launcher: Any) -> None:
    launcher.script("cat /usr/src/app/tml/private\n")
    (launcher.base / "private").write_text("seen\n")
    (launcher.base / "private").chmod(0o600)
    os.chown(launcher.base / "private", 4321, 4321)
    os.chown(launcher.base, 4321, 4321)
    assert launcher("run", "standin").stdout == "seen\n"


def test_a_run_that_fails_is_told_with_its_last_lines_and_noted_down(launcher: Any) -> None:
    launcher.script("seq 30; echo 'ValueError: no such column' >&2; exit 1\n")
    done = launcher("run", "standin")
    assert done.returncode == 1
    assert "ended with exit code 1: ValueError: no such column" in done.stderr
    assert "tml:     30\n" in done.stderr
    (path,) = records(launcher)
    record = json.loads(path.read_text())
    assert (record["verb"], record["state"], record["exit_code"]) == ("run", "ended", 1)
    assert record["cause"].endswith("no such column")


def test_without_a_terminal_the_output_is_kept_too_and_the_record_is_true(launcher: Any) -> None:
    launcher.script(
        "trap 'echo saving; sleep 2; exit 0' TERM; echo ready; echo $TOKEN\n"
        "while true; do sleep 0.1; done\n"
    )
    process = launcher.start("run", "standin", "--env", "TOKEN=planted-5ecret")
    assert process.stdout.readline() == "ready\n"
    (path,) = records(launcher)
    assert json.loads(path.read_text())["state"] == "running"
    process.send_signal(signal.SIGINT)
    process.stdout.readline()
    assert process.stdout.readline() == "saving\n"
    assert json.loads(path.read_text())["state"] == "stopping"
    process.communicate(timeout=20)
    record = json.loads(path.read_text())
    assert (record["state"], record["exit_code"]) == ("ended", 130)
    assert record["logs"] == str(launcher.home / "tmp/runs/standin/logs" / record["job"])
    assert (Path(record["logs"]) / "chief.log").read_text() == "ready\n***\nsaving\n"


def test_a_secret_in_the_last_lines_is_not_noted_down(launcher: Any) -> None:
    launcher.script('echo "ValueError: bad token $TOKEN"; exit 1\n')
    done = launcher("run", "standin", "--env", "TOKEN=planted-5ecret")
    assert done.returncode == 1
    # What the program prints is its own affair; what we say of it is ours.
    assert "planted-5ecret" not in done.stderr
    assert "ValueError: bad token ***" in done.stderr
    (path,) = records(launcher)
    assert "planted-5ecret" not in path.read_text()


def test_a_container_that_somebody_removes_is_named(launcher: Any, client: Any) -> None:
    launcher.script("echo ready; sleep 60\n")
    process = launcher.start("run", "standin")
    assert process.stdout.readline() == "ready\n"
    client.remove_container(containers(client)[0]["Id"], force=True)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    # It depends on how far the engine was when it was asked.
    assert "is gone: somebody removed it" in err or "docker rm -f" in err


def test_a_container_that_is_gone_when_its_end_is_read_is_named(launcher: Any, client: Any) -> None:
    launcher.argv = [sys.executable, "-c", DEAF]
    launcher.script("echo ready; sleep 60\n")
    process = launcher.start("run", "standin")
    assert process.stdout.readline() == "ready\n"
    client.remove_container(containers(client)[0]["Id"], force=True)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "is gone: somebody removed it" in err


def test_an_exit_that_the_engine_did_not_tell_of_is_seen(launcher: Any) -> None:
    launcher.argv = [sys.executable, "-c", DEAF]
    launcher.script("exit 6\n")
    assert launcher("run", "standin").returncode == 6


def test_a_detached_run_prints_its_name_and_is_removed_when_it_ends(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("echo begun; sleep 2; echo done > /root/tmp/done; exit 3\n")
    done = launcher("run", "standin", "--detach", "--name", "tml-standin-detached")
    assert (done.returncode, done.stdout) == (0, "tml-standin-detached\n")
    assert len(containers(client, status="running")) == 1
    until(lambda: not containers(client))
    assert (launcher.home / "tmp" / "done").read_text() == "done\n"
    logs = launcher.home / "tmp/runs/standin/logs/tml-standin-detached"
    assert (logs / "chief.log").read_text() == "begun\n"
    jobs = launcher.home / ".local" / "state" / "tml" / "jobs"
    # Noted down last of all.
    record = until(
        lambda: (r := json.loads((jobs / "tml-standin-detached.json").read_text()))["ended"] and r
    )
    assert (record["exit_code"], record["logs"]) == (3, str(logs))


def test_the_dry_run_pasted_into_a_shell_does_the_same(launcher: Any) -> None:
    launcher.script(
        'echo "$@" $TOKEN $SPEC_TYPE; id -u; pwd; ls /mnt/x; ls -A /root/.config; exit 5\n'
    )
    folder = launcher.home / "a, b"
    folder.mkdir()
    (folder / "file").touch()
    (launcher.home / ".config").mkdir()
    (launcher.home / "tmp").mkdir()
    argv = ["run", "standin", "--env", "TOKEN", "--mount", f"{folder}:/mnt/x:ro", "--memory", "1g"]
    argv += ["--cpus", "0.5", "--", "it's", "$HOME", "a  b"]
    ours = launcher(*argv, TOKEN="planted")
    shown = launcher(*argv[:2], "--dry-run", *argv[2:], TOKEN="planted")
    assert shown.stdout.count("\n") == 1
    assert "planted" not in shown.stdout + shown.stderr
    typed = subprocess.run(
        ["bash", "-c", shown.stdout],
        env={**launcher.env, "TOKEN": "planted"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert typed.returncode == ours.returncode == 5, typed.stderr
    assert typed.stdout == ours.stdout
    assert "planted chief" in ours.stdout


def test_the_dry_run_starts_the_container_that_run_starts(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("sleep 60\n")
    flags = ["standin", "--memory=1g", "--stop-grace=7", "--cpus=1.5"]

    def inspected(process: "subprocess.Popen[str]") -> dict[str, Any]:
        found = client.inspect_container(
            until(lambda: containers(client, status="running"))[0]["Id"]
        )
        client.remove_container(found["Id"], force=True)
        process.communicate(timeout=20)
        return dict(found)

    ours = inspected(launcher.start("run", *flags))
    line = launcher("run", *flags, "--dry-run").stdout
    typed = inspected(
        subprocess.Popen(
            ["bash", "-c", line],
            env=launcher.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    for found in (ours, typed):
        # What differs from run to run, and what only says who removes the container.
        for label in ("tml.run", "tml.job", "tml.owner"):
            found["Config"]["Labels"].pop(label, None)
        found["HostConfig"].pop("AutoRemove")
        found["Config"]["Env"].sort()
    for part in ("Config", "HostConfig"):
        # docker spells "not set" in several ways: null, [], -1.
        a, b = ({k: v for k, v in x[part].items() if v and v != -1} for x in (ours, typed))
        assert a == b


def test_the_second_run_builds_nothing_and_needs_no_network(launcher: Any, client: Any) -> None:
    before = client.inspect_image("local/torch")["Id"]
    unreachable = {
        "PIP_INDEX_URL": "http://127.0.0.1:1/simple",
        "HTTPS_PROXY": "http://127.0.0.1:1",
    }
    done = launcher("run", "standin", "--network", "none", **unreachable)
    assert done.returncode == 0
    assert "building" not in done.stderr
    assert client.inspect_image("local/torch")["Id"] == before


def test_editing_code_is_seen_at_once_and_rebuilds_nothing(launcher: Any, client: Any) -> None:
    before = client.inspect_image("local/torch")["Id"]
    for word in ("first", "second"):
        launcher.script(f"echo {word}\n")
        done = launcher("run", "standin")
        assert (done.stdout, "building" in done.stderr) == (f"{word}\n", False)
    assert client.inspect_image("local/torch")["Id"] == before


def test_the_image_has_what_training_imports_for_any_user(launcher: Any) -> None:
    shutil.copytree(
        Path(__file__).resolve().parents[2] / "tml" / "machines", launcher.base / "tml" / "machines"
    )
    (launcher.base / "tml" / "__init__.py").touch()
    launcher.script(
        "python -m tml.machines.is_venv || exit 1\n"
        "python -c 'import torch, torchrec, fbgemm_gpu, polars, getpass, tml;"
        "print(tml.__file__, getpass.getuser())' 2>/dev/null\n"
        "touch ~/cache && echo writable\n"
    )
    done = launcher("run", "standin", "--user", "4321:4321")
    assert done.stdout.startswith("/usr/src/app/tml/tml/__init__.py ")
    assert done.stdout.endswith("writable\n")


def test_the_engines_refusals_are_told_in_our_words(
    launcher: Any, client: Any, tmp_path: Path
) -> None:
    def message(*flags: str, code: int = 125) -> str:
        done = launcher("run", "standin", *flags)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        return str(done.stderr.splitlines()[-1])

    assert "network tml-no-such" in message("--network", "tml-no-such")
    missing = tmp_path / "missing"
    assert f"mount source {missing} (for /data) does not exist" in message(
        "--data", str(missing), code=2
    )
    (tmp_path / "link").symlink_to("/var/run/docker.sock")
    assert "engine's socket" in message("--mount", f"{tmp_path / 'link'}:/sock", code=2)
    taken = client.create_container("local/torch", name="tml-standin-taken")["Id"]
    try:
        assert "tml-standin-taken exists already" in message("--name", "tml-standin-taken")
    finally:
        client.remove_container(taken)


def test_a_gpu_that_this_engine_cannot_give_is_an_error_and_no_silent_processor_run(
    launcher: Any, client: Any
) -> None:
    if "nvidia" in client.info()["Runtimes"]:
        pytest.skip("this engine has a GPU runtime")
    for verb in ("run", "up"):
        # Before the image is built, which takes gigabytes.
        done = launcher(verb, "standin", "--gpus", "all")
        assert (done.returncode, done.stdout) == (125, "")
        assert "Install the NVIDIA Container Toolkit" in done.stderr
        assert "building" not in done.stderr
        shown = launcher(verb, "standin", "--gpus", "all", "--dry-run")
        assert shown.returncode == 0
        assert "--gpus all" in shown.stdout
        assert "Install the NVIDIA Container Toolkit" in shown.stderr


def test_the_engines_own_refusal_of_a_gpu_is_told_the_same_way(client: Any) -> None:
    if "nvidia" in client.info()["Runtimes"]:
        pytest.skip("this engine has a GPU runtime")
    created = client.create_container(
        "local/torch",
        host_config=client.create_host_config(
            device_requests=[{"Count": -1, "Capabilities": [["gpu"]]}]
        ),
    )
    try:
        with pytest.raises(APIError) as refused:
            client.start(created)
    finally:
        client.remove_container(created)
    told = str(explain(SimpleNamespace(name="x"), refused.value))  # type: ignore[arg-type]
    assert "could not select device driver" in told
    assert "Install the NVIDIA Container Toolkit" in told


@pytest.mark.parametrize(("variant", "flag"), [("cpu", ""), ("gpu", " --gpu"), ("dev", " --dev")])
def test_an_image_that_is_missed_is_asked_for_with_its_own_flag(
    client: Any, monkeypatch: pytest.MonkeyPatch, variant: Variant, flag: str
) -> None:
    monkeypatch.setitem(plans.IMAGES, variant, "local/tml-not-there")
    with pytest.raises(LauncherError) as caught:
        launch._ensure_image(client, REPOSITORY, variant, "never")
    assert str(caught.value).endswith(f"python -m tml.docker build{flag}")
    assert caught.value.exit_code == 125


def test_the_plan_as_json_is_what_runs(launcher: Any) -> None:
    plan = json.loads(launcher("run", "standin", "--json", "--env", "API_KEY=planted").stdout)
    assert plan["command"] == [
        "bash",
        f"tml/projects/{STAND_IN}/scripts/run_in_docker.sh",
    ]
    assert {"name": "API_KEY", "value": None, "secret": True} in plan["env"]
