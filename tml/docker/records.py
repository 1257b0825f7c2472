"""What is known of a job once its containers are gone: one small JSON file a job, below the
caller's state folder (XDG_STATE_HOME, else ~/.local/state). Containers that run are found by label,
never from here.
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
    write(record)
    prune()
    return record


def write(record: Record) -> None:
    """Write a record, whole or not at all; an unwritable state folder does not end a job."""
    path = folder() / f"{record.job}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
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


def read(job: str) -> Record | None:
    """The record of a job; None where there is none that can be read."""
    return _read(folder() / f"{job}.json")


def read_all() -> list[Record]:
    """All records, the newest first."""
    records = [_read(path) for path in folder().glob("*.json")]
    return sorted((r for r in records if r is not None), key=lambda r: r.started, reverse=True)


def prune() -> None:
    """Remove the ended records beyond KEPT, those that ended first."""
    ended = [record for record in read_all() if record.state == "ended"]
    for record in sorted(ended, key=lambda r: r.ended or 0.0, reverse=True)[KEPT:]:
        with contextlib.suppress(OSError):  # A folder that cannot be written to ends no job.
            (folder() / f"{record.job}.json").unlink()


def _read(path: Path) -> Record | None:
    try:
        data = json.loads(path.read_text())
        return Record(**{**data, "members": tuple(data["members"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
