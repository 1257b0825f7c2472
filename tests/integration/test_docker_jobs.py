"""ps, logs, stop, wait, exec and gc on the real engine, for jobs that are attached, in the
background, of several containers, and for those whose launcher is dead.
"""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tml.docker.owner import this_process

pytestmark = pytest.mark.docker

PROJECT = f"jobs{os.urandom(4).hex()}"
"""Of this run of the tests: others on this engine may have the same names."""
ONLY_OURS = f"""
import sys
from tml.docker import __main__, jobs
everything = jobs.find_running
def ours(client, label=jobs.LABEL_RUN):
    return [job for job in everything(client, label) if job.project == {PROJECT!r}]
jobs.find_running = ours
sys.exit(__main__.main())
"""
"""The launcher, which sees this project's jobs alone: what else runs here is not ours to stop."""
IDLE = """trap 'echo stopped; exit 0' TERM
echo ready
while true; do sleep 0.1; done
"""
STUBBORN = "trap '' TERM; echo ready; while true; do sleep 0.1; done\n"


def containers(client: Any) -> list[str]:
    """Names of all our containers."""
    found = client.containers(all=True, filters={"label": f"tml.project={PROJECT}"})
    return sorted(container["Names"][0].lstrip("/") for container in found)


def networks(client: Any) -> list[str]:
    """Names of our networks."""
    found = client.networks(filters={"label": f"tml.project={PROJECT}"})
    return [str(network["Name"]) for network in found]


@pytest.fixture
def jobs(bare_launcher: Any, client: Any, image: str) -> Iterator[Any]:
    """The launcher with a project of ours; afterwards nothing of it may be left."""
    launcher = bare_launcher
    launcher.argv = [sys.executable, "-c", ONLY_OURS]
    path = launcher.base / "projects" / PROJECT / "scripts" / "run_in_docker.sh"
    path.parent.mkdir(parents=True)
    launcher.script = path.write_text
    yield launcher
    # Only of a test that failed, or killed a launcher, is there something to end.
    launcher("stop", "--all", "--stop-grace", "0")
    launcher("gc")
    assert (containers(client), networks(client)) == ([], [])


