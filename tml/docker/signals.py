"""Signals to the launcher before a container runs: they end it as exceptions, so that a build that
is stopped still tidies up. Once containers run, engine.py and gang.py take signals as events.
"""

import signal
from typing import NoReturn

_received: list[int] = []
"""Python drops an exception that is raised within a callback of its import machinery, so what was
raised may not have arrived: `end_if_told` looks again.
"""


def as_exceptions() -> None:
    """From now on SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP SystemExit(128 + n)."""
    signal.signal(signal.SIGINT, _interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def end_if_told() -> None:
    """Raise what a signal so far should have raised."""
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    if _received:
        raise SystemExit(128 + _received[0])


def _end(number: int, _: object) -> NoReturn:
    _received.append(number)
    raise SystemExit(128 + number)


def _interrupt(number: int, _: object) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt
