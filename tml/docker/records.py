"""What is known of a job once its containers are gone: one small JSON file a job, below the
caller's state folder (XDG_STATE_HOME, else ~/.local/state). Containers that run are found by label,
never from here.

<job>.json is the newest job of that name, <job>~<run id>.json an earlier one: no name of a
container has a ~.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tml.docker.owner import this_process
from tml.docker.plan import LABEL_PROJECT, Plan
from tml.machines import environment

KEPT = 200
"""Records beyond this number are removed, the oldest first."""

JobState = Literal["starting", "running", "restarting", "stopping", "ended"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One job. Times are seconds since the epoch."""

    job: str
    run_id: str
    verb: Literal["run", "up"]
    project: str
    owner: str
    """The launcher's process, as owner.py writes it."""
    endpoint: str
    """Address of the engine."""
    members: tuple[str, ...]
    """chief, worker-1, …"""
    logs: str | None
    """Folder that has <member>.log, and launcher.log of a detached job."""
    state: JobState = "starting"
    started: float
    ended: float | None = None
    exit_code: int | None = None
    cause: str | None = None
    """Why it failed, in a line."""
    post_mortem: str | None = None
    """All that was told of a failure, with the last lines."""
    restarts: int = 0


def folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where records are."""
    state = env.get(environment.XDG_STATE_HOME)
    return (Path(state) if state else environment.home(env) / ".local" / "state") / "tml" / "jobs"


def begin(
    verb: Literal["run", "up"], members: Sequence[Plan], endpoint: str, logs: str | None
) -> Record:
    """The record of a job of this process whose containers exist, written; old ones are removed."""
    record = Record(
        job=members[0].job,
        run_id=members[0].run_id,
        verb=verb,
        project=members[0].labels.get(LABEL_PROJECT, ""),
        owner=this_process(),
        endpoint=endpoint,
        members=tuple(member.member for member in members),
        logs=logs,
        started=time.time(),
    )
    _set_aside(record)
    write(record)
    prune()
    return record


def write(record: Record) -> None:
    """Write a record, whole or not at all; an unwritable state folder does not end a job."""
    path = _path(record)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(asdict(record), indent=2) + "\n")
        temporary.replace(path)
    except OSError:
        # The folder may not even be one.
        with contextlib.suppress(OSError):
            temporary.unlink()


def change(record: Record, **changes: Any) -> Record:
    """The record with changes, written."""
    changed = replace(record, **changes)
    write(changed)
    return changed


def end(
    record: Record, exit_code: int, cause: str | None, post_mortem: str | None = None
) -> Record:
    """The record of a job that has ended, written."""
    told = {"exit_code": exit_code, "cause": cause, "post_mortem": post_mortem}
    return change(record, state="ended", ended=time.time(), **told)


def read(job: str, run_id: str | None = None) -> Record | None:
    """The record of the newest job of a name, or of that with `run_id`; None where there is none
    that can be read.
    """
    newest = _read(_newest(job))
    if run_id is None or (newest is not None and newest.run_id == run_id):
        return newest
    return _read(_earlier(job, run_id))


def read_all() -> list[Record]:
    """All records, the newest first."""
    records = [_read(path) for path in folder().glob("*.json")]
    return sorted((r for r in records if r is not None), key=lambda r: r.started, reverse=True)


def prune() -> None:
    """Remove the ended records beyond KEPT, those that ended first."""
    ended = [record for record in read_all() if record.state == "ended"]
    for record in sorted(ended, key=lambda r: r.ended or 0.0, reverse=True)[KEPT:]:
        with contextlib.suppress(OSError):  # A folder that cannot be written to ends no job.
            _path(record).unlink()


def _newest(job: str) -> Path:
    return folder() / f"{job}.json"


def _earlier(job: str, run_id: str) -> Path:
    return folder() / f"{job}~{run_id}.json"


def _path(record: Record) -> Path:
    """Where a record is, or belongs."""
    newest, earlier = _read(_newest(record.job)), _earlier(record.job, record.run_id)
    of_another = newest is not None and newest.run_id != record.run_id
    return earlier if of_another or earlier.exists() else _newest(record.job)


def _set_aside(record: Record) -> None:
    """Keep the record of the last job that had the name of this new one."""
    last = _read(_newest(record.job))
    if last is not None and last.run_id != record.run_id:
        with contextlib.suppress(OSError):
            _newest(record.job).replace(_earlier(last.job, last.run_id))


def _read(path: Path) -> Record | None:
    try:
        data = json.loads(path.read_text())
        return Record(**{**data, "members": tuple(data["members"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
