"""When a container is sent a signal. No engine is needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from tml.docker import container as containers
from tml.docker.container import Container


class Engine:
    """Notes what it is asked; its container's init starts the command after some looks."""

    def __init__(self, looks: int) -> None:
        self.looks, self.asked = looks, []  # type: int, list[str]

    def start(self, _: str) -> None:
        self.asked.append("start")

    def top(self, _: str) -> dict[str, Any]:
        self.asked.append("top")
        init, command = ["1", "docker-init"], ["2", "bash"]
        return {"Processes": [init, command] if len(self.asked) > self.looks else [init]}

    def kill(self, _: str, name: str) -> None:
        self.asked.append(name)


def started(engine: Engine) -> Container:
    """A container that runs."""
    made = Container(engine, SimpleNamespace(), "id")  # type: ignore[arg-type]
    made.start()
    return made


def test_a_container_that_has_only_just_started_is_told_once_it_listens() -> None:
    engine = Engine(looks=3)
    started(engine).kill("SIGTERM")
    assert engine.asked == ["start", "top", "top", "top", "SIGTERM"]


def test_it_is_told_in_any_case_when_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "LISTENS_AFTER_S", 0.05)
    engine = Engine(looks=1000)
    started(engine).kill("SIGTERM")
    assert engine.asked[-1] == "SIGTERM"


def test_a_container_that_has_run_for_a_while_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(containers, "LISTENS_AFTER_S", 0.0)
    engine = Engine(looks=3)
    started(engine).kill("SIGTERM")
    assert engine.asked == ["start", "SIGTERM"]


def test_nothing_is_waited_for_before_the_signal_that_nobody_can_miss() -> None:
    engine = Engine(looks=3)
    started(engine).kill("SIGKILL")
    assert engine.asked == ["start", "SIGKILL"]
