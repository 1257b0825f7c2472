"""Signals to the launcher. Before a container runs they end it as exceptions, so that a build that
is stopped still tidies up; from then on engine.py and gang.py take them as calls.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[int] = []
"""Python drops an exception that is raised within a callback of its import machinery, so what was
raised may not have arrived: `end_if_told` looks again.
"""


def as_exceptions() -> None:
    """From now on SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP SystemExit(128 + n); a SIGHUP
    that is ignored stays so: nohup means it.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _end)


def end_if_told() -> None:
    """Raise what a signal so far should have raised."""
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    if _received:
        raise SystemExit(128 + _received[0])


@contextmanager
def as_calls(
    on_stop: Callable[[int], None], on_resize: Callable[[], None] | None = None
) -> Iterator[None]:
    """Within, a signal to stop calls `on_stop` with its number, and nothing is raised."""
    handlers: dict[int, Any] = {n: lambda number, _: on_stop(number) for n in STOP_SIGNALS}
    if on_resize is not None:
        handlers[signal.SIGWINCH] = lambda *_: on_resize()
    # What was ignored stays ignored.
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


def _end(number: int, _: object) -> NoReturn:
    _received.append(number)
    raise SystemExit(128 + number)


def _interrupt(number: int, _: object) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt
