"""Jobs: what runs, found by label, and what has ended, told by the records. The verbs `ps`, `wait`.

    ps --json     a list of jobs, each {job, run_id, verb, project, user, state, owner, members:
                  [{member, container, state}], logs, started, ended, exit_code, cause, restarts};
                  times are seconds since the epoch, what is not known is null
    wait --json   {job, state, exit_code, cause, started, ended}; state is ended, lost or running
                  (after --timeout)

A job that runs is `starting` (nothing of it runs yet), `running`, `restarting`, `stopping`,
`orphaned` (its launcher is dead: `gc` or `stop` it) or `elsewhere` (its launcher is on another
machine). One that has ended is `ended`, or `lost` where its launcher died and nothing of it is left
to tell how it ended.

Where several people share an engine, a name means a job whosever it is; without a name only the
caller's own are meant.
"""

import argparse
import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tml.docker import records, terminal
from tml.docker.connection import connect
from tml.docker.errors import ENGINE_FAILED, LauncherError, NoEngineError
from tml.docker.owner import Liveness, liveness, user_name
from tml.docker.plan import (
    LABEL_INDEX,
    LABEL_JOB,
    LABEL_OWNER,
    LABEL_PROJECT,
    LABEL_ROLE,
    LABEL_RUN,
    LABEL_USER,
)
from tml.docker.records import Record

if TYPE_CHECKING:
    from docker import APIClient

TIMED_OUT = 124
"""Exit status of `wait --timeout`, as that of timeout(1)."""
LAUNCHER_DIED = "its launcher died"
POLL_S = 0.05
CAUSES_SHOWN = 5
"""Below the table of ps, which more of them would push out of sight."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One container of a job."""

    id: str
    container: str
    """The container's name."""
    member: str
    """chief, worker-1, …"""
    state: str
    """The engine's word: created, running, exited, …"""
    created: float

    @property
    def role(self) -> str:
        """chief, worker, …"""
        return self.member.rpartition("-")[0] or self.member

    @property
    def alive(self) -> bool:
        """Whether processes of it may be there."""
        return self.state in ("running", "paused", "restarting")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, of which containers or a network, or a record, or both are there."""

    name: str
    run_id: str
    project: str
    owner: str
    user: str = ""
    """Login name of who started it; "" where its containers do not say."""
    members: tuple[Member, ...] = ()
    """The chief first."""
    networks: tuple[tuple[str, str], ...] = ()
    """(id, name) of networks of its own."""
    record: Record | None = None

    @property
    def exists(self) -> bool:
        """Whether the engine has something of it, or a living launcher is about to make it."""
        if self.members or self.networks:
            return True
        return self.record is not None and self.record.state != "ended" and self.owned == "alive"

    @property
    def is_mine(self) -> bool:
        """Whether the caller started it, as far as is known: what only a record tells of, did."""
        return self.user in ("", user_name())

    @cached_property
    def owned(self) -> Liveness:
        """Whether its launcher lives, as it was when first asked."""
        return liveness(self.owner)

    @property
    def state(self) -> str:
        """In one word, as the module's docstring lists them."""
        if not self.exists:
            ended = self.record is not None and self.record.state == "ended"
            return "ended" if ended or self.owned == "elsewhere" else "lost"
        if self.owned != "alive":
            return "orphaned" if self.owned == "dead" else "elsewhere"
        if self.record and self.record.state in ("restarting", "stopping"):
            return self.record.state
        if any(m.alive for m in self.members):
            return "running"
        # Containers that have ended are about to be removed.
        return "starting" if all(m.state == "created" for m in self.members) else "stopping"

    @property
    def started(self) -> float | None:
        """Seconds since the epoch."""
        if self.record:
            return self.record.started
        return min((m.created for m in self.members), default=None)


