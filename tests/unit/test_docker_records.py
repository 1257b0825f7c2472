"""What is kept of a job on disk."""

import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from tml.docker import records
from tml.docker.plan import Plan
from tml.docker.records import Record
from tml.machines import environment


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own; the folder that records are in."""
    monkeypatch.setenv(environment.XDG_STATE_HOME, str(tmp_path / "state"))
    return tmp_path / "state" / "tml" / "jobs"


def record(**changes: Any) -> Record:
    """A record of a job that runs."""
    fields: dict[str, Any] = {
        "job": "tml-twhin-1",
        "run_id": "1",
        "verb": "up",
        "project": "twhin",
        "owner": "host:1:boot:2",
        "endpoint": "unix:///var/run/docker.sock",
        "members": ("chief", "worker-1"),
        "logs": "/runs/logs/tml-twhin-1",
        "started": 100.0,
    }
    return Record(**{**fields, **changes})


def plan(job: str, run_id: str) -> Plan:
    """A container of a job."""
    return Plan(
        image="local/torch",
        command=("true",),
        name=job,
        run_id=run_id,
        job=job,
        workdir="/",
        env=(),
        mounts=(),
        network="host",
        user="1000:1000",
        interactive=False,
        tty=False,
        detach=False,
    )


def test_what_is_written_is_read_again(state: Path) -> None:
    records.write(record())
    assert records.read("tml-twhin-1") == record()
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    # Whole or not at all: nothing half-written lies about.
    assert [path.name for path in state.iterdir()] == ["tml-twhin-1.json"]


def test_the_folder_is_below_home_where_nothing_else_is_said() -> None:
    env = {environment.HOME: "/home/me"}
    assert records.folder(env) == Path("/home/me/.local/state/tml/jobs")
    assert records.folder({**env, environment.XDG_STATE_HOME: "/s"}) == Path("/s/tml/jobs")


def test_the_end_of_a_job_is_noted_with_its_time_and_cause() -> None:
    before = time.time()
    ended = records.end(record(state="running"), 9, "chief ended with 9")
    assert records.read("tml-twhin-1") == ended
    assert (ended.state, ended.exit_code, ended.cause) == ("ended", 9, "chief ended with 9")
    assert ended.ended is not None
    assert before <= ended.ended <= time.time()


def test_all_are_listed_the_newest_first() -> None:
    for number, started in ((1, 5.0), (2, 9.0), (3, 7.0)):
        records.write(record(job=f"job-{number}", started=started))
    assert [r.job for r in records.read_all()] == ["job-2", "job-3", "job-1"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"job": "x"}', '{"members": 3}'])
def test_what_cannot_be_read_is_passed_over(state: Path, text: str) -> None:
    records.write(record())
    (state / "broken.json").write_text(text)
    assert records.read("broken") is None
    assert [r.job for r in records.read_all()] == ["tml-twhin-1"]


def test_a_record_of_a_later_version_is_passed_over(state: Path) -> None:
    records.write(record())
    path = state / "tml-twhin-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))
    assert records.read("tml-twhin-1") is None


def test_there_is_no_record_of_a_job_that_never_was() -> None:
    assert records.read("nobody") is None
    assert records.read_all() == []


def test_a_state_folder_that_cannot_be_written_ends_no_job(state: Path) -> None:
    state.parent.parent.mkdir(parents=True)
    state.parent.write_text("a file where the folder should be")
    records.write(record())
    assert records.read("tml-twhin-1") is None


def test_a_name_that_is_used_again_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    first = records.end(record(job="mine", run_id="aa", started=1.0), 7, "it failed")
    second = records.begin("run", [plan("mine", "bb")], "", None)
    assert records.read("mine") == second
    assert records.read("mine", "bb") == second
    assert records.read("mine", "aa") == first
    assert records.read("mine", "cc") is None
    assert records.read_all() == [second, first]
    # Each is changed where it is, and removed there.
    changed = records.change(first, exit_code=8)
    assert records.read("mine", "aa") == changed
    assert records.read("mine") == second
    monkeypatch.setattr(records, "KEPT", 0)
    records.prune()
    assert records.read_all() == [second]
    records.write(changed)
    records.end(second, 0, None)
    records.prune()
    assert records.read_all() == []


def test_of_many_that_have_ended_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT", 2)
    for number in range(4):
        records.write(record(job=f"ended-{number}", started=float(number), state="ended"))
    # However old: it runs.
    records.write(record(job="runs", started=-1.0, state="running"))
    records.prune()
    assert [r.job for r in records.read_all()] == ["ended-3", "ended-2", "runs"]


def test_a_long_job_that_ended_last_is_kept_before_short_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "KEPT", 1)
    records.write(record(job="long", started=1.0, ended=9.0, state="ended"))
    records.write(record(job="short", started=2.0, ended=3.0, state="ended"))
    records.prune()
    assert [r.job for r in records.read_all()] == ["long"]


def test_records_that_cannot_be_removed_end_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    records.write(record(state="ended"))
    monkeypatch.setattr(records, "KEPT", 0)
    monkeypatch.setattr(Path, "unlink", refuse)
    records.prune()
    assert records.read("tml-twhin-1") is not None
