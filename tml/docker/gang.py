"""Several containers as one job: all are made, started, followed and removed together.

The gang rule: the first container that fails stops all others with SIGTERM, the grace, SIGKILL, and
its exit status is the job's. A job has succeeded when all that train, and the evaluator, have ended
well; what serves them (data set workers) is stopped then. A signal to us stops all the same way; a
second one kills. A member that is cut off the job's network has failed with CUT_OFF.

One thread, that of `run`, decides and acts; others wait for the engine and put what they learn into
its queue. What is in the queue is a reason to look, and what the engine says then is what counts.
"""

import logging
import queue
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tml.docker import records, signals, terminal
from tml.docker.container import (
    ENGINE_BACK_S,
    REMOVED,
    Container,
    MemoryWatch,
    State,
    engine_answers,
    explained,
    in_thread,
    is_taken,
    name_taken,
    wait_for_engine,
)
from tml.docker.errors import ENGINE_FAILED, LauncherError
from tml.docker.evidence import Ended
from tml.docker.output import Channel, Output
from tml.docker.owner import this_process
from tml.docker.plan import LABEL_OWNER, LABEL_RUN, Gang, Plan
from tml.docker.postmortem import explain_failure
from tml.docker.prefix import Stream

if TYPE_CHECKING:
    import socket

    from docker import APIClient

CUT_OFF = 1
"""Exit status of a job of which a member lost the network; 125 is for the launcher and engine."""
LOOK_EVERY_S = 5.0
"""All members are looked at so often, whatever was reported: no single event is relied upon."""
SETTLE_S = 0.05
"""Two that fail together are told apart by the engine's clock, once it knows of both."""
KILL_PATIENCE_S = 10.0
"""After SIGKILL a container is waited for so long; then it is removed as it is."""
ENGINE_STOPPED = "the Docker Engine was stopped while the job ran"


@dataclass(frozen=True, kw_only=True)
class Told:
    """Where a job tells what becomes of it."""

    verb: Literal["run", "up"]
    endpoint: str
    """Address of the engine, for the record."""
    show: bool = True
    """Print what the members say; what they say is kept in the logs in any case."""
    timestamps: bool = False
    on_running: Callable[[], None] = lambda: None
    """Called once, when all containers have been started for the first time."""


def run(client: "APIClient", gang: Gang, told: Told) -> int:
    """Carry out a gang to its end, and remove all of it; returns the job's exit status."""
    # More members than the pool keeps connections: no reason to say anything.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    job = _Job(client, gang, told)
    with ExitStack() as stack:
        # First of all, so that a signal at any later moment is an event and not an exception
        # half-way.
        stack.enter_context(signals.as_calls(job.on_signal))
        stack.callback(job.output.close)
        try:
            outcome = job.carry_out()
        except LauncherError as error:
            job.end_record(_Outcome(error.exit_code, str(error).splitlines()[0], str(error)))
            raise
        job.end_record(outcome)
        return outcome.code


class _Member:
    """One container of one attempt."""

    def __init__(self, plan: Plan, container: Container, channel: Channel) -> None:
        self.plan, self.container, self.channel = plan, container, channel
        self.connection: socket.socket | None = None
        self.watch = 0
        """Number of the watch that counts: after the engine was away, older ones are stale."""
        self.state: State | None = None
        """How it ended; None while it runs."""
        self.output_ended = False
        self.removed = self.cut_off = self.stopped_by_us = False

    @property
    def ended(self) -> bool:
        return self.state is not None

    @property
    def exit_code(self) -> int:
        assert self.state is not None
        return REMOVED if self.removed else int(self.state["ExitCode"])

    @property
    def failed(self) -> bool:
        return self.cut_off or (self.ended and self.exit_code != 0)

    def finished_at(self) -> tuple[str, str]:
        """The engine's time, to be compared: it leaves out zeros at the end of a fraction."""
        text = str((self.state or {}).get("FinishedAt", "")).removesuffix("Z")
        seconds, _, fraction = text.partition(".")
        return seconds, fraction.ljust(9, "0")


@dataclass(frozen=True)
class _Event:
    kind: Literal["stop", "exited", "output-ended", "lost", "look"]
    member: _Member | None = None
    watch: int = 0
    signal: int = 0


