"""Ending jobs: the verbs `stop` and `gc`.

A job whose launcher lives is stopped by its launcher, which is told with SIGTERM: it gives the
grace, removes what it made and writes down how the job ended. What no living launcher of this
machine owns is stopped here, container by container, with the grace that each was made with.

    stop --json   a list of {job, how, exit_code, removed, left}, one for each job; how is stopped,
                  killed (the grace was over, or Ctrl-C came twice) or ended (it had ended already)
    gc --json     {dry_run, removed, left}

`removed` is a list of {kind, name, job}, `left` of {kind, name, job, why}; kind is container,
network, secret (a folder with secrets; its job is null) or record. A record that is removed is one
that no longer says that its job runs.
"""

import argparse
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tml.docker import jobs, logs, records, secrets, terminal
from tml.docker.connection import connect
from tml.docker.container import in_thread
from tml.docker.errors import ENGINE_FAILED, LauncherError
from tml.docker.jobs import LAUNCHER_DIED, POLL_S, Job, Member
from tml.docker.owner import liveness, pid_of
from tml.docker.plan import STOP_GRACE_S
from tml.docker.records import Record

if TYPE_CHECKING:
    from docker import APIClient

T = TypeVar("T")
R = TypeVar("R")

STOPPED = 128 + signal.SIGTERM
"""Exit status of a job that was stopped, as its launcher writes it down."""
TIDY_S = 15.0
"""What a launcher may take, after its containers have ended, to remove them."""


@dataclass(frozen=True)
class Item:
    """Something that a job has, and why it is still there, if it is."""

    kind: Literal["container", "network", "secret", "record"]
    name: str
    job: str | None
    why: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """As the module's docstring has it."""
        data = asdict(self)
        if self.why is None:
            del data["why"]
        return data


@dataclass
class Ending:
    """How one job is ended, as it goes on."""

    job: Job
    how: Literal["stopped", "killed", "ended"] = "stopped"
    removed: list[Item] = field(default_factory=list)
    left: list[Item] = field(default_factory=list)


class Impatience:
    """How often Ctrl-C was pressed while something is being stopped: twice means SIGKILL."""

    def __init__(self, what: str) -> None:
        self.what, self.times = what, 0

    @property
    def kills(self) -> bool:
        """Whether the grace is to be cut short."""
        return self.times >= 2

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Ctrl-C counts, and does not end us: half a stop would leave things behind."""

        def count(*_: object) -> None:
            self.times += 1
            more = "again to kill" if self.times == 1 else "killing"
            terminal.say(f"tml: stopping {self.what}; {more}")

        before = signal.signal(signal.SIGINT, count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


# The verbs


def stop(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Stop a job, or all of the caller's: SIGTERM, the grace, SIGKILL; afterwards nothing of them
    is left.
    """
    if flags.stop_grace is not None and flags.stop_grace < 0:
        raise LauncherError(f"--stop-grace {flags.stop_grace}: expected 0 or more seconds")
    client, _ = connect()
    known = jobs.find_all(client)
    if flags.all:
        mine = [job for job in known if job.is_mine]
        chosen = [job for job in mine if job.exists or job.state == "lost"]
    else:
        chosen = [jobs.choose(known, flags.job)]
    impatience = Impatience(", ".join(job.name for job in chosen))
    with impatience.counted():
        endings = in_parallel(lambda j: _stop(client, j, flags.stop_grace, impatience), chosen)
    if flags.json:
        print(json.dumps([_ending_to_json(ending) for ending in endings], indent=2))
    else:
        for ending in endings:
            _say_ending(ending)
        if not endings:
            print("no job runs")
    return ENGINE_FAILED if any(ending.left for ending in endings) else 0


