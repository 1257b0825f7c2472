"""What a supervisor and the launcher that started it tell each other. No engine is needed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tml.docker import connection, gang, supervisor
from tml.docker.errors import LauncherError
from tml.docker.plan import Gang

GANG = Gang(job="j", run_id="1", network="", labels={}, members=(), logs="/l")


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of an engine."""
    monkeypatch.setattr(connection, "connect", lambda: (None, None))


def test_an_error_before_it_runs_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> int:
        raise LauncherError("no such network", 125)

    monkeypatch.setattr(gang, "run", run)
    ours, theirs = os.pipe()
    assert supervisor._supervise(GANG, "", "up", theirs) == 125
    os.close(theirs)
    with open(ours) as told:
        assert json.loads(told.read()) == {"error": "no such network", "code": 125}


def test_an_error_after_it_ran_is_not_written_into_what_has_the_pipes_number_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours, theirs = os.pipe()
    later = tmp_path / "chief.log"

    def run(_: Any, __: Any, told: Any) -> int:
        told.on_running()
        assert os.open(later, os.O_WRONLY | os.O_CREAT) == theirs
        raise LauncherError("the engine went away")

    monkeypatch.setattr(gang, "run", run)
    assert supervisor._supervise(GANG, "", "up", theirs) == 125
    os.close(theirs)
    os.close(ours)
    assert later.read_text() == ""