def find_running(client: "APIClient", label: str = LABEL_RUN) -> list[Job]:
    """The jobs of which the engine has containers or networks, by label; the newest first."""
    jobs: dict[tuple[str, str], Job] = {}

    def add(labels: dict[str, str], **found: Any) -> None:
        run_id, made_by = labels[LABEL_RUN], labels.get(LABEL_OWNER, "")
        name = labels.get(LABEL_JOB) or run_id
        # By owner too: a name that a dead launcher used may be in use again.
        new = Job(name=name, run_id=run_id, project="", owner=made_by)
        job = jobs.get((name, made_by), new)
        jobs[name, made_by] = replace(
            job,
            project=labels.get(LABEL_PROJECT, job.project),
            user=labels.get(LABEL_USER, job.user),
            members=(*job.members, *found.get("members", ())),
            networks=(*job.networks, *found.get("networks", ())),
        )

    filters = {"label": label}
    for found in client.containers(all=True, filters=filters):
        add(found["Labels"], members=[_member(found)])
    for found in client.networks(filters=filters):
        add(found["Labels"], networks=[(str(found["Id"]), str(found["Name"]))])
    known = [_with_record(job) for job in jobs.values()]
    return sorted(known, key=lambda job: job.started or time.time(), reverse=True)


def look_again(client: "APIClient", job: Job) -> Job:
    """The job with what the engine has of it now."""
    found = find_running(client, f"{LABEL_RUN}={job.run_id}")
    now = [other for other in found if other.owner == job.owner]
    return now[0] if now else replace(job, members=(), networks=())


def find_all(client: "APIClient") -> list[Job]:
    """Those that run, then those that only a record tells of; each the newest first."""
    running = find_running(client)
    runs = {job.run_id for job in running}
    told = [_from_record(record) for record in records.read_all() if record.run_id not in runs]
    # A launcher that has not made its containers yet, or is between two tries.
    about = [job for job in told if job.exists]
    return [*about, *running, *(job for job in told if not job.exists)]


def choose(jobs: Sequence[Job], name: str | None, *, ended: bool = False) -> Job:
    """The job that `name`, or an unambiguous beginning of it, means. Without a name the caller's
    only one that runs; where none runs and `ended` will do, the newest.
    """
    if name is None:
        return _choose_mine(jobs, ended)
    running = [job for job in jobs if job.exists]
    # A whole name goes before the beginning of one, what runs before what has ended, and of those
    # that ended the newest before others of its name, which are told by their run id.
    for group in (running, jobs):
        for job in group:
            if job.name == name:
                return job
    for group in (running, jobs):
        begun = [job for job in group if name in (job.name[: len(name)], job.run_id)]
        if len({job.name for job in begun}) == 1:
            return next((job for job in begun if job.run_id == name), begun[0])
        if begun:
            raise LauncherError(f"{name!r} may be any of {_names(begun)}: type more of it")
    there = f"; there are {_names(jobs)}" if jobs else "; there is none at all"
    raise LauncherError(f"there is no job {name!r}{there}")


def _choose_mine(jobs: Sequence[Job], ended: bool) -> Job:
    mine = [job for job in jobs if job.is_mine]
    running = [job for job in mine if job.exists]
    if len(running) == 1:
        return running[0]
    if running:
        raise LauncherError(f"{len(running)} jobs run; say which: {_names(running)}")
    if mine and ended:
        return max(mine, key=lambda job: job.started or 0)
    others = [job for job in jobs if job.exists and not job.is_mine]
    raise LauncherError(
        ("no job of yours runs" if others else "no job runs")
        + ": start one with python -m tml.docker run, or up"
        + ("" if ended else "; ps --all shows those that have ended")
        + (f"; of others there run {_names(others)}" if others else "")
    )


def choose_members(job: Job, members: Sequence[str], role: str | None) -> list[str]:
    """Those of `members` that --role means: one by its name, or all of a role."""
    chosen = [m for m in members if role in (None, m, m.rpartition("-")[0])]
    if not chosen:
        raise LauncherError(
            f"--role {role}: {job.name} has no such member; it has {', '.join(members) or 'none'}"
        )
    return chosen


def is_over(job: Job) -> bool:
    """Whether nothing more will come of a job, by its record and its launcher alone."""
    record = records.read(job.name, job.run_id) if job.record else None
    if record is None:
        return liveness(job.owner) == "dead"
    return record.state == "ended" or liveness(record.owner) == "dead"