@dataclass(frozen=True)
class _Outcome:
    """How one attempt ended; `text` is what people are told."""

    code: int
    cause: str | None = None
    text: str | None = None


class _Job:
    """The network, the attempts, the record."""

    def __init__(self, client: "APIClient", gang: Gang, told: Told) -> None:
        self.client, self.gang, self.told = client, gang, told
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self.output = Output(
            gang.members,
            logs=gang.logs or None,
            show=told.show,
            timestamps=told.timestamps,
            on_broken=lambda: self.on_signal(signal.SIGPIPE),
        )
        self.stop_signal = self.num_stops = 0
        """The first signal to us, and how many came."""
        self.engine_gone = False
        """It did not come back: nothing can be removed."""
        self.record: records.Record | None = None
        self.running_told = False

    def on_signal(self, number: int) -> None:
        """Somebody wants us to stop."""
        self.events.put(_Event("stop", signal=number))

    def carry_out(self) -> _Outcome:
        """All attempts; how the last of them ended."""
        with ExitStack() as stack:
            stack.callback(self._sweep)
            if self.gang.network:
                network = self._make_network()
                stack.callback(self._remove_network, network)
                in_thread(self._watch_network, network)
            most = self.gang.max_restarts + 1
            for number in range(1, most + 1):
                outcome = _Attempt(self).carry_out()
                if outcome.cause is None or number == most or self.told_to_stop():
                    break
                self._say_restart(number, most, outcome.cause)
        if outcome.text is not None:
            terminal.say("\n".join(f"tml: {line}" for line in outcome.text.splitlines()))
        return outcome

    def told_to_stop(self) -> bool:
        """Whether a signal has come; other events stay in the queue."""
        others = []
        while not self.events.empty():
            event = self.events.get()
            if event.kind == "stop":
                self.num_stops += 1
                self.stop_signal = self.stop_signal or event.signal
            else:
                others.append(event)
        for event in others:
            self.events.put(event)
        return bool(self.stop_signal)

    def say(self, text: str) -> None:
        """A line of ours."""
        terminal.say(f"tml: {text}")

    # The record

    def begin_record(self) -> None:
        """All containers exist, so the name is ours: note the job down."""
        if self.record is None:
            self.record = records.begin(
                self.told.verb, self.gang.members, self.told.endpoint, self.gang.logs or None
            )

    def running(self) -> None:
        """All containers have been started."""
        self._change_record(state="running")
        if not self.running_told:
            self.running_told = True
            self.told.on_running()

    def stopping(self) -> None:
        """SIGTERM goes to all; what follows is the grace."""
        self._change_record(state="stopping")

    def end_record(self, outcome: _Outcome) -> None:
        """Note down how the job ended."""
        if self.record is not None:
            self.record = records.end(self.record, outcome.code, outcome.cause, outcome.text)

    def _change_record(self, **changes: Any) -> None:
        if self.record is not None:
            self.record = records.change(self.record, **changes)

    def _say_restart(self, number: int, most: int, cause: str) -> None:
        text = (
            f"attempt {number} of {most} failed: {cause}; starting all again, from the last "
            "complete checkpoint"
        )
        self.say(text)
        self.output.mark(text)
        self._change_record(state="restarting", restarts=number)

    # The network

    def _make_network(self) -> str:
        from docker.errors import APIError

        labels, name = {**self.gang.labels, LABEL_OWNER: this_process()}, self.gang.network
        with explained(self.gang.members[0]):
            try:
                # Engines before 25 would make a second one of that name.
                made = self.client.create_network(
                    name, driver="bridge", labels=labels, check_duplicate=True
                )
            except APIError as error:
                if is_taken(error):
                    raise name_taken(self.client, "network", name) from error
                raise
        return str(made["Id"])

    def _remove_network(self, network: str) -> None:
        from docker.errors import APIError

        if self.engine_gone:
            return
        remedy = f"docker network rm {self.gang.network}"
        for wait_s in (0.0, 0.1, 0.5, 2.0):
            time.sleep(wait_s)
            try:
                self.client.remove_network(network)
                return
            except APIError as error:
                if error.status_code == 404:
                    return
                # An endpoint may linger for a moment; one of somebody else stays.
                said = str(error.explanation)
            except OSError as error:
                said = str(error)
                if not wait_for_engine(self.client, given_up=self.told_to_stop):
                    break
        self.say(f"could not remove network {self.gang.network}: {said}; later: {remedy}")

    def _watch_network(self, network: str) -> None:
        """A disconnect, which an exit too brings about, is a reason to look."""
        filters = {"network": [network], "event": ["disconnect"]}
        try:
            for _ in self.client.events(filters=filters, decode=True):
                self.events.put(_Event("look"))
        except Exception as error:
            # The engine has gone, or this one connection: looking now and then must do.
            logging.debug("no more events of the network: %s", error)

    def _sweep(self) -> None:
        """Remove what an answer of the engine that we never got may have made."""
        from docker.errors import DockerException

        if self.engine_gone:
            return
        filters = {"label": f"{LABEL_RUN}={self.gang.run_id}"}
        try:
            for found in self.client.containers(all=True, filters=filters):
                self.client.remove_container(found["Id"], v=True, force=True)
        except (DockerException, OSError) as error:
            logging.debug("no last look for containers: %s", error)