@pytest.fixture
def attached(jobs: Any, until: Any) -> Iterator[Any]:
    """Starts an attached run, and comes back when its script has said something."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str = IDLE, *flags: str) -> subprocess.Popen[str]:
        jobs.script(script)
        process = jobs.start("run", PROJECT, *flags)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def detached(launcher: Any, script: str, *argv: str) -> str:
    """Name of a job that was started in the background."""
    launcher.script(script)
    verb, *others = argv or ("run", PROJECT)
    done = launcher(verb, "--detach", *others)
    assert done.returncode == 0, done.stderr
    return str(done.stdout.strip())


def listed(launcher: Any, *flags: str) -> list[dict[str, Any]]:
    """What `ps --json` says."""
    found: list[dict[str, Any]] = json.loads(launcher("ps", "--json", *flags).stdout)
    return found


def listed_one(launcher: Any, name: str) -> dict[str, Any]:
    """What `ps --all --json` says of one job."""
    return next(job for job in listed(launcher, "--all") if job["job"] == name)


# ps


def test_nothing_to_show_is_said_in_a_line_that_says_what_to_do(jobs: Any) -> None:
    done = jobs("ps")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "no job runs: start one with python -m tml.docker run" in done.stdout


def test_ps_shows_what_runs_and_then_how_it_ended(jobs: Any) -> None:
    name = detached(jobs, IDLE, "up", PROJECT)
    (job,) = listed(jobs)
    assert (job["job"], job["project"], job["verb"]) == (name, PROJECT, "up")
    assert (job["state"], job["exit_code"], job["ended"]) == ("running", None, None)
    assert [m["member"] for m in job["members"]] == ["chief", "worker-1"]
    assert {m["state"] for m in job["members"]} == {"running"}
    table = jobs("ps").stdout
    assert table.splitlines()[0].split() == [
        "NAME",
        "PROJECT",
        "STATE",
        "MEMBERS",
        "STARTED",
        "EXIT",
    ]
    assert table.splitlines()[1].split()[:4] == [name, PROJECT, "running", "2"]
    assert max(map(len, table.splitlines())) <= 80

    assert jobs("stop").returncode == 0
    assert listed(jobs) == []
    job = listed_one(jobs, name)
    assert (job["state"], job["exit_code"]) == ("ended", 143)
    assert f"{name}" in jobs("ps", "--all").stdout


def test_ps_tells_the_cause_of_a_failure(jobs: Any) -> None:
    name = detached(jobs, "echo ready; sleep 0.5; exit 9\n", "up", PROJECT)
    assert jobs("wait", name).returncode == 9
    job = listed_one(jobs, name)
    assert job["exit_code"] == 9
    assert "9" in job["cause"]
    assert job["cause"] in " ".join(jobs("ps", "--all").stdout.split())


def test_a_job_is_named_by_its_beginning_and_a_wrong_name_lists_what_there_is(jobs: Any) -> None:
    jobs.script(IDLE)
    for name in (f"{PROJECT}-one", f"{PROJECT}-two"):
        assert jobs("run", PROJECT, "--detach", "--name", name).returncode == 0
    none, many = jobs("stop", "nobody"), jobs("stop", PROJECT)
    assert (none.returncode, many.returncode) == (125, 125)
    for error in (none.stderr, many.stderr, jobs("logs").stderr):
        assert f"{PROJECT}-one" in error
        assert f"{PROJECT}-two" in error
    assert jobs("stop", f"{PROJECT}-o").returncode == 0
    assert [job["job"] for job in listed(jobs)] == [f"{PROJECT}-two"]
    assert jobs("stop").stdout == f"stopped {PROJECT}-two\n"


# stop


def test_stop_of_an_attached_run_ends_its_launcher_too(
    jobs: Any, attached: Any, client: Any
) -> None:
    process = attached()
    done = jobs("stop", "--json")
    assert done.returncode == 0
    (ended,) = json.loads(done.stdout)
    assert (ended["how"], ended["left"]) == ("stopped", [])
    assert [item["kind"] for item in ended["removed"]] == ["container"]
    assert containers(client) == []
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (143, "stopped\n")


def test_stop_of_an_idle_job_is_quick_and_leaves_nothing(jobs: Any, client: Any) -> None:
    name = detached(jobs, IDLE, "up", PROJECT, "--workers", "2")
    begin = time.monotonic()
    done = jobs("stop", name)
    took = time.monotonic() - begin
    print(f"stop of three containers: {took:.2f} s")
    assert (done.returncode, done.stdout) == (0, f"stopped {name}\n")
    assert took < 5
    assert (containers(client), networks(client)) == ([], [])
    assert listed_one(jobs, name)["exit_code"] == 143
    # It got its SIGTERM, and time to act on it.
    assert jobs("logs", name, "--role", "chief").stdout.endswith("stopped\n")


def test_stop_of_a_job_that_has_ended_says_so(jobs: Any) -> None:
    name = detached(jobs, "exit 3\n")
    assert jobs("wait", name).returncode == 3
    done = jobs("stop", name)
    assert (done.returncode, done.stdout) == (0, f"{name} had ended already, exit status 3\n")
    assert listed_one(jobs, name)["exit_code"] == 3


def test_stop_kills_when_its_own_grace_is_over(jobs: Any, client: Any) -> None:
    name = detached(jobs, STUBBORN)
    done = jobs("stop", name, "--stop-grace", "1")
    assert (done.returncode, done.stdout) == (0, f"killed {name}\n")
    assert containers(client) == []
    assert listed_one(jobs, name)["exit_code"] == 143


def test_stop_wakes_a_launcher_that_was_suspended(jobs: Any, attached: Any, client: Any) -> None:
    process = attached()
    process.send_signal(signal.SIGSTOP)
    assert jobs("stop").returncode == 0
    assert containers(client) == []
    assert process.wait(10) == 143


def test_ps_shows_that_a_job_is_being_stopped(jobs: Any, until: Any) -> None:
    detached(jobs, STUBBORN)
    stop = jobs.start("stop", "--stop-grace", "8")
    until(lambda: [job for job in listed(jobs) if job["state"] == "stopping"])
    stop.communicate(timeout=30)
    assert stop.returncode == 0


@pytest.mark.parametrize("orphaned", [False, True], ids=["owned", "orphaned"])
def test_two_interrupts_of_stop_kill(
    jobs: Any, attached: Any, client: Any, until: Any, orphaned: bool
) -> None:
    process = attached(STUBBORN)
    if orphaned:
        process.kill()
        process.wait()
    stop = jobs.start("stop")
    time.sleep(1.5)
    assert stop.poll() is None
    for number in (1, 2):
        stop.send_signal(signal.SIGINT)
        if number == 1:
            assert "again to kill" in stop.stderr.readline()
    out, _ = stop.communicate(timeout=20)
    assert (stop.returncode, out.split()[0]) == (0, "killed")
    assert containers(client) == []


def test_stop_all_stops_each_job(jobs: Any, attached: Any, client: Any) -> None:
    attached()
    detached(jobs, IDLE, "up", PROJECT)
    done = jobs("stop", "--all")
    assert (done.returncode, done.stdout.count("stopped ")) == (0, 2)
    assert (containers(client), networks(client)) == ([], [])


def test_jobs_of_others_are_shown_and_left_alone(jobs: Any, attached: Any, client: Any) -> None:
    attached()
    assert "USER" not in jobs("ps").stdout
    (mine,) = listed(jobs)
    labels = {"tml.run": "x", "tml.job": "theirs", "tml.project": PROJECT, "tml.user": "bob"}
    config = {"Image": "local/torch", "Cmd": ["sleep", "60"], "Labels": labels}
    theirs = client.create_container_from_config(config, name=f"{PROJECT}-theirs")["Id"]
    try:
        client.start(theirs)
        table = [line.split() for line in jobs("ps").stdout.splitlines()]
        assert table[0][2] == "USER"
        assert {row[0]: row[2] for row in table[1:]} == {"theirs": "bob", mine["job"]: mine["user"]}
        # Also without a name there is but one to be meant.
        assert jobs("exec", "--", "true").returncode == 0
        done = jobs("stop", "--all")
        assert (done.returncode, done.stdout) == (0, f"stopped {mine['job']}\n")
        assert containers(client) == [f"{PROJECT}-theirs"]
        assert "no job of yours runs" in jobs("stop").stderr
    finally:
        client.remove_container(theirs, force=True)


def test_stop_of_an_orphan_gives_the_grace_and_ends_its_record(
    jobs: Any, attached: Any, client: Any
) -> None:
    process = attached(
        "trap 'sleep 1; touch /root/tmp/saved; exit 0' TERM\n" + IDLE.split("\n", 1)[1]
    )
    process.kill()
    process.wait()
    (job,) = listed(jobs)
    assert job["state"] == "orphaned"
    assert "its launcher died; stop or gc removes it" in jobs("ps").stdout
    assert jobs("stop", job["job"]).returncode == 0
    assert (jobs.home / "tmp" / "saved").exists()
    assert containers(client) == []
    ended = listed_one(jobs, job["job"])
    assert (ended["state"], ended["exit_code"]) == ("ended", 143)
    assert "launcher died" in ended["cause"]


@pytest.mark.parametrize("verb", ["stop", "gc"])
def test_what_an_orphan_said_last_is_kept_without_its_secrets(
    jobs: Any, client: Any, verb: str
) -> None:
    planted = "planted-5ecret-value"
    script = (
        "trap 'echo saved with $MY_TOKEN; echo to stderr >&2; printf unended; exit 0' TERM\n"
        "echo ready; echo ready; n=0; while sleep 0.2; do echo tick $((n += 1)); done\n"
    )
    jobs.script(script)
    jobs("run", PROJECT, "--detach", "--env", "MY_TOKEN", MY_TOKEN=planted)
    (job,) = listed(jobs)
    time.sleep(1.0)
    os.kill(int(job["owner"].split(":")[1]), signal.SIGKILL)
    time.sleep(1.0)
    assert jobs(verb).returncode == 0
    assert containers(client) == []
    lines = jobs("logs", job["job"]).stdout.splitlines()
    ticks = [line for line in lines if line.startswith("tick")]
    assert len(ticks) > 5
    assert lines[: len(ticks) + 2] == ["ready", "ready", *ticks]
    assert ticks == [f"tick {number + 1}" for number in range(len(ticks))]
    assert sorted(lines[-3:]) == ["saved with ***", "to stderr", "unended"]
    assert planted not in "".join(path.read_text() for path in Path(job["logs"]).iterdir())


# gc


def test_gc_removes_what_dead_launchers_left_and_nothing_else(
    jobs: Any, attached: Any, client: Any, until: Any
) -> None:
    dead = attached("trap 'touch /root/tmp/saved; exit 0' TERM\n" + IDLE.split("\n", 1)[1])
    (orphan,) = listed(jobs)
    dead.kill()
    dead.wait()
    living = attached(IDLE, "--name", f"{PROJECT}-living")
    labels = {"tml.run": "x", "tml.job": "far", "tml.project": PROJECT}
    bystanders = {
        "unlabelled": {},
        "far": {**labels, "tml.owner": "another-machine:1:2:3"},
        "unowned": {**labels, "tml.job": "unowned"},
    }
    try:
        for name, given in bystanders.items():
            config = {"Image": "local/torch", "Cmd": ["sleep", "60"], "Labels": given}
            client.start(
                client.create_container_from_config(config, name=f"{PROJECT}-{name}")["Id"]
            )
        before = jobs("gc", "--dry-run")
        assert f"would remove container {orphan['job']}: its launcher died" in before.stdout
        assert orphan["job"] in containers(client)
        assert not (jobs.home / "tmp" / "saved").exists()

        report = json.loads(jobs("gc", "--json").stdout)
        assert report["removed"] == [
            {"kind": kind, "name": orphan["job"], "job": orphan["job"]}
            for kind in ("container", "record")
        ]
        why = {item["name"]: item["why"] for item in report["left"]}
        assert why[f"{PROJECT}-living"] == f"its launcher, process {living.pid}, lives"
        assert why[f"{PROJECT}-far"] == "its launcher is on another machine, another-machine"
        assert why[f"{PROJECT}-unowned"] == "it names no launcher"
        assert f"{PROJECT}-unlabelled" not in why
        assert orphan["job"] not in containers(client)
        # It was stopped with its grace, as any other.
        assert (jobs.home / "tmp" / "saved").exists()
        ended = listed_one(jobs, orphan["job"])
        assert (ended["state"], ended["exit_code"]) == ("ended", 125)
        assert ended["cause"] == "its launcher died"
        for name in (f"{PROJECT}-living", *(f"{PROJECT}-{name}" for name in bystanders)):
            assert client.inspect_container(name)["State"]["Running"], name
        assert living.poll() is None
    finally:
        for name in bystanders:
            client.remove_container(f"{PROJECT}-{name}", force=True)
    assert jobs("gc").stdout.endswith("nothing to remove: no launcher that is dead left anything\n")


@pytest.mark.parametrize("how", ["attached", "detached"])
def test_gc_removes_all_of_a_gang_whose_launcher_was_killed(
    jobs: Any, client: Any, until: Any, how: str
) -> None:
    jobs.script(IDLE)
    if how == "attached":
        process = jobs.start("up", PROJECT, "--workers", "2")
        until(lambda: [job for job in listed(jobs) if job["state"] == "running"])
        process.kill()
        process.communicate()
    else:
        detached(jobs, IDLE, "up", PROJECT, "--workers", "2")
        (job,) = listed(jobs)
        os.kill(int(job["owner"].split(":")[1]), signal.SIGKILL)
        until(lambda: listed(jobs)[0]["state"] == "orphaned")
    (job,) = listed(jobs)
    assert job["state"] == "orphaned"
    waited = jobs("wait", job["job"])
    assert waited.returncode == 125
    assert "its launcher died" in waited.stdout
    done = jobs("gc")
    assert done.returncode == 0
    assert done.stdout.count("removed container ") == 3
    assert done.stdout.count("removed network ") == 1
    assert (containers(client), networks(client)) == ([], [])
    assert listed_one(jobs, job["job"])["exit_code"] == 125


def test_a_name_that_a_dead_launcher_left_is_freed_by_gc(jobs: Any, client: Any) -> None:
    host, _, boot, start, namespace = this_process().split(":")
    labels = {
        "tml.run": "0",
        "tml.job": "tml-jobs-left",
        "tml.project": PROJECT,
        "tml.owner": f"{host}:{dead_pid()}:{boot}:{start}:{namespace}",
    }
    name = f"tml-left-{PROJECT}"
    jobs.script("exit 4\n")
    client.create_container("local/torch", name=name, labels=labels)
    client.create_network(name, labels=labels)
    for verb, kind in (("run", "container"), ("up", "network")):
        done = jobs(verb, PROJECT, "--name", name)
        assert done.returncode == 125
        assert f"a {kind} named {name} exists already: its launcher is dead" in done.stderr
        assert "python -m tml.docker gc" in done.stderr
    assert jobs("gc").returncode == 0
    assert jobs("run", PROJECT, "--name", name).returncode == 4


def test_a_network_in_use_by_others_stays_and_gc_says_so(jobs: Any, client: Any) -> None:
    labels = {"tml.run": "y", "tml.job": "gone", "tml.project": PROJECT}
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner = f"{os.uname().nodename}:{dead.pid}:an-earlier-boot:1"
    client.create_network(f"{PROJECT}-shared", labels={**labels, "tml.owner": owner})
    config = {
        "Image": "local/torch",
        "Cmd": ["sleep", "60"],
        "HostConfig": {"NetworkMode": f"{PROJECT}-shared"},
    }
    client.start(client.create_container_from_config(config, name=f"{PROJECT}-guest")["Id"])
    try:
        done = jobs("gc")
        assert done.returncode == 125
        assert f"left network {PROJECT}-shared: " in done.stdout
        assert client.inspect_container(f"{PROJECT}-guest")["State"]["Running"]
    finally:
        client.remove_container(f"{PROJECT}-guest", force=True)
    assert f"removed network {PROJECT}-shared" in jobs("gc").stdout


def test_a_record_without_launcher_and_containers_is_lost_until_gc(
    jobs: Any, attached: Any, client: Any
) -> None:
    process = attached()
    process.kill()
    process.wait()
    (job,) = listed(jobs)
    client.remove_container(job["job"], force=True)
    assert listed_one(jobs, job["job"])["state"] == "lost"
    assert jobs("wait", job["job"]).returncode == 125
    assert f"noted that {job['job']} ended" in jobs("gc").stdout
    assert listed_one(jobs, job["job"])["state"] == "ended"


# wait


def test_wait_gives_the_exit_status_also_afterwards(jobs: Any) -> None:
    name = detached(jobs, "sleep 1; exit 42\n")
    assert jobs("wait").returncode == 42
    done = jobs("wait", name, "--json")
    assert done.returncode == 42
    told = json.loads(done.stdout)
    assert (told["job"], told["state"], told["exit_code"]) == (name, "ended", 42)
    assert told["ended"] > told["started"]
    # Nothing runs: the newest is meant.
    assert jobs("wait").returncode == 42


def test_wait_ends_with_124_when_its_time_is_over(jobs: Any) -> None:
    name = detached(jobs, IDLE)
    begin = time.monotonic()
    done = jobs("wait", "--timeout", "0.5", "--json")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (124, "running")
    assert time.monotonic() - begin >= 0.5
    jobs("stop", name)
    assert jobs("wait", name, "--timeout", "0.5").returncode == 143


def test_wait_sees_the_end_of_an_attached_run(jobs: Any, attached: Any) -> None:
    attached("echo ready; sleep 2; exit 7\n")
    assert jobs("wait").returncode == 7


# logs


def test_logs_that_are_not_kept_come_from_the_engine(jobs: Any, attached: Any) -> None:
    # The engine does not keep the order between the two streams: apart in time it is sure.
    attached("echo ready; echo told >&2; sleep 0.5; printf '%40000s\\n' x; sleep 60\n")
    time.sleep(1.5)
    # As of a run on a terminal.
    (kept,) = jobs.home.glob("tmp/runs/*/logs/*/chief.log")
    kept.unlink()
    done = jobs("logs")
    assert done.stdout == f"ready\n{'x':>40000}\n"
    assert done.stderr == "told\n"
    assert jobs("logs", "--tail", "1").stdout.strip() == "x"
    lines = [json.loads(line) for line in jobs("logs", "--json").stdout.splitlines()]
    assert {(line["stream"], line["line"].strip()) for line in lines} == {
        ("stdout", "ready"),
        ("stderr", "told"),
        ("stdout", "x"),
    }
    assert all(line["time"].startswith("20") and line["member"] == "chief" for line in lines)
    stamped = jobs("logs", "--timestamps").stdout.splitlines()
    assert stamped[0].endswith("Z ready")
    assert len(stamped) == 2


def test_following_an_attached_run_ends_with_it(jobs: Any, attached: Any) -> None:
    attached("echo ready; sleep 2; echo late; exit 5\n")
    done = jobs("logs", "-f")
    assert (done.returncode, done.stdout) == (0, "ready\nlate\n")


def test_logs_of_several_have_their_names_and_outlive_the_containers(jobs: Any) -> None:
    script = 'echo "ready $SPEC_TYPE"; sleep 1; echo "late $SPEC_TYPE"\n'
    name = detached(jobs, script, "up", PROJECT)
    done = jobs("logs", "-f")
    assert done.returncode == 0
    told = [line.replace(" ", "") for line in done.stdout.splitlines()]
    expected = ["chief|readychief", "chief|latechief", "worker-1|readyworker"]
    assert sorted(told) == sorted([*expected, "worker-1|lateworker"])
    assert jobs("wait", name).returncode == 0
    afterwards = jobs("logs", name)
    assert sorted(afterwards.stdout.splitlines()) == sorted(done.stdout.splitlines())
    assert jobs("logs", name, "--role", "worker-1", "--tail", "1").stdout == "late worker\n"
    wrong = jobs("logs", name, "--role", "evaluator")
    assert wrong.returncode == 125
    assert "it has chief, worker-1" in wrong.stderr


def test_an_earlier_job_of_the_same_name_is_still_told_of(jobs: Any) -> None:
    name = f"{PROJECT}-again"
    detached(
        jobs,
        "echo first; exit 6\n",
        "run",
        PROJECT,
        "--name",
        name,
        "--",
        "--save_dir",
        "/root/tmp/1",
    )
    assert jobs("wait", name).returncode == 6
    detached(
        jobs,
        "echo second; exit 7\n",
        "run",
        PROJECT,
        "--name",
        name,
        "--",
        "--save_dir",
        "/root/tmp/2",
    )
    assert jobs("wait", name).returncode == 7
    newer, older = (job for job in listed(jobs, "--all") if job["job"] == name)
    assert (newer["exit_code"], older["exit_code"]) == (7, 6)
    assert jobs("logs", name).stdout == "second\n"
    assert jobs("logs", older["run_id"]).stdout == "first\n"
    rows = [line.split() for line in jobs("ps", "--all").stdout.splitlines()]
    assert [row[2] for row in rows if row[0] == name and row[1] != "ended"] == ["ended"] * 2


def test_following_goes_on_through_a_restart(jobs: Any) -> None:
    script = (
        "sleep 0.5; tries=/root/tmp/tries-$SPEC_TYPE; echo x >> $tries\n"
        'echo "attempt $(wc -l < $tries)"; sleep 1; [ $(wc -l < $tries) = 2 ]\n'
    )
    detached(jobs, script, "up", PROJECT, "--max-restarts", "1")
    done = jobs("logs", "-f", "--role", "chief")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "attempt 1"
    assert done.stdout.splitlines()[-1] == "attempt 2"


def test_following_the_engine_goes_on_through_a_restart(jobs: Any) -> None:
    script = (
        "sleep 0.5; tries=/root/tmp/tries-$SPEC_TYPE; echo x >> $tries\n"
        'echo "attempt $(wc -l < $tries)"; sleep 1; [ $(wc -l < $tries) = 2 ]\n'
    )
    detached(jobs, script, "up", PROJECT, "--max-restarts", "1")
    done = jobs("logs", "-f", "--role", "chief", "--timestamps")
    assert done.returncode == 0
    said = [line.split("Z ")[1] for line in done.stdout.splitlines()]
    assert said == ["attempt 1", "attempt 2"]


def test_logs_say_why_a_job_failed(jobs: Any) -> None:
    name = detached(jobs, "echo ready; sleep 0.5; exit 6\n")
    assert jobs("wait", name).returncode == 6
    done = jobs("logs", name)
    assert (done.returncode, done.stdout) == (0, "ready\n")
    assert f"tml: {name} ended with exit status 6" in done.stderr
    # What an attached job says when it fails; of this one only launcher.log has it else.
    assert "tml:   last lines of" in done.stderr
    assert "tml:     ready\n" in done.stderr


def test_secrets_are_stars_in_logs_whatever_is_asked_for(jobs: Any) -> None:
    jobs.script('echo "got $MY_TOKEN"; sleep 60\n')
    planted = "planted-5ecret-value"
    jobs("run", PROJECT, "--detach", "--env", "MY_TOKEN", MY_TOKEN=planted)
    time.sleep(0.5)
    for flags in ([], ["--timestamps"], ["--json"], ["--timestamps", "--json"]):
        done = jobs("logs", *flags)
        assert "got ***" in done.stdout
        assert planted not in done.stdout + done.stderr
    assert "this job was given secrets" in jobs("logs", "--timestamps").stderr


def test_interrupting_logs_leaves_the_job_alone(jobs: Any, until: Any) -> None:
    name = detached(jobs, IDLE)
    watching = jobs.start("logs", "-f")
    assert watching.stdout.readline() == "ready\n"
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=10)
    assert watching.returncode == 130
    assert "Traceback" not in err
    assert [job["job"] for job in listed(jobs)] == [name]


@pytest.mark.parametrize("how", ["attached", "detached"])
def test_a_reader_that_goes_away_ends_logs_quietly(jobs: Any, attached: Any, how: str) -> None:
    if how == "attached":
        attached()
    else:
        detached(jobs, IDLE)
    watching = jobs.start("logs", "-f")
    assert watching.stdout.readline() == "ready\n"
    watching.stdout.close()
    assert watching.wait(10) == 141
    assert watching.stderr.read() == ""
    watching.stderr.close()


# exec


@pytest.mark.parametrize("status", [0, 1, 42, 125, 126, 127, 137, 255])
def test_the_exit_status_of_exec_is_the_commands(jobs: Any, status: int, idle: str) -> None:
    assert jobs("exec", "--", "sh", "-c", f"exit {status}").returncode == status


@pytest.fixture
def idle(attached: Any) -> str:
    """A job that runs and does nothing."""
    process = attached()
    return str(process.pid)


def test_exec_of_what_cannot_start_ends_as_docker_has_it(jobs: Any, idle: str) -> None:
    missing, no_program = jobs("exec", "--", "no-such-program"), jobs("exec", "--", "/etc/passwd")
    assert (missing.returncode, no_program.returncode) == (127, 126)
    assert "could not start no-such-program" in missing.stderr
    assert (missing.stdout, no_program.stdout) == ("", "")


@pytest.mark.parametrize("number", [2, 9, 11, 15])
def test_death_by_a_signal_passes_through(jobs: Any, idle: str, number: int) -> None:
    assert jobs("exec", "--", "bash", "-c", f"kill -{number} $$").returncode == 128 + number


def test_exec_passes_stdin_and_keeps_the_streams_apart(jobs: Any, idle: str) -> None:
    data = os.urandom(1 << 20)
    done = subprocess.run(
        [*jobs.argv, "exec", "--", "sh", "-c", "cat; echo told >&2"],
        env=jobs.env,
        cwd=jobs.home,
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == data
    assert done.stderr == b"told\n"


def test_the_first_output_of_a_quick_command_is_not_lost(jobs: Any, idle: str) -> None:
    outputs = [jobs("exec", "--", "echo", "quick").stdout for _ in range(10)]
    assert outputs == ["quick\n"] * 10


def test_exec_as_json(jobs: Any, idle: str) -> None:
    done = jobs("exec", "--json", "--", "sh", "-c", "echo a; echo b >&2; exit 4")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert (told["stdout"], told["stderr"], told["exit_code"]) == ("a\n", "b\n", 4)


def test_exec_reaches_the_member_that_is_meant(jobs: Any) -> None:
    detached(jobs, IDLE, "up", PROJECT, "--workers", "2")
    ask = ("--", "sh", "-c", "echo $SPEC_TYPE; hostname")
    assert jobs("exec", *ask).stdout.split() == ["chief", "0-chief"]
    assert jobs("exec", "--role", "worker-2", *ask).stdout.split() == ["worker", "2-worker"]
    assert "worker-1, worker-2" in jobs("exec", "--role", "worker", *ask).stderr
    assert jobs("exec", "--role", "evaluator", *ask).returncode == 125


def test_exec_in_a_job_that_has_ended_says_so(jobs: Any) -> None:
    name = detached(jobs, "true\n")
    jobs("wait", name)
    done = jobs("exec", name, "--", "true")
    assert done.returncode == 125
    assert "no container of it runs (ended)" in done.stderr


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1)])
def test_a_signal_to_exec_leaves_nothing_running_inside(
    jobs: Any, idle: str, number: int, times: int
) -> None:
    # A shell without a terminal has its background jobs ignore SIGINT.
    command = "sleep 987 & sleep 986 & echo started; wait"
    process = jobs.start("exec", "--", "bash", "-c", command)
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "sleep 98" not in processes(jobs)


def test_a_command_that_ignores_the_signal_is_killed_by_the_second(jobs: Any, idle: str) -> None:
    command = "trap 'echo ignored' TERM; echo started; while true; do sleep 0.1; done"
    process = jobs.start("exec", "--", "bash", "-c", command)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ignored\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=8)
    assert process.returncode == 143
    assert "echo started" not in processes(jobs)


def test_a_reader_that_goes_away_ends_the_command(jobs: Any, idle: str) -> None:
    process = jobs.start("exec", "--", "yes")
    assert process.stdout.readline() == "y\n"
    process.stdout.close()
    assert process.wait(20) == 141
    process.stderr.close()
    assert "yes" not in processes(jobs).split()


def processes(launcher: Any) -> str:
    """Command lines of what runs inside."""
    script = 'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline; echo; done'
    return str(launcher("exec", "--", "sh", "-c", script).stdout)


def test_bash_on_a_terminal_has_keys_sizes_and_the_exit_status(jobs: Any, idle: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*jobs.argv, "exec"],
        env=jobs.env,
        cwd=jobs.home,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 20)[0], seen
            seen += os.read(ours, 65536).decode()

    import fcntl
    import struct
    import termios

    read_until("$ ") if os.getuid() else read_until("# ")
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    time.sleep(0.3)
    os.write(ours, b"stty size\n")
    read_until("33 99")
    os.write(ours, b"sleep 60\n")
    # Not before it runs: a Ctrl-C between two commands of bash reaches neither.
    deadline = time.monotonic() + 20
    while "sleep 60" not in processes(jobs):
        assert time.monotonic() < deadline, seen
    os.write(ours, b"\x03")  # Ends sleep, not exec.
    os.write(ours, b"echo still-$((40+2)); exit 11\n")
    read_until("still-42")
    assert process.wait(20) == 11
    os.close(ours)


def test_secrets_of_the_job_reach_exec_and_show_nowhere(jobs: Any, client: Any) -> None:
    jobs.script(IDLE)
    planted = "planted-5ecret-value"
    started = jobs("run", PROJECT, "--detach", "--env", "MY_TOKEN", MY_TOKEN=planted)
    assert started.returncode == 0, started.stderr
    assert jobs("exec", "--", "printenv", "MY_TOKEN").stdout.strip() == planted
    assert planted not in jobs("ps", "--json").stdout
    assert planted not in json.dumps(client.inspect_container(started.stdout.strip()))


def test_exec_as_another_user(jobs: Any, idle: str) -> None:
    assert jobs("exec", "--user", "65534", "--", "id", "-u").stdout == "65534\n"
    wrong = jobs("exec", "--user", "no-such-user", "--", "true")
    assert wrong.returncode in (125, 126)
    assert "no-such-user" in wrong.stderr


def test_what_is_left_of_secrets_goes_with_gc(jobs: Any) -> None:
    folder = Path(f"/dev/shm/tml-secrets-0-{dead_pid()}-x")
    folder.mkdir(mode=0o700)
    (folder / "tml.env").write_text("export A=b\n")
    report = json.loads(jobs("gc", "--json").stdout)
    assert {"kind": "secret", "name": str(folder), "job": None} in report["removed"]
    assert not folder.exists()


def dead_pid() -> int:
    """Number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
