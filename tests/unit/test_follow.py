"""tml.follow: which step folders are measured, when it ends, and whose the marks are."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tml import follow, run_folder
from tml.checkpoint import CheckpointError
from tml.distributed import Job

JOB = Job(0, 1, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_S", 0.02)


def add_step(run: Path, step: int) -> None:
    """A complete step folder whose model is the number of the step."""
    (run / str(step)).mkdir(parents=True)
    (run / str(step) / "config.yaml").write_text(str(step))
    (run / str(step) / "COMPLETE").touch()


def finish(run: Path, ago_s: float = 0.0) -> None:
    run_folder.write_json(run / "metrics.json", {"step": 1})
    when = time.time() - ago_s
    os.utime(run / "metrics.json", (when, when))


def load(folder: Path) -> int:
    try:
        return int((folder / "config.yaml").read_text())
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error


class Told(dict[int, Any]):
    """Step → report, of those that were told."""

    def __call__(self, step: int, report: Any) -> None:
        self[step] = report


def start(
    run: Path,
    told: Told,
    measure: Callable[[int, list[str]], Any] | None = None,
    load: Callable[[Path], int] = load,
    timeout_s: float = 20.0,
    once: bool = False,
) -> int | None:
    def doubled(model: int, names: list[str]) -> dict[str, int]:
        return dict.fromkeys(names, 2 * model)

    names = ["a", "b"]
    return follow.follow(run, names, load, measure or doubled, told, JOB, timeout_s, once=once)


def marks(run: Path) -> dict[str, int]:
    """What is marked, by name and step."""
    paths = (run / "evaluation").glob("*/*")
    return {f"{path.parent.name}/{path.name}": json.loads(path.read_text()) for path in paths}


def meanwhile(act: Callable[[], None], after_s: float = 0.3) -> None:
    threading.Timer(after_s, act).start()


def test_steps_are_measured_as_they_come_and_the_last_one_too(tmp_path: Path) -> None:
    run, told = tmp_path / "run", Told()

    def train() -> None:
        for step in (1, 2, 3):
            add_step(run, step)
            time.sleep(0.1)
        finish(run)

    meanwhile(train)
    assert start(run, told) is None
    assert told == {1: {"a": 2, "b": 2}, 2: {"a": 4, "b": 4}, 3: {"a": 6, "b": 6}}
    assert marks(run)["b/3.json"] == 6
    assert len(marks(run)) == 6


def test_only_what_has_no_mark_is_measured(tmp_path: Path) -> None:
    told = Told()
    add_step(tmp_path, 1)
    add_step(tmp_path, 2)
    follow.mark_done(tmp_path, 1, {"a": 0, "b": 0}, JOB)
    follow.mark_done(tmp_path, 2, {"a": 0}, JOB)
    assert start(tmp_path, told, once=True) is None
    assert told == {2: {"b": 4}}
    follow.forget_marks(tmp_path, 1)
    assert marks(tmp_path) == {"a/1.json": 0, "b/1.json": 0}


@pytest.mark.parametrize("way", ["aside", "again"])
def test_a_run_that_was_finished_before_is_left_to_the_trainer(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run, told = tmp_path / "run", Told()
    add_step(run, 9)
    finish(run, ago_s=1000)

    early: list[int] = []

    def train() -> None:
        early.extend(told)
        if way == "aside":
            run.rename(tmp_path / "run.1")
            add_step(run, 1)
        finish(run)

    meanwhile(train)
    assert start(run, told) is None
    assert early == []
    assert list(told) == ([1] if way == "aside" else [9])
    assert sum("finished before" in message for message in caplog.messages) == 1


def test_a_finished_run_that_nobody_takes_up_ends_it(tmp_path: Path) -> None:
    add_step(tmp_path, 9)
    finish(tmp_path, ago_s=1000)
    told = Told()
    assert start(tmp_path, told, timeout_s=0.2) is None
    assert told == {}
    assert start(tmp_path, told, once=True) is None
    assert list(told) == [9]


def test_no_new_step_is_an_error_after_a_while(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no new step folder in .* is the trainer running"):
        start(tmp_path, Told(), timeout_s=0.2)
    with pytest.raises(CheckpointError, match="no complete step folder"):
        start(tmp_path, Told(), once=True)


def test_a_step_that_is_removed_while_it_is_read_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    add_step(tmp_path, 1)
    add_step(tmp_path, 2)

    def removing(folder: Path) -> int:
        if folder.name == "1":
            shutil.rmtree(folder)
        return load(folder)

    told = Told()
    assert start(tmp_path, told, load=removing, once=True) is None
    assert list(told) == [2]
    assert "step 1 was removed before it could be read" in caplog.messages


def test_a_step_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    add_step(tmp_path, 1)
    (tmp_path / "1" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        start(tmp_path, Told(), once=True)


def test_a_step_of_a_run_that_keeps_few_is_marked_though_it_is_gone(tmp_path: Path) -> None:
    add_step(tmp_path, 1)
    told = Told()

    def measure(model: int, names: list[str]) -> Any:
        shutil.rmtree(tmp_path / "1")
        return dict.fromkeys(names, model)

    assert start(tmp_path, told, measure, once=True) is None
    assert marks(tmp_path) == {"a/1.json": 1, "b/1.json": 1}


def test_marks_go_with_the_run_that_was_measured_and_not_to_its_follower(tmp_path: Path) -> None:
    """Moved aside, as by --repeat."""
    run, aside, told = tmp_path / "run", tmp_path / "run.1", Told()
    add_step(run, 1)

    def measure(model: int, names: list[str]) -> Any:
        run.rename(aside)
        add_step(run, 1)
        return dict.fromkeys(names, 7)

    assert start(run, told, measure, once=True) is None
    assert marks(aside) == {"a/1.json": 7, "b/1.json": 7}
    assert marks(run) == {}


def test_what_was_measured_of_a_run_that_is_removed_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by --overwrite_save_dir."""
    caplog.set_level(logging.INFO)
    run, told = tmp_path / "run", Told()
    add_step(run, 1)

    def measure(model: int, names: list[str]) -> Any:
        run_folder.make_room(run, {follow.EVALUATION}, overwrite=True)
        add_step(run, 1)
        return dict.fromkeys(names, 7)

    assert start(run, told, measure, once=True) is None
    assert (marks(run), told) == ({}, {})
    assert "the run was removed while step 1 was measured" in caplog.messages


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [True, False])
def test_a_signal_ends_it_at_once(number: signal.Signals, busy: bool, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    if busy:
        add_step(tmp_path, 1)

    def measure(model: int, names: list[str]) -> Any:
        time.sleep(20)

    meanwhile(lambda: os.kill(os.getpid(), number))
    began = time.monotonic()
    assert start(tmp_path, Told(), measure) == number
    assert time.monotonic() - began < 5
    assert signal.getsignal(number) == before
    assert marks(tmp_path) == {}