class _Attempt:
    """All containers once: made, started, followed, removed."""

    def __init__(self, job: _Job) -> None:
        self.job, self.gang, self.client, self.events = job, job.gang, job.client, job.events
        self.members: list[_Member] = []
        self.first: _Member | None = None
        """The one that failed first."""
        self.engine_stopped = False
        self.stopping = self.killed = False
        """SIGTERM, SIGKILL was sent to those that ran."""
        self.kill_at: float | None = None
        self.abandoned = False
        self.look_at = 0.0

    def carry_out(self) -> _Outcome:
        try:
            self._create()
            if self.job.told_to_stop():
                return _Outcome(128 + self.job.stop_signal)
            self.job.begin_record()
            memory = MemoryWatch([member.container for member in self.members])
            try:
                self._start()
                self.job.running()
                with explained(self.gang.members[0]):
                    self._follow()
            finally:
                memory.end()
            return self._outcome(memory)
        finally:
            self._remove()

    # Making and starting

    def _create(self) -> None:
        _in_parallel(self._make, [(plan, plan) for plan in self.gang.members])
        order = [plan.name for plan in self.gang.members]
        self.members.sort(key=lambda member: order.index(member.plan.name))

    def _make(self, plan: Plan) -> None:
        container = Container.create(self.client, plan)
        member = _Member(plan, container, self.job.output.channel(plan.member))
        # At once, so that it goes whatever happens next.
        self.members.append(member)
        member.connection = container.attach()
        container.when_ended(partial(self._ended, member, member.watch))
        in_thread(self._pump, member, member.watch, member.connection)

    def _start(self) -> None:
        # The chief's is sent first; the others look for it as long as it takes.
        _in_parallel(lambda member: member.container.start(), [(m.plan, m) for m in self.members])

    # What other threads learn

    def _ended(self, member: _Member, watch: int, error: Exception | None) -> None:
        self.events.put(_Event("exited" if error is None else "lost", member, watch))

    def _pump(self, member: _Member, watch: int, connection: "socket.socket") -> None:
        from docker.utils.socket import frames_iter

        try:
            for stream, data in frames_iter(connection, False):
                member.channel.feed("stderr" if stream == 2 else "stdout", data)
        except (OSError, ValueError) as error:  # ValueError: closed under us, with its container.
            logging.debug("lost the output of %s: %s", member.plan.name, error)
        member.channel.finish()
        self.events.put(_Event("output-ended", member, watch))

    def _follow_again(self, member: _Member, since: float) -> None:
        """Wait for its exit, and for what it has said since the engine went away."""
        member.output_ended = False
        told = partial(self._ended, member, member.watch)
        member.container.when_ended(told, started=True)
        in_thread(self._pump_logs, member, member.watch, since)

    def _pump_logs(self, member: _Member, watch: int, since: float) -> None:
        def pump(stream: Stream) -> None:
            wanted = {"stdout": stream == "stdout", "stderr": stream == "stderr"}
            try:
                for data in self.client.logs(
                    member.container.id, stream=True, follow=True, since=since, **wanted
                ):
                    member.channel.feed(stream, data)
            except Exception as error:
                # Also urllib3's own, when the engine goes away again.
                logging.debug("lost the output of %s: %s", member.plan.name, error)

        for thread in [in_thread(pump, "stdout"), in_thread(pump, "stderr")]:
            thread.join()
        member.channel.finish()
        self.events.put(_Event("output-ended", member, watch))

    # Following

    def _follow(self) -> None:
        self.look_at = time.monotonic() + LOOK_EVERY_S
        while not self._over():
            now = time.monotonic()
            until = min(self.look_at, self.kill_at or self.look_at)
            try:
                event = self.events.get(timeout=max(0.0, until - now))
            except queue.Empty:
                self._act(self._on_time)
                continue
            self._act(partial(self._handle, event))

    def _over(self) -> bool:
        return self.abandoned or all(m.ended and m.output_ended for m in self.members)

    def _act(self, act: Callable[[], None]) -> None:
        """Do something with the engine, which may have gone."""
        from docker.errors import APIError

        try:
            act()
        except APIError:
            raise
        except OSError:
            self._engine_lost()

    def _on_time(self) -> None:
        now = time.monotonic()
        if self.kill_at is not None and now >= self.kill_at:
            self.kill_at = None
            if self.killed:
                self.abandoned = True
                return
            names = ", ".join(member.plan.member for member in self._live())
            self._kill()
            self.job.say(f"not stopped after {self._grace_s} s: killing {names}")
        if now >= self.look_at:
            self.look_at = now + LOOK_EVERY_S
            self._look(self._live())

    def _handle(self, event: _Event) -> None:
        member = event.member
        if event.kind == "stop":
            self._told_to_stop(event.signal)
        elif event.kind == "look":
            self._look(self._live())
        elif member is None or member not in self.members or event.watch != member.watch:
            pass  # Of an earlier attempt, or from before the engine was away.
        elif event.kind == "exited":
            self._look([member])
        elif event.kind == "output-ended":
            member.output_ended = True
        elif event.kind == "lost":
            self._engine_lost()

    def _live(self) -> list[_Member]:
        return [member for member in self.members if not member.ended]

    def _look(self, members: Iterable[_Member]) -> None:
        """Ask the engine how they are, and do what follows from that."""
        for member in members:
            self._see(member)
        failed = [m for m in self.members if m.failed]
        if failed and not self.stopping:
            self._fail()
        elif not self.stopping and all(m.ended for m in self.members if not m.plan.is_service):
            # Done. What served them ends now, and its exit status tells nothing.
            self._stop()

    def _see(self, member: _Member) -> None:
        if member.ended:
            return
        seen = member.container.look()
        if seen is None:
            member.removed = member.output_ended = True
            member.state = {}
            return
        state, connected = seen
        if state["Status"] in ("exited", "dead"):
            member.state = state
        elif state["Running"] and self.gang.network and not connected:
            member.cut_off = True

    def _fail(self) -> None:
        """Find out which failed first, and stop the others."""
        time.sleep(SETTLE_S)
        for member in self._live():
            self._see(member)
        failed = [m for m in self.members if m.failed]
        # Who is cut off still runs, and makes others fail.
        cut_off = [m for m in failed if m.cut_off]
        self.first = cut_off[0] if cut_off else min(failed, key=_Member.finished_at)
        how = (
            f"was cut off the job's network, {self.gang.network}"
            if self.first.cut_off
            else "was removed by somebody else"
            if self.first.removed
            else f"ended with exit code {self.first.exit_code}"
        )
        live = self._live()
        self._stop()
        if live:
            names = ", ".join(member.plan.member for member in live)
            self.job.say(
                f"{self.first.plan.member} {how}: stopping {names}, up to {self._grace_s} s"
            )

    # Stopping

    @property
    def _grace_s(self) -> int:
        return max(member.plan.stop_grace_s for member in self.members)

    def _told_to_stop(self, number: int) -> None:
        if not self._live():
            # It is over; only our own output is blocked, and somebody is impatient.
            self.abandoned = True
            return
        self.job.num_stops += 1
        self.job.stop_signal = self.job.stop_signal or number
        if self.job.num_stops > 1:
            self._kill()
            self.job.say(f"killing {self.gang.job}")
            return
        if not self.stopping:
            self._stop()
        self.job.say(f"stopping {self.gang.job}, up to {self._grace_s} s; again to kill it")

    def _stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.kill_at = time.monotonic() + self._grace_s
            self.job.stopping()
        self._signal("SIGTERM")

    def _kill(self) -> None:
        self.killed = True
        self.kill_at = time.monotonic() + KILL_PATIENCE_S
        self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        for member in self._live():
            member.stopped_by_us = True
            member.container.kill(name)

    # The engine goes away

    def _engine_lost(self) -> None:
        """Wait for the engine, and go on with what it still has."""
        since = time.time()
        for member in self.members:
            member.watch += 1
        if not engine_answers(self.client):
            self.job.say(
                f"lost the Docker Engine while {self.gang.job} ran; waiting up to "
                f"{ENGINE_BACK_S:.0f} s for it to come back"
            )
            self._wait_for_engine()
            self.job.say("the Docker Engine is back")
        live = self._live()
        for member in live:
            self._see(member)
        ended_meanwhile = any(m.ended for m in live)
        live = self._live()
        if ended_meanwhile and not live and not self._keeps_containers():
            self.engine_stopped = True
            self.stopping = True
        for member in self.members:
            # Also of those that had ended before: that their output has, is told to an older watch.
            member.output_ended = member.ended
        for member in live:
            self._follow_again(member, since)
        if self.job.stop_signal and not self.stopping:
            self._stop()
        elif self.stopping:
            self._signal("SIGKILL" if self.killed else "SIGTERM")
        else:
            self._look([])

    def _wait_for_engine(self) -> None:
        def given_up() -> bool:
            self.job.told_to_stop()
            return self.job.num_stops > 1

        if not wait_for_engine(self.client, given_up):
            self.job.engine_gone = True
            raise LauncherError(
                f"the Docker Engine went away while {self.gang.job} ran, and did not come back: "
                f"its containers{' and its network' if self.gang.network else ''} may be left. "
                "Once it is back: python -m tml.docker gc"
            )

    def _keeps_containers(self) -> bool:
        return bool(self.client.info().get("LiveRestoreEnabled"))

    # The end

    def _outcome(self, memory: MemoryWatch) -> _Outcome:
        if self.engine_stopped:
            text = f"{ENGINE_STOPPED}; its containers ended with it"
            return _Outcome(ENGINE_FAILED, ENGINE_STOPPED, text)
        if self.first is not None:
            kept_in = self.job.output.kept_in
            why = explain_failure([self._told_of(m, memory) for m in self.members], kept_in)
            code = CUT_OFF if self.first.cut_off else self.first.exit_code
            return _Outcome(code, why.cause, why.text)
        return _Outcome(128 + self.job.stop_signal if self.job.stop_signal else 0)

    def _told_of(self, member: _Member, memory: MemoryWatch) -> Ended:
        state = member.state or {}
        return Ended(
            plan=member.plan,
            exit_code=state.get("ExitCode"),
            stopped_by_us=member.stopped_by_us,
            oom_killed=bool(state.get("OOMKilled")),
            memory_peak=memory.peaks.get(member.container.id),
            last_lines=tuple(member.channel.last_lines),
            error=str(state.get("Error") or ""),
            cut_off=member.cut_off,
            first=member is self.first,
        )

    def _remove(self) -> None:
        if self.job.engine_gone or not self.members:
            return
        with ThreadPoolExecutor(len(self.members)) as threads:
            for member in self.members:
                threads.submit(member.container.remove)
        for member in self.members:
            if member.connection is not None:
                member.connection.close()


def _in_parallel(work: Callable[[Any], None], items: Sequence[tuple[Plan, Any]]) -> None:
    """Do `work` for each item at once; when all are done, the first error, told of its plan."""
    with ThreadPoolExecutor(len(items)) as threads:
        results = [(plan, threads.submit(work, item)) for plan, item in items]
    for plan, result in results:
        with explained(plan):
            result.result()
