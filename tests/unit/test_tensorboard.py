"""tml.tensorboard as people start it: what its HTTP interface shows of runs that come, go on and
are taken back.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tml.logs import MetricLog

ROOT = Path(__file__).parents[2]
Wait = Callable[[Callable[[], Any], float], Any]


def log(folder: Path, *steps: int, loss: float = 1.0) -> MetricLog:
    """Records of a run, as a trainer writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricLog(folder, 0, Console(quiet=True))
    for step in steps:
        record = {"step": step, "total_steps": None, "loss": loss * step, "lr": {"user": 0.1}}
        metrics.write("train", {**record, "unit": "edges", "left_s": None, "rate": 5})
    return metrics


class Board:
    """A running `python -m tml.tensorboard`."""

    def __init__(self, logdir: Path, temporary: Path, *extra: str) -> None:
        temporary.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tml.tensorboard", f"--logdir={logdir}", "--port=0", *extra],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        self.said, self.url = "", ""
        assert self.process.stderr is not None
        while not self.url:
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
            if found := re.search(r"http://\S+", line):
                self.url = found.group()

    def get(self, query: str) -> Any:
        """What the plugin for scalars answers; None where it knows of no such thing yet."""
        try:
            with urllib.request.urlopen(f"{self.url}data/plugin/scalars/{query}") as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            return None

    def points(self, run: str, tag: str) -> list[tuple[int, float]]:
        found = self.get(f"scalars?run={run}&tag={tag}") or []
        return [(step, value) for _, step, value in found]


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    log(tmp_path / "runs" / "first", 10, 20, 30)
    board = Board(tmp_path / "runs", tmp_path / "tmp")
    yield board
    board.process.kill()
    board.process.wait()


def test_a_run_is_shown_goes_on_and_is_taken_back(
    board: Board, tmp_path: Path, until: Wait
) -> None:
    first = tmp_path / "runs" / "first"
    until(lambda: board.points("first", "train/loss") == [(10, 10), (20, 20), (30, 30)], 60)
    assert set(board.get("tags")["first"]) == {"train/loss", "train/lr/user", "train/rate"}
    with (first / "metrics.jsonl").open("a") as file:  # as it is while a record is written
        file.write('{"kind": "train", "ti')
    time.sleep(3)
    log(first).rewind(20)
    until(lambda: board.points("first", "train/loss") == [(10, 10), (20, 20)], 60)
    log(first, 25, loss=2.0)
    until(lambda: board.points("first", "train/loss") == [(10, 10), (20, 20), (25, 50)], 60)


def test_new_runs_and_the_evaluators_marks_appear(
    board: Board, tmp_path: Path, until: Wait
) -> None:
    second = tmp_path / "runs" / "group" / "second"
    log(second, 1)
    mark = second / "evaluation" / "test" / "7.json"
    mark.parent.mkdir(parents=True)
    mark.write_text('{"split": "test", "link_prediction": {"mean": {"mrr": 0.25}}}')
    tag = "evaluation/test/link_prediction/mean/mrr"
    until(lambda: board.points("group/second", tag) == [(7, 0.25)], 60)
    assert "first" in board.get("tags")


def test_a_signal_ends_it_at_once_and_nothing_is_left(board: Board, tmp_path: Path) -> None:
    assert list((tmp_path / "tmp").iterdir())
    began = time.monotonic()
    board.process.send_signal(signal.SIGTERM)
    assert board.process.wait(10) == 0
    assert time.monotonic() - began < 1
    assert list((tmp_path / "tmp").iterdir()) == []


def call(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tml.tensorboard", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **more},
    )


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "none" / "runs", tmp_path / "file"):
        done = call(f"--logdir={wrong}")
        assert done.returncode == 2
        assert done.stderr == f"error: --logdir {wrong}: there is no such folder\n"


def test_a_folder_that_the_first_run_makes_is_waited_for(tmp_path: Path, until: Wait) -> None:
    board = Board(tmp_path / "runs", tmp_path / "tmp")
    try:
        assert "waiting for the first run" in board.said
        log(tmp_path / "runs" / "first", 10)
        until(lambda: board.points("first", "train/loss") == [(10, 10)], 60)
    finally:
        board.process.kill()
        board.process.wait()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call(f"--logdir={tmp_path}", f"--port={port}", TMPDIR=str(tmp_path))
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "choose another --port" in done.stderr
    assert list(tmp_path.iterdir()) == []