# The verbs


def ps(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Show the jobs that run; with --all also those that have ended, of which the records tell
    without an engine, too.
    """
    if flags.all:
        client, jobs = find_all_that_can_be()
        if client is None:
            terminal.say("tml: no Docker Engine answers: this is what was noted down of jobs")
    else:
        client, _ = connect()
        jobs = [job for job in find_all(client) if job.exists or job.state == "lost"]
    if flags.json:
        print(json.dumps([_to_json(job) for job in jobs], indent=2))
    elif jobs:
        _print_table(jobs)
    else:
        more = "" if flags.all else "; ps --all shows those that have ended"
        print(f"no job runs: start one with python -m tml.docker run, or up{more}")
    return 0


def wait(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Wait until a job has ended; returns its exit status, 124 after --timeout, 125 where its
    launcher died and nobody knows.
    """
    deadline = None if flags.timeout is None else time.monotonic() + flags.timeout
    client, jobs = find_all_that_can_be()
    job = choose(jobs, flags.job, ended=True)
    result = _wait(client, job, deadline)
    if flags.json:
        print(json.dumps(result, indent=2))
    elif result["state"] == "running":
        print(f"{job.name} still runs after {flags.timeout:g} s")
    else:
        why = f": {result['cause']}" if result["cause"] else ""
        print(f"{job.name} {result['state']} with exit status {result['exit_code']}{why}")
    return TIMED_OUT if result["state"] == "running" else int(result["exit_code"])


def find_all_that_can_be() -> tuple["APIClient | None", list[Job]]:
    """As find_all; where no engine answers (restarted under a job, say) what the records tell, and
    no client.
    """
    try:
        client, _ = connect()
    except NoEngineError:
        told = [_from_record(record) for record in records.read_all()]
        if not told:
            raise
        return None, told
    return client, find_all(client)


def _wait(client: "APIClient | None", job: Job, deadline: float | None) -> dict[str, Any]:
    record = job.record
    codes: list[int] = []
    watched = None
    if client is not None and job.members and (record is None or job.owned == "elsewhere"):
        # Nobody here will write down how it ends: ask the engine.
        watched = threading.Thread(target=_watch, args=(client, job, codes), daemon=True)
        watched.start()
    while True:
        over = is_over(job) if watched is None else not watched.is_alive()
        record = records.read(job.name, job.run_id) if job.record else None
        if over or (record and record.state == "ended"):
            return _result(job, record, codes)
        if deadline is not None and time.monotonic() >= deadline:
            return _describe_end(job, "running", None, None, None)
        time.sleep(POLL_S)


def _watch(client: "APIClient", job: Job, codes: list[int]) -> None:
    """Collect the exit statuses of a job's containers, as far as they are still to be had."""
    from docker.errors import APIError

    def watch(member: Member) -> None:
        with suppress(APIError, OSError, ValueError):  # Removed before we could ask.
            codes.append(int(client.wait(member.id, timeout=None)["StatusCode"]))

    threads = [threading.Thread(target=watch, args=(m,), daemon=True) for m in job.members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _result(job: Job, record: Record | None, codes: list[int]) -> dict[str, Any]:
    if record and record.state == "ended":
        return _describe_end(job, "ended", record.exit_code, record.cause, record.ended)
    if codes:
        # The first in time that failed, as the gang rule has it.
        code = next((code for code in codes if code), 0)
        return _describe_end(job, "ended", code, None, time.time())
    left = "; its containers are still there: stop or gc" if job.members else ""
    return _describe_end(job, "lost", ENGINE_FAILED, LAUNCHER_DIED + left, None)


def _describe_end(
    job: Job, state: str, code: int | None, cause: str | None, ended: float | None
) -> dict[str, Any]:
    return {
        "job": job.name,
        "state": state,
        "exit_code": code,
        "cause": cause,
        "started": job.started,
        "ended": ended,
    }


# Between the engine, the records and a job


def _member(found: Any) -> Member:
    labels = found["Labels"]
    role, index = labels.get(LABEL_ROLE, "chief"), labels.get(LABEL_INDEX, "0")
    return Member(
        id=str(found["Id"]),
        container=str(found["Names"][0]).lstrip("/"),
        member=role if index == "0" else f"{role}-{index}",
        state=str(found["State"]),
        created=float(found["Created"]),
    )


def _with_record(job: Job) -> Job:
    record = records.read(job.name, job.run_id)
    order = {name: number for number, name in enumerate(record.members if record else ())}
    by_place = sorted(
        job.members,
        key=lambda m: (order.get(m.member, 99), m.role != "chief", m.role, len(m.member), m.member),
    )
    project = job.project or (record.project if record else "")
    return replace(job, record=record, members=tuple(by_place), project=project)


def _from_record(record: Record) -> Job:
    return Job(
        name=record.job,
        run_id=record.run_id,
        project=record.project,
        owner=record.owner,
        record=record,
    )


def _to_json(job: Job) -> dict[str, Any]:
    record = job.record
    members: list[dict[str, str | None]] = [
        {"member": m.member, "container": m.container, "state": m.state} for m in job.members
    ]
    if record and not members:
        members = [{"member": m, "container": None, "state": None} for m in record.members]
    return {
        "job": job.name,
        "run_id": job.run_id,
        "verb": record.verb if record else None,
        "project": job.project or None,
        "user": job.user or None,
        "state": job.state,
        "owner": job.owner or None,
        "members": members,
        "logs": record.logs if record else None,
        "started": job.started,
        "ended": record.ended if record else None,
        "exit_code": record.exit_code if record else None,
        "cause": record.cause if record else None,
        "restarts": record.restarts if record else 0,
    }


def _print_table(jobs: Sequence[Job]) -> None:
    # Costs more to load than the rest of `ps`; --json does without.
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        # What is read by a program or kept in a file is not cut to a window.
        console.width = 80
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("NAME", overflow="fold", min_width=18)
    table.add_column("PROJECT", overflow="fold")
    shared = not all(job.is_mine for job in jobs)
    if shared:
        table.add_column("USER", overflow="fold")
    for title in ("STATE", "MEMBERS", "STARTED", "EXIT"):
        table.add_column(title, no_wrap=True)
    for job in jobs:
        code = job.record.exit_code if job.record else None
        table.add_row(
            job.name,
            job.project or "-",
            *([job.user or user_name()] if shared else []),
            job.state,
            _count(job),
            "-" if job.started is None else f"{_span(time.time() - job.started)} ago",
            "" if code is None else str(code),
        )
    console.print(table)
    for job in jobs:
        if job.state in ("orphaned", "lost"):
            remedy = "stop or gc removes it" if job.state == "orphaned" else "gc forgets it"
            console.print(f"{job.name}: {LAUNCHER_DIED}; {remedy}", style="red", markup=False)
    for line in _causes(jobs):
        console.print(line, markup=False)


def _causes(jobs: Sequence[Job]) -> list[str]:
    """Why the newest of those that failed did."""
    failed = [(job, job.record.cause) for job in jobs if job.record and job.record.cause]
    told = [f for f in failed if f[0].state not in ("orphaned", "lost")]
    told.sort(key=lambda f: f[0].started or 0, reverse=True)
    lines = [
        # That of a job of one container begins with its name.
        cause if cause.startswith(f"{job.name} ") else f"{job.name}: {cause}"
        for job, cause in told[:CAUSES_SHOWN]
    ]
    if num_more := len(told[CAUSES_SHOWN:]):
        lines.append(f"{num_more} more failed: logs NAME, or ps --all --json, says why")
    return lines


def _count(job: Job) -> str:
    if not job.members:
        return str(len(job.record.members)) if job.record else "0"
    alive = sum(m.alive for m in job.members)
    return str(alive) if alive == len(job.members) else f"{alive} of {len(job.members)}"


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(0, int(seconds))} s"


def _names(jobs: Sequence[Job]) -> str:
    names = list(dict.fromkeys(job.name for job in jobs))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
