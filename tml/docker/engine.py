"""One container on the caller's own terminal, so that nothing is lost and nothing is left behind.

A container's life: create → wait for its next exit, before it starts → attach → start → follow →
inspect → remove. The first signal to us sends SIGTERM and waits the grace, the second sends
SIGKILL; we then exit with 128 + the signal, and otherwise with the container's own status.
"""

import os
import queue
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

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
    wait_for_engine,
)
from tml.docker.errors import LauncherError
from tml.docker.output import Channel, Output
from tml.docker.plan import Plan

if TYPE_CHECKING:
    import threading

    from docker import APIClient

    from tml.docker.postmortem import PostMortem


LOOK_EVERY_S = 5.0
"""Once its output has ended a container is looked at so often: no single event is relied upon."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """What makes a run a job: it is noted down, and of its failure people are told the cause."""

    endpoint: str
    """Address of the engine."""
    logs: str | None = None
    """Folder that its output is also kept in."""


def run_attached(
    client: "APIClient", plan: Plan, *, note: Note | None = None, pass_interrupt: bool = False
) -> int:
    """Run the container to its end and remove it; returns the exit status that the launcher should
    have.

    `pass_interrupt`: on a terminal Ctrl-C goes into the container as a key, as a shell there
    expects.
    """
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    with ExitStack() as stack:
        # First of all, so that a signal at any later moment is an event and not an exception
        # half-way.
        stack.enter_context(
            signals.as_calls(
                lambda number: events.put(_Event("stop", signal=number)),
                (lambda: events.put(_Event("resize"))) if plan.tty else None,
            )
        )
        with explained(plan):
            container = Container.create(client, plan)
        run = _Run(container, events, pass_interrupt)
        # Pushed before anything can fail: whatever happens below, the container goes.
        stack.callback(run.remove)
        if note is None:
            with explained(plan):
                return run.follow(stack)
        code = _noted(run, stack, note)
    if run.why is not None:
        terminal.say("\n".join(f"tml: {line}" for line in run.why.text.splitlines()))
    return code


def _noted(run: "_Run", stack: ExitStack, note: Note) -> int:
    """Follow a run, keep its output, and write its record."""
    output = Output(
        [run.plan], logs=note.logs, show=False, timestamps=False, on_broken=lambda: None
    )
    stack.callback(output.close)
    run.kept = output.channel(run.plan.member)
    run.record = record = records.begin("run", [run.plan], note.endpoint, note.logs)
    try:
        with explained(run.plan):
            code = run.follow(stack)
    except LauncherError as error:
        records.end(record, error.exit_code, str(error).splitlines()[0], str(error))
        raise
    why = run.why
    records.end(record, code, why.cause if why else None, why.text if why else None)
    return code


@dataclass(frozen=True)
class _Event:
    kind: str
    """stop (a signal or Ctrl-C), resize, exited, output-ended, lost."""
    signal: int = 0


class _Run:
    """One started container, followed to its end."""

    def __init__(
        self,
        container: Container,
        events: "queue.SimpleQueue[_Event]",
        pass_interrupt: bool,
    ) -> None:
        self.container, self.plan, self.events = container, container.plan, events
        self.pass_interrupt = pass_interrupt
        self.kept: Channel | None = None
        """Of a job: where its output goes beside the caller's terminal."""
        self.record: records.Record | None = None
        self.why: PostMortem | None = None
        """Of a job that failed."""
        self.engine_gone = False
        self.stop_signal = 0
        self.kill_at: float | None = None

    def follow(self, stack: ExitStack) -> int:
        connection = self.container.attach()
        stack.callback(connection.close)
        self.container.when_ended(self._ended)
        if not self.events.empty():
            # A signal came while the container was made: it never starts.
            event = self.events.get()
            if event.kind == "stop":
                return 128 + event.signal
            self.events.put(event)
        self.container.start()
        self._change_record("running")
        memory = MemoryWatch([self.container])
        stack.callback(memory.end)
        in_thread(self._pump_output, connection)
        if self.plan.tty:
            stack.enter_context(terminal.raw_mode())
            self.container.resize()
        if self.plan.interactive:
            stop_read, stop_write = os.pipe()
            reader = in_thread(self._pump_input, connection, stop_read)
            # Later callbacks run first: the reader has let go of stdin before the terminal is
            # restored.
            stack.callback(_end_reader, reader, stop_write)
        self._until_ended()
        return self._exit_code(memory)

    def remove(self) -> None:
        """Remove the container; nothing where there is no engine that could."""
        if not self.engine_gone:
            self.container.remove()

    def _ended(self, error: Exception | None) -> None:
        self.events.put(_Event("exited" if error is None else "lost"))

    def _pump_output(self, connection: socket.socket) -> None:
        from docker.utils.socket import frames_iter

        try:
            for stream, data in frames_iter(connection, self.plan.tty):
                if self.kept:
                    self.kept.feed("stderr" if stream == 2 else "stdout", data)
                terminal.write_all(2 if stream == 2 else 1, data)
        except BrokenPipeError:
            # Whoever read our output has gone, as in `run | head`: nobody wants the rest.
            self.events.put(_Event("stop", signal=signal.SIGPIPE))
        except (OSError, ValueError):
            pass  # The connection was closed under us, because the run is over.
        if self.kept:
            self.kept.finish()
        self.events.put(_Event("output-ended"))

    def _pump_input(self, connection: socket.socket, stop: int) -> None:
        interrupt = None if self.pass_interrupt or not self.plan.tty else self._interrupt
        try:
            terminal.pump_input(connection, interrupt, stop)
        except OSError:
            pass  # The terminal or the container has gone; its end is reported by _wait.
        finally:
            os.close(stop)

    def _interrupt(self) -> None:
        self.events.put(_Event("stop", signal=signal.SIGINT))

    def _until_ended(self) -> None:
        exited = output_ended = False
        while not (exited and output_ended):
            try:
                event = self.events.get(timeout=self._patience_s(output_ended))
            except queue.Empty:
                self._kill_if_due()
                exited = self._has_exited()
                continue
            if event.kind == "exited":
                exited = True
                self.kill_at = None
            elif event.kind == "output-ended":
                output_ended = True
            elif event.kind == "resize":
                self.container.resize()
            elif event.kind == "lost":
                self._engine_lost()
            elif exited:
                return  # It is over; only our own output is blocked, and somebody is impatient.
            else:
                self._stop(event.signal)

    def _patience_s(self, output_ended: bool) -> float | None:
        """How long to wait for an event."""
        if self.kill_at is not None:
            return max(0.0, self.kill_at - time.monotonic())
        # An engine that was slow to take note of our waiting has not told of an early exit.
        return LOOK_EVERY_S if output_ended else None

    def _kill_if_due(self) -> None:
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            self.kill_at = None
            terminal.say(
                f"tml: not stopped after {self.plan.stop_grace_s} s: killing {self.plan.name}"
            )
            self.container.kill("SIGKILL")

    def _stop(self, number: int) -> None:
        if not self.stop_signal:
            self.stop_signal = number
            self._change_record("stopping")
            self.kill_at = time.monotonic() + self.plan.stop_grace_s
            terminal.say(
                f"tml: stopping {self.plan.name}, up to {self.plan.stop_grace_s} s; "
                "again to kill it"
            )
            self.container.kill("SIGTERM")
        else:
            terminal.say(f"tml: killing {self.plan.name}")
            self.kill_at = None
            self.container.kill("SIGKILL")

    def _engine_lost(self) -> NoReturn:
        """The streams are cut, so the run is over, whatever became of the container. It is removed
        once the engine is back.
        """
        client, name = self.container.client, self.plan.name
        if not engine_answers(client):
            terminal.say(
                f"tml: lost the Docker Engine while {name} ran; waiting up to "
                f"{ENGINE_BACK_S:.0f} s for it, to remove {name}"
            )
        if not wait_for_engine(client, given_up=self._told_to_stop):
            self.engine_gone = True
            raise LauncherError(
                f"the Docker Engine went away while {name} ran, and did not come back: {name} may "
                "be left. Once it is back: python -m tml.docker gc"
            )
        raise LauncherError(
            f"the Docker Engine was stopped, or cut off, while {name} ran. Start the same command "
            "again: training goes on from its last complete checkpoint"
        )

    def _change_record(self, state: records.JobState) -> None:
        if self.record is not None:
            self.record = records.change(self.record, state=state)

    def _has_exited(self) -> bool:
        state = self._state()
        return state is None or state["Status"] in ("exited", "dead")

    def _state(self) -> State | None:
        """None where somebody has removed it."""
        from docker.errors import APIError

        try:
            seen = self.container.look()
            return None if seen is None else seen[0]
        except APIError:
            raise
        except OSError:
            # An engine that stops ends the container first.
            self._engine_lost()

    def _told_to_stop(self) -> bool:
        return not self.events.empty() and self.events.get().kind == "stop"

    def _exit_code(self, memory: MemoryWatch) -> int:
        state = self._state()
        if self.stop_signal:
            return 128 + self.stop_signal
        code = REMOVED if state is None else int(state["ExitCode"])
        if code and self.kept:
            # Only now: no run that goes well pays for what explains failures.
            from tml.docker.evidence import Ended
            from tml.docker.postmortem import explain_failure

            state = state or {}
            ended = Ended(
                plan=self.plan,
                exit_code=state.get("ExitCode"),
                stopped_by_us=False,
                oom_killed=bool(state.get("OOMKilled")),
                memory_peak=memory.peaks.get(self.container.id),
                last_lines=tuple(self.kept.last_lines),
                error=str(state.get("Error") or ""),
                cut_off=False,
                first=True,
            )
            self.why = explain_failure([ended], self.kept.output.kept_in)
        return code


def _end_reader(reader: "threading.Thread", stop_write: int) -> None:
    os.close(stop_write)  # The other end becomes readable, where the reader has not ended yet.
    reader.join(1.0)