def gc(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Remove what launchers that are dead left behind, and nothing else."""
    client, _ = connect()
    known = jobs.find_all(client)
    dead = [job for job in known if job.state in ("orphaned", "lost")]
    left = [item for job in known if job not in dead for item in _items(job, _why_kept(job))]
    if flags.dry_run:
        removed, failed = [item for job in dead for item in _items(job)], []
        removed += [Item("secret", str(folder), None) for folder in secrets.leftovers()]
    else:
        impatience = Impatience("what dead launchers left")
        with impatience.counted():
            endings = in_parallel(lambda job: _collect(client, job, impatience), dead)
        removed = [item for ending in endings for item in ending.removed]
        failed = [item for ending in endings for item in ending.left]
        for folder in secrets.leftovers():
            shutil.rmtree(folder, ignore_errors=True)
            (failed if folder.exists() else removed).append(_secret(folder))
    if flags.json:
        lists = {"removed": removed, "left": [*left, *failed]}
        report = {name: [item.to_json() for item in items] for name, items in lists.items()}
        print(json.dumps({"dry_run": flags.dry_run, **report}, indent=2))
    else:
        _say_collected(removed, [*left, *failed], flags.dry_run)
    return ENGINE_FAILED if failed else 0


# Ending one job


def _stop(client: "APIClient", job: Job, grace: int | None, impatience: Impatience) -> Ending:
    ending = Ending(job)
    if job.state == "ended":
        ending.how = "ended"
        return ending
    told = job.owned == "alive" and _tell_owner(job)
    if told:
        _await_owner(client, ending, grace, impatience)
    elif job.owned == "elsewhere":
        terminal.say(f"tml: {job.name}: {_why_kept(job)}; stopping its containers from here")
    # A launcher that lives has done all this; where it failed, or there is none, it is on us.
    _end_directly(client, ending, grace, impatience)
    cause = f"stopped after {LAUNCHER_DIED}" if job.owned == "dead" else "stopped"
    _end_record(ending, STOPPED, cause)
    return ending


def _collect(client: "APIClient", job: Job, impatience: Impatience) -> Ending:
    ending = Ending(job)
    _end_directly(client, ending, None, impatience)
    _end_record(ending, ENGINE_FAILED, LAUNCHER_DIED)
    return ending


def _tell_owner(job: Job) -> bool:
    """SIGTERM to the launcher's process; False where it is gone, or may not be told by us."""
    try:
        os.kill(pid_of(job.owner), signal.SIGTERM)
        # One that was suspended with Ctrl-Z takes it only when it is woken.
        os.kill(pid_of(job.owner), signal.SIGCONT)
    except ProcessLookupError:
        return False
    except PermissionError:
        terminal.say(
            f"tml: {job.name}: its launcher (process {pid_of(job.owner)}) is another user's; "
            "stopping its containers from here"
        )
        return False
    return True


def _await_owner(
    client: "APIClient", ending: Ending, grace: int | None, impatience: Impatience
) -> None:
    """Wait until the launcher has ended the job; kill its containers when the grace is over."""
    job = ending.job
    # The launcher kills at the grace that it was given; we only where it does not.
    grace_s = _grace_of(client, job.members) + TIDY_S if grace is None else grace
    kill_at, give_up_at = time.monotonic() + grace_s, float("inf")
    while liveness(job.owner) == "alive":
        now = jobs.look_again(client, job)
        if not now.members and not now.networks and _is_recorded(job):
            break
        if time.monotonic() >= give_up_at:
            terminal.say(f"tml: {job.name}: its launcher does not end; removing its containers")
            return
        if ending.how != "killed" and (impatience.kills or time.monotonic() >= kill_at):
            ending.how, give_up_at = "killed", time.monotonic() + TIDY_S
            # The second signal makes the launcher kill, too, and start nothing again.
            _tell_owner(job)
            for member in now.members:
                _kill(client, member, "SIGKILL")
        time.sleep(POLL_S)
    ending.removed = [item for item in _items(job) if item.kind != "record"]


def _is_recorded(job: Job) -> bool:
    """Whether the launcher has written down that the job ended, where it writes such things."""
    record = _record_of(job)
    return record is None or record.state == "ended"


def _record_of(job: Job) -> Record | None:
    return records.read(job.name, job.run_id) if job.record else None


def _end_record(ending: Ending, exit_code: int, cause: str) -> None:
    record = _record_of(ending.job)
    if record and record.state != "ended":
        records.end(record, exit_code, cause)
        ending.removed.append(Item("record", record.job, record.job))


def _end_directly(
    client: "APIClient", ending: Ending, grace: int | None, impatience: Impatience
) -> None:
    """End what there is of a job: SIGTERM to each container, its grace, SIGKILL; then remove the
    containers, several at a time, and the networks.
    """
    now = jobs.look_again(client, ending.job)
    in_parallel(lambda m: _end_container(client, ending, m, grace, impatience), now.members)
    for identifier, name in now.networks:
        with _noted(ending, Item("network", name, ending.job.name)):
            client.remove_network(identifier)


def _end_container(
    client: "APIClient", ending: Ending, member: Member, grace: int | None, impatience: Impatience
) -> None:
    with _noted(ending, Item("container", member.container, ending.job.name)):
        # Nobody else keeps what it says now. Only what runs can be asked for its secrets.
        unkept = ending.job.owned == "dead" and ending.job.record is not None
        hidden = logs.secrets_of(client, member) if unkept else None
        if member.alive:
            _stop_container(client, ending, member, grace, impatience)
        if unkept:
            logs.keep_rest(client, ending.job, member, hidden)
        client.remove_container(member.id, v=True, force=True)


def _stop_container(
    client: "APIClient", ending: Ending, member: Member, grace: int | None, impatience: Impatience
) -> None:
    from docker.errors import APIError

    ended = threading.Event()
    in_thread(_wait_for, client, member, ended)
    if member.state == "paused":
        with suppress(APIError):
            client.unpause(member.id)  # Paused, it could not act on a SIGTERM.
    deadline = time.monotonic() + (_grace_of(client, [member]) if grace is None else grace)
    _kill(client, member, "SIGTERM")
    while not ended.wait(POLL_S):
        if impatience.kills or time.monotonic() >= deadline:
            ending.how = "killed"
            _kill(client, member, "SIGKILL")
            ended.wait(TIDY_S)
            return


def _wait_for(client: "APIClient", member: Member, ended: threading.Event) -> None:
    from docker.errors import APIError

    with suppress(APIError, OSError):
        client.wait(member.id, timeout=None)
    ended.set()


def _kill(client: "APIClient", member: Member, name: str) -> None:
    from docker.errors import APIError

    try:
        client.kill(member.id, name)
    except APIError as error:
        if error.status_code not in (404, 409):  # It has ended on its own in this moment.
            raise


@contextmanager
def _noted(ending: Ending, item: Item) -> Iterator[None]:
    """Note that something was removed, or why it could not be."""
    from docker.errors import APIError

    try:
        yield
    except APIError as error:
        if error.status_code not in (404, 409):  # Gone, or somebody else is removing it.
            ending.left.append(replace(item, why=str(error.explanation)))
            return
    except OSError as error:
        ending.left.append(replace(item, why=str(error)))
        return
    if item not in ending.removed:
        ending.removed.append(item)


def _grace_of(client: "APIClient", members: Sequence[Member]) -> int:
    """The longest grace that these containers were made with."""
    from docker.errors import NotFound

    longest = 0
    for member in members:
        with suppress(NotFound):
            given = client.inspect_container(member.id)["Config"].get("StopTimeout")
            longest = max(longest, STOP_GRACE_S if given is None else int(given))
    return longest


def in_parallel(call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `call` returns for each, several at a time."""
    with ThreadPoolExecutor(max(1, min(16, len(items)))) as pool:
        return list(pool.map(call, items))


# What is told


def _items(job: Job, why: str | None = None) -> list[Item]:
    found = [Item("container", m.container, job.name, why) for m in job.members]
    found += [Item("network", name, job.name, why) for _, name in job.networks]
    if job.record and job.record.state != "ended" and why is None:
        found.append(Item("record", job.name, job.name))
    return found


def _secret(folder: Path) -> Item:
    why = "it could not be removed" if folder.exists() else None
    return Item("secret", str(folder), None, why)


def _why_kept(job: Job) -> str:
    host = job.owner.partition(":")[0]
    if not host:
        return "it names no launcher"
    if job.owned == "elsewhere":
        return f"its launcher is on another machine, {host}"
    return f"its launcher, process {pid_of(job.owner)}, lives"


def _ending_to_json(ending: Ending) -> dict[str, Any]:
    record = _record_of(ending.job)
    return {
        "job": ending.job.name,
        "how": ending.how,
        "exit_code": record.exit_code if record else None,
        "removed": [item.to_json() for item in ending.removed],
        "left": [item.to_json() for item in ending.left],
    }


def _say_ending(ending: Ending) -> None:
    name, record = ending.job.name, _record_of(ending.job)
    if ending.how == "ended":
        code = record.exit_code if record else None
        print(f"{name} had ended already" + ("" if code is None else f", exit status {code}"))
        return
    print(f"{ending.how} {name}")
    for item in ending.left:
        print(f"left {item.kind} {item.name}: {item.why}")


def _say_collected(removed: Sequence[Item], left: Sequence[Item], dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for item in removed:
        if item.kind == "record":
            what = "would note" if dry_run else "noted"
            print(f"{what} that {item.job} ended: {LAUNCHER_DIED}")
        else:
            print(f"{verb} {item.kind} {item.name}: {LAUNCHER_DIED}")
    for item in left:
        print(f"left {item.kind} {item.name}: {item.why}")
    if not removed:
        print("nothing to remove: no launcher that is dead left anything")
