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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tml.docker import terminal
from tml.docker.container import Container, explained, in_thread
from tml.docker.errors import LauncherError
from tml.docker.plan import Plan

if TYPE_CHECKING:
    import threading

    from docker import APIClient

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start_detached(client: "APIClient", plan: Plan) -> str:
    """Start the container and leave it running; the engine removes it when it ends. Returns its
    name.
    """
    with explained(plan):
        container = Container.create(client, plan)
        try:
            container.start()
        except BaseException:
            container.remove()
            raise
    return plan.name


def run_attached(client: "APIClient", plan: Plan, *, pass_interrupt: bool = False) -> int:
    """Run the container to its end and remove it; returns the exit status that the launcher should
    have.

    `pass_interrupt`: on a terminal Ctrl-C goes into the container as a key, as a shell there
    expects.
    """
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    with ExitStack() as stack:
        # First of all, so that a signal at any later moment is an event and not an exception
        # half-way.
        stack.enter_context(_signals_as(events, resize=plan.tty))
        with explained(plan):
            container = Container.create(client, plan)
            # Pushed before anything can fail: whatever happens below, the container goes.
            stack.callback(container.remove)
            return _Run(container, events, pass_interrupt).follow(stack)


@dataclass(frozen=True)
class _Event:
    kind: str
    """stop (a signal or Ctrl-C), resize, exited, output-ended, lost."""
    signal: int = 0
    error: Exception | None = None


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
        return self._exit_code()

    def _ended(self, error: Exception | None) -> None:
        self.events.put(_Event("exited") if error is None else _Event("lost", error=error))

    def _pump_output(self, connection: socket.socket) -> None:
        from docker.utils.socket import frames_iter

        try:
            for stream, data in frames_iter(connection, self.plan.tty):
                terminal.write_all(2 if stream == 2 else 1, data)
        except BrokenPipeError:
            # Whoever read our output has gone, as in `run | head`: nobody wants the rest.
            self.events.put(_Event("stop", signal=signal.SIGPIPE))
        except OSError:
            pass  # The connection was closed under us, because the run is over.
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
                event = self.events.get(timeout=self._remaining())
            except queue.Empty:
                terminal.say(
                    f"tml: not stopped after {self.plan.stop_grace_s} s: killing {self.plan.name}"
                )
                self.container.kill("SIGKILL")
                self.kill_at = None
                continue
            if event.kind == "exited":
                exited = True
                self.kill_at = None
            elif event.kind == "output-ended":
                output_ended = True
            elif event.kind == "resize":
                self.container.resize()
            elif event.kind == "lost":
                raise LauncherError(f"lost the engine while {self.plan.name} ran: {event.error}")
            elif exited:
                return  # It is over; only our own output is blocked, and somebody is impatient.
            else:
                self._stop(event.signal)

    def _remaining(self) -> float | None:
        return None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())

    def _stop(self, number: int) -> None:
        if not self.stop_signal:
            self.stop_signal = number
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

    def _exit_code(self) -> int:
        state = self.container.state()
        if state.get("OOMKilled"):
            limit = (
                f"--memory {self.plan.memory_bytes >> 20}m"
                if self.plan.memory_bytes
                else "this machine's memory"
            )
            terminal.say(
                f"tml: {self.plan.name} ran out of memory ({limit}) and a process of it was killed"
            )
        return 128 + self.stop_signal if self.stop_signal else int(state["ExitCode"])


def _end_reader(reader: "threading.Thread", stop_write: int) -> None:
    os.close(stop_write)  # The other end becomes readable, where the reader has not ended yet.
    reader.join(1.0)


@contextmanager
def _signals_as(events: "queue.SimpleQueue[_Event]", resize: bool) -> Iterator[None]:
    def stop(number: int, _: object) -> None:
        events.put(_Event("stop", signal=number))

    handlers: dict[int, Any] = dict.fromkeys(STOP_SIGNALS, stop)
    if resize:
        handlers[signal.SIGWINCH] = lambda *_: events.put(_Event("resize"))
    # A signal that was ignored stays ignored: nohup means it.
    before = {
        n: signal.getsignal(n)
        for n in handlers
        if signal.getsignal(n) is not signal.SIG_IGN or n == signal.SIGWINCH
    }
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
