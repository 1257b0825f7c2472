"""The ranker in a container: the published scripts make data and train on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tml import checkpoint
from tml.logs import read_records

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]


def launch(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tml.docker", "run", "recap", "--", *arguments],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_random_data_and_the_published_model_in_a_container(tmp_path: Path) -> None:
    made = launch(tmp_path, "create_random_data", "--n_examples", "300", "--n_files", "3")
    assert made.returncode == 0, made.stderr
    data = tmp_path / "tmp" / "recap_local_random_data"
    assert len(list(data.glob("*.gz"))) == 3

    few = ["--set", "training.num_train_steps=3", "--set", "training.num_eval_steps=1"]
    trained = launch(tmp_path, "run_local", *few)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "48,115,108 parameters; 3 steps of 128" in trained.stdout
    warnings = [line for line in trained.stderr.splitlines() if "has no meaning here" in line]
    named = [warning.split()[0] for warning in warnings]
    assert named == ["train_data.dataset_service_compression", "training.eval_log_every_n"]
    run = tmp_path / "tmp" / "runs" / "recap_local_debug"
    assert checkpoint.complete_steps(run) == [3]
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 2, 3]
    partitions = json.loads((run / "metrics.json").read_text())["partitions"]
    assert len(partitions) == 12
    assert len(partitions["validation"]["tasks"]) == 10
    assert list(partitions["is_replied"]["tasks"]) == ["recap.engagement.is_replied"]


def test_what_is_wrong_in_the_container_is_said_outside_with_its_exit_code(tmp_path: Path) -> None:
    done = launch(tmp_path, "--set", "train_data.inputs=/root/tmp/none/*.gz")
    assert done.returncode == 2
    assert "no file matches /root/tmp/none/*.gz" in done.stderr
