"""The run folder: files that are whole or absent, one run at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tml import run_folder
from tml.config import ConfigError

TRAINS = """
import pathlib, sys, time
from tml import run_folder
run_folder.make_room(pathlib.Path(sys.argv[1]), set())
print("trains", flush=True)
time.sleep(60)
"""


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run_folder.write_json(tmp_path / "a.json", {"step": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 1}
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        run_folder.write_json(tmp_path / "b.json", {"step": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


def test_two_may_write_the_same_json(tmp_path: Path) -> None:
    """As two evaluators do."""
    path = tmp_path / "best.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: run_folder.write_json(path, number), range(400)))
    assert run_folder.read_json(path) in range(400)
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_is_missing_or_cut_short_is_none(tmp_path: Path) -> None:
    assert run_folder.read_json(tmp_path / "best.json") is None
    (tmp_path / "best.json").write_text('{"step": ')
    assert run_folder.read_json(tmp_path / "best.json") is None


def test_a_folder_that_another_run_trains_into_is_refused_until_that_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = [sys.executable, "-c", TRAINS, str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "trains\n"
        with pytest.raises(ConfigError, match=rf"{folder} is in use.* process {other.pid} on"):
            run_folder.make_room(folder, set())
        with pytest.raises(ConfigError, match="in use"):
            run_folder.make_room(folder, set(), overwrite=True)
        other.send_signal(signal.SIGKILL)
        other.wait()
    run_folder.make_room(folder, set())
    assert f"process {os.getpid()} " in (folder / run_folder.LOCK).read_text()


def test_a_program_may_train_into_a_folder_again(tmp_path: Path) -> None:
    for _ in range(2):
        run_folder.make_room(tmp_path / "run", set())
    shutil.rmtree(tmp_path / "run")
    run_folder.make_room(tmp_path / "run", set())
    assert (tmp_path / "run" / run_folder.LOCK).exists()


def test_when_a_process_began_is_known_to_hundredths_of_a_second() -> None:
    """An evaluator tells by it whether a run was finished before or is its own job's."""
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        after = time.time()
        began = run_folder.start_time(process.pid)
        process.kill()
    assert before - 0.05 < began < after + 0.05
