"""Which job a name means, what state it is in, and what kept logs look like when they are read. No
engine is needed; tests/integration/test_docker_jobs.py has one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tml.docker import jobs, logs, records
from tml.docker.errors import LauncherError
from tml.docker.jobs import Job, Member
from tml.docker.owner import this_process, user_name
from tml.docker.records import Record
from tml.machines import environment

ALIVE, ELSEWHERE = this_process(), "another:1:2:3:4"
DEAD = ":".join([*ALIVE.split(":")[:3], "1", ALIVE.split(":")[4]])


def member(name: str = "chief", state: str = "running") -> Member:
    """A container."""
    return Member(id=name, container=f"job-{name}", member=name, state=state, created=50.0)


def record(name: str = "job", **changes: Any) -> Record:
    """A record of a job that runs."""
    fields: dict[str, Any] = {
        "job": name,
        "run_id": name,
        "verb": "up",
        "project": "twhin",
        "owner": ALIVE,
        "endpoint": "",
        "members": ("chief", "worker-1"),
        "logs": None,
        "started": 100.0,
        "state": "running",
    }
    return Record(**{**fields, **changes})


def job(name: str = "job", *, ended: bool = False, **fields: Any) -> Job:
    """A job that runs, or one that has ended."""
    known = record(name, state="ended", exit_code=0) if ended else None
    members = () if ended else (member(),)
    given = {"name": name, "run_id": name, "project": "twhin", "owner": ALIVE}
    return Job(**{**given, "members": members, "record": known, **fields})


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"members": (member(),)}, "running"),
        ({"members": (member(state="created"),)}, "starting"),
        ({"members": (), "record": record(state="starting")}, "starting"),
        ({"members": (member(state="exited"),)}, "stopping"),
        ({"members": (member(), member("worker-1", "exited"))}, "running"),
        ({"members": (), "record": record(state="restarting")}, "restarting"),
        ({"members": (member(),), "record": record(state="stopping")}, "stopping"),
        ({"members": (member(),), "owner": DEAD}, "orphaned"),
        ({"members": (), "networks": (("i", "n"),), "owner": DEAD}, "orphaned"),
        ({"members": (member(),), "owner": ELSEWHERE}, "elsewhere"),
        ({"members": (), "record": record(state="running"), "owner": DEAD}, "lost"),
        ({"members": (), "record": record(state="ended"), "owner": DEAD}, "ended"),
        ({"members": (), "record": record(state="ended"), "owner": ALIVE}, "ended"),
    ],
)
def test_the_state_follows_from_containers_launcher_and_record(
    fields: dict[str, Any], state: str
) -> None:
    assert job(**fields).state == state


def test_without_a_name_the_only_one_that_runs_is_meant() -> None:
    assert jobs.choose([job("a", ended=True), job("b")], None).name == "b"


def test_without_a_name_and_without_any_that_runs_the_newest_will_do_for_some_verbs() -> None:
    known = [
        job("old", ended=True, record=record("old", state="ended", started=1.0)),
        job("new", ended=True, record=record("new", state="ended", started=2.0)),
    ]
    assert jobs.choose(known, None, ended=True).name == "new"
    with pytest.raises(LauncherError, match="no job runs: start one") as caught:
        jobs.choose(known, None)
    assert caught.value.exit_code == 125


def test_without_a_name_only_jobs_of_ones_own_are_meant() -> None:
    others = job("b", user="somebody-else")
    assert jobs.choose([others, job("a", user=user_name())], None).name == "a"
    assert jobs.choose([others, job("older")], None).name == "older"
    assert jobs.choose([others], "b").name == "b"
    with pytest.raises(LauncherError, match=r"no job of yours runs: .*; of others there run b"):
        jobs.choose([others], None)


def test_several_that_run_are_named() -> None:
    with pytest.raises(LauncherError, match="2 jobs run; say which: a, b"):
        jobs.choose([job("a"), job("b"), job("c", ended=True)], None)


def test_the_beginning_of_a_name_is_enough_where_it_is_one() -> None:
    known = [job("tml-twhin-1a"), job("tml-twhin-2b"), job("tml-recap-1a")]
    assert jobs.choose(known, "tml-r").name == "tml-recap-1a"
    assert jobs.choose(known, "tml-twhin-2").name == "tml-twhin-2b"
    with pytest.raises(LauncherError, match="may be any of tml-twhin-1a, tml-twhin-2b"):
        jobs.choose(known, "tml-twhin")


def test_a_whole_name_goes_before_the_beginning_of_another() -> None:
    assert jobs.choose([job("train-2"), job("train")], "train").name == "train"


def test_what_runs_goes_before_what_has_ended() -> None:
    known = [job("tml-2", ended=True), job("tml-1"), job("tml-1", ended=True)]
    assert jobs.choose(known, "tml").exists
    assert jobs.choose(known, "tml-2").name == "tml-2"
    # A whole name of one that ended is no beginning of one that runs.
    assert jobs.choose([job("x-10"), job("x-1", ended=True)], "x-1").name == "x-1"


def test_a_name_that_nobody_has_is_answered_with_those_there_are() -> None:
    with pytest.raises(LauncherError, match="there is no job 'c'; there are a, b"):
        jobs.choose([job("a"), job("b", ended=True)], "c")
    with pytest.raises(LauncherError, match="there is none at all"):
        jobs.choose([], "c")


def test_a_role_means_a_member_or_all_of_that_role() -> None:
    names = ["chief", "worker-1", "worker-2", "datasetworker-1"]
    assert jobs.choose_members(job(), names, None) == names
    assert jobs.choose_members(job(), names, "chief") == ["chief"]
    assert jobs.choose_members(job(), names, "worker") == ["worker-1", "worker-2"]
    assert jobs.choose_members(job(), names, "worker-2") == ["worker-2"]
    with pytest.raises(LauncherError, match="no such member; it has chief, worker-1"):
        jobs.choose_members(job(), names, "evaluator")


def test_the_record_of_an_earlier_job_of_the_same_name_is_not_this_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.XDG_STATE_HOME, str(tmp_path))
    records.write(record("mine", run_id="earlier", state="ended", exit_code=9))
    assert jobs._with_record(job("mine", run_id="now")).record is None
    assert jobs._with_record(job("mine", run_id="earlier")).record is not None


def test_of_several_that_ended_with_one_name_the_newest_is_meant_or_a_run_id() -> None:
    known = [job("train", ended=True, run_id=run_id) for run_id in ("newer", "older")]
    for name in ("train", "tra"):
        assert jobs.choose(known, name).run_id == "newer"
    assert jobs.choose(known, "older").run_id == "older"


# Kept logs


def read_file(path: Path, tail: int | None = None) -> list[bytes]:
    """The lines that are printed of a kept log."""
    said: list[bytes] = []
    file = logs._File("chief", path, lambda _, __, line, ___: said.append(line))
    file.print_all(tail)
    file.close()
    return said


def test_a_kept_log_is_printed_line_by_line_or_its_end(tmp_path: Path) -> None:
    path = tmp_path / "chief.log"
    path.write_bytes(b"a\n\nb\r\n0 %\r50 %\r100 %\nno end")
    assert read_file(path) == [b"a", b"", b"b", b"100 %", b"no end"]
    assert read_file(path, 1) == [b"100 %", b"no end"][-1:]
    assert read_file(path, 2) == [b"100 %", b"no end"]


def test_a_log_that_grows_is_printed_in_whole_lines(tmp_path: Path) -> None:
    path, said = tmp_path / "chief.log", []
    file = logs._File("chief", path, lambda _, __, line, ___: said.append(line))
    file.print_all(None)  # Not there yet.
    path.write_bytes(b"one\ntw")
    file.print_new()
    assert said == [b"one"]
    with path.open("ab") as more:
        more.write(b"o\n" + b"x" * 200_000 + b"\n")
    file.print_new()
    assert said[1:] == [b"two", b"x" * 200_000]
    file.close()


def test_what_a_launcher_kept_is_not_kept_twice(tmp_path: Path) -> None:
    path = tmp_path / "chief.log"
    path.write_bytes(b"tick\ntick\nb\na\n")
    # Whatever their order: two streams reach the engine and the launcher on ways of their own.
    said = [(90.0, b"tick"), (99.0, b"tick"), (99.9, b"a"), (99.9, b"b"), (99.95, b"in flight")]
    later = [(100.05, b"tick"), (101.0, b"tick"), (102.0, b"a")]
    assert logs._not_kept([*said, *later], 100.0, path) == [b"in flight", b"tick", b"tick", b"a"]


# Without an engine


def call(tmp_path: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    """The launcher, where no engine answers."""
    env = {
        **os.environ,
        environment.DOCKER_HOST: f"unix://{tmp_path}/none.sock",
        environment.XDG_STATE_HOME: str(tmp_path),
    }
    argv = (sys.executable, "-m", "tml.docker", *argv)
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


def test_how_a_job_ended_is_told_without_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.XDG_STATE_HOME, str(tmp_path))
    (tmp_path / "chief.log").write_text("hello\n")
    records.write(
        record("gone", state="ended", exit_code=7, logs=str(tmp_path), members=("chief",))
    )
    assert call(tmp_path, "wait").returncode == 7
    told = json.loads(call(tmp_path, "wait", "gone", "--json").stdout)
    assert (told["job"], told["exit_code"]) == ("gone", 7)
    assert call(tmp_path, "logs").stdout == "hello\n"


def test_ps_shows_what_ended_without_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.XDG_STATE_HOME, str(tmp_path))
    assert call(tmp_path, "ps", "--all").returncode == 125
    for number in range(7):
        name = f"job-{number}"
        cause = f"{name} was killed" if number % 2 else "chief was killed"
        fields = {"state": "ended", "exit_code": 9, "cause": cause, "started": 100.0 + number}
        records.write(record(name, **fields))
    done = call(tmp_path, "ps", "--all")
    assert done.returncode == 0
    assert "no Docker Engine answers" in done.stderr
    assert done.stdout.splitlines()[8:] == [
        "job-6: chief was killed",
        "job-5 was killed",
        "job-4: chief was killed",
        "job-3 was killed",
        "job-2: chief was killed",
        "2 more failed: logs NAME, or ps --all --json, says why",
    ]
    assert len(json.loads(call(tmp_path, "ps", "--all", "--json").stdout)) == 7
    assert call(tmp_path, "ps").returncode == 125


@pytest.mark.parametrize("verb", ["ps", "stop", "wait", "logs", "exec", "gc"])
def test_no_engine_is_said_and_no_traceback(tmp_path: Path, verb: str) -> None:
    done = call(tmp_path, verb)
    assert done.returncode == 125
    assert "no Docker Engine answers" in done.stderr
    assert "Traceback" not in done.stderr
