"""Training with data set workers, as processes: the same losses as without, the same after a kill,
and what is said when a worker is missing, dies, or was started for something else.
"""

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests import programs
from tml import checkpoint
from tml.data.example import encode_examples
from tml.data.tfrecord import TFRecordWriter
from tml.logs import Record, read_records

ROOT = Path(__file__).parents[2]
TWHIN = (str(ROOT / "projects" / "twhin" / "run.py"), "--config_yaml_path")
RECAP = (str(ROOT / "projects" / "home" / "recap" / "main.py"), "--config_path")
WIDTH = 6
PATIENCE_S = 200  # for an idle machine, 10 would do
ENDLESS = ("--set", "training.num_train_steps=1000000")


def twhin_tree(folder: Path) -> dict[str, Any]:
    """6,000 edges in row groups of 700: 60 steps of 200, those of the last epoch not all whole."""
    generator = np.random.default_rng(0)
    lhs = generator.integers(300, size=5990)
    table = {"lhs": lhs, "rel": lhs % 2, "rhs": lhs % 10 + 10 * generator.integers(20, size=5990)}
    pq.write_table(pa.table(table), folder / "edges.parquet", row_group_size=700)
    edges = str(folder / "edges.parquet")
    tables = [
        {"name": name, "num_embeddings": rows, "embedding_dim": 8}
        for name, rows in (("user", 300), ("tweet", 200))
    ]
    return {
        "training": {"num_epochs": 2, "train_log_every_n": 3, "checkpoint_every_n": 10},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": r, "lhs": "user", "rhs": "tweet"} for r in ("fav", "reply")],
        },
        "train_data": {
            "data_root": edges,
            "per_replica_batch_size": 200,
            "global_negatives": 5,
            "shuffle_rows": 2000,
        },
        "test_data": {"data_root": edges, "limit": 300},
    }


def recap_tree(folder: Path) -> dict[str, Any]:
    """600 rows in 5 GZIP files of several sizes, with a record that is left out, downsampling, ids
    and no binary column.
    """
    generator = np.random.default_rng(1)
    (folder / "data").mkdir()
    for number, size in enumerate((200, 30, 170, 120, 80)):
        dense = generator.normal(size=(size, WIDTH)).astype(np.float32)
        dense[generator.random(dense.shape) < 0.05] = np.nan
        likes = (generator.random((size, 1)) < 0.4).astype(np.int64)
        user = generator.integers(50, size=(size, 1))
        columns = {"dense": dense, "meta.user_id": user, "like": likes}
        with TFRecordWriter(folder / "data" / f"{number}.gz", "gzip") as writer:
            for record in encode_examples(columns):
                writer.write(record)
            if number == 2:
                writer.write(b"no record")
    schema = [
        {"feature_name": "dense", "dtype": "float_list", "length": WIDTH},
        {"feature_name": "meta.user_id", "dtype": "int64_list", "length": 1},
        {"feature_name": "like", "dtype": "int64_list", "length": 1},
    ]
    (folder / "schema.json").write_text(json.dumps({"schema": schema}))
    data = {
        "inputs": f"{folder}/data/*.gz",
        "global_batch_size": 24,
        "seg_dense_schema": {
            "schema_path": f"{folder}/schema.json",
            "renamed_features": {"continuous": "dense", "meta__user_id": "meta.user_id"},
        },
        "tasks": {"like": {"neg_downsampling_rate": 0.5}},
        "examples_shuffle_buffer_size": 100,
        "map_num_parallel_calls": 2,
        "ignore_data_errors": True,
        "preprocess": {
            "downsample_negatives": {"batch_multiplier": 2, "engagements_list": ["like"]}
        },
    }
    rate = {"constant": 0.01}
    return {
        "training": {"num_train_steps": 40, "train_log_every_n": 1, "checkpoint_every_n": 10},
        "model": {
            "tasks": {"like": {"mlp_config": {"layer_sizes": [8, 1]}}},
            "backbone": {
                "mask_net_config": {"mask_blocks": [{"output_size": 8, "aggregation_size": 4}]}
            },
            "featurization_config": {"double_norm_log_config": {}},
        },
        "train_data": data,
        "optimizer": {
            "multi_task_learning_rates": {
                "backbone_learning_rate": rate,
                "tower_learning_rates": {"like": rate},
            }
        },
    }


class Project:
    """One project on data of its own."""

    def __init__(self, folder: Path, program: tuple[str, str], tree: dict[str, Any]) -> None:
        self.config, self.program, self.tree = folder / "config.yaml", program, tree
        self.config.write_text(yaml.safe_dump(tree))

    def command(self, *extra: str, ranks: int = 1) -> list[str]:
        script, flag = self.program
        return [*programs.torchrun(ranks), script, f"{flag}={self.config}", *extra]

    def train(
        self, save_dir: Path, *extra: str, ranks: int = 1, workers: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        command = self.command(f"--save_dir={save_dir}", *extra, ranks=ranks)
        return programs.run(*command, TML_DATASETWORKERS=workers)

    def start(self, save_dir: Path, *extra: str, workers: str) -> programs.Program:
        command = self.command(f"--save_dir={save_dir}", *extra)
        return programs.start(*command, TML_DATASETWORKERS=workers)


@pytest.fixture(scope="module", params=["twhin", "recap"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "twhin":
        return Project(folder, TWHIN, twhin_tree(folder))
    return Project(folder, RECAP, recap_tree(folder))


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """For what has nothing to do with the kind of data."""
    folder = tmp_path_factory.mktemp("ranker")
    return Project(folder, RECAP, recap_tree(folder))


@pytest.fixture(scope="module")
def alone(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that reads its data itself."""
    save_dir = tmp_path_factory.mktemp("alone") / "run"
    done = project.train(save_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir


class Worker:
    """A data set worker, with its log."""

    def __init__(self, project: Project, log: Path, port: int = 0, *extra: str) -> None:
        self.log = log
        role = {"SPEC_TYPE": "datasetworker", "TML_DATASETWORKER_PORT": str(port)}
        self.process = programs.start(*project.command(*extra), log=log, **role)

    @property
    def address(self) -> str:
        """As soon as it serves."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if found := re.search(r"serving on port (\d+)", self.log.read_text()):
                return f"127.0.0.1:{found.group(1)}"
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def num_files(self) -> int:
        """Files of data that it has open."""
        files = psutil.Process(self.process.pid).open_files()
        return sum(file.path.endswith((".gz", ".parquet")) for file in files)


StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    workers: list[Worker] = []

    def start(project: Project, *extra: str, port: int = 0) -> Worker:
        workers.append(Worker(project, tmp_path / f"worker-{len(workers)}.log", port, *extra))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()


def numbers(save_dir: Path) -> list[Record]:
    """The records of a run without what depends on the clock."""
    drop = {"time", "rate", "memory_bytes", "left_s"}
    return [
        {key: value for key, value in record.items() if key not in drop}
        for record in read_records(save_dir / "metrics.jsonl")
    ]


def positions(save_dir: Path) -> dict[int, Any]:
    steps = checkpoint.complete_steps(save_dir)
    return {step: checkpoint.load_meta(save_dir / str(step))["data_position"] for step in steps}


def test_a_data_set_worker_changes_no_number(
    project: Project, alone: Path, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker(project)
    done = project.train(tmp_path / "run", workers=worker.address)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"training data come from {worker.address}" in done.stderr
    assert "process 0 of 1 reads from epoch 0" in worker.log.read_text()
    assert numbers(tmp_path / "run") == numbers(alone)
    assert positions(tmp_path / "run") == positions(alone)
    if project.program is RECAP:
        local = re.findall(r"[\d,]+ records could not be read", project.train(alone).stdout)
        assert re.findall(r"[\d,]+ records could not be read", done.stdout) or not local


def test_two_ranks_with_two_workers_and_one_too_many(
    project: Project, start_worker: StartWorker, tmp_path: Path
) -> None:
    workers = [start_worker(project) for _ in range(2)]
    where = ",".join([*(worker.address for worker in workers), "127.0.0.1:1"])
    save_dirs = [tmp_path / "local", tmp_path / "served"]
    for save_dir, given in zip(save_dirs, ("", where), strict=True):
        done = project.train(save_dir, ranks=2, workers=given)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 3 data set workers are not used" in done.stderr
    assert numbers(save_dirs[0]) == numbers(save_dirs[1])
    assert positions(save_dirs[0]) == positions(save_dirs[1])
    for number, worker in enumerate(workers):
        assert f"process {number} of 2 reads" in worker.log.read_text()


def test_a_killed_run_goes_on_with_a_worker_exactly(
    project: Project, alone: Path, start_worker: StartWorker, tmp_path: Path, until: Any
) -> None:
    worker, save_dir = start_worker(project), tmp_path / "run"
    process = project.start(save_dir, workers=worker.address)
    until(lambda: checkpoint.complete_steps(save_dir), PATIENCE_S)
    process.kill()
    assert checkpoint.complete_steps(save_dir)[-1] < checkpoint.complete_steps(alone)[-1]
    # What the trainer had open is closed: the stream ends with who asked for it.
    until(lambda: not worker.num_files(), PATIENCE_S)
    done = project.train(save_dir, workers=worker.address)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(save_dir) == numbers(alone)
    worker.process.terminate()
    began = time.monotonic()
    assert worker.process.wait(10) == 0
    assert time.monotonic() - began < 1.5


def test_a_worker_that_dies_ends_the_run_and_is_named(
    ranker: Project, start_worker: StartWorker, tmp_path: Path, until: Any
) -> None:
    worker, save_dir = start_worker(ranker), tmp_path / "run"
    process = ranker.start(save_dir, *ENDLESS, workers=worker.address)
    until(lambda: checkpoint.complete_steps(save_dir), PATIENCE_S)
    worker.process.kill()
    _, errors = process.communicate(PATIENCE_S)
    assert process.returncode == 2, errors
    assert f"connection to data set worker {worker.address} was lost" in errors
    assert "Traceback" not in errors


def test_a_worker_goes_on_until_trainers_that_are_stopped_with_it_have_saved(
    ranker: Project, start_worker: StartWorker, tmp_path: Path, until: Any
) -> None:
    worker, save_dir = start_worker(ranker), tmp_path / "run"
    process = ranker.start(save_dir, *ENDLESS, workers=worker.address)
    until(lambda: checkpoint.complete_steps(save_dir), PATIENCE_S)
    worker.process.terminate()
    time.sleep(0.5)
    process.terminate()
    output, errors = process.communicate(PATIENCE_S)
    assert process.returncode == 143, errors
    assert "saved" in output
    assert worker.process.wait(10) == 0


def test_other_settings_are_refused_by_name(
    ranker: Project, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker(ranker, "--set", "training.seed=7")
    done = ranker.train(tmp_path / "run", workers=worker.address)
    assert done.returncode == 2
    assert "other settings than the trainer: training.seed; start both" in done.stderr


def test_an_error_of_the_data_is_the_one_that_a_trainer_would_find(
    project: Project, start_worker: StartWorker, tmp_path: Path
) -> None:
    section = "data_root" if project.program is TWHIN else "inputs"
    broken = tmp_path / "broken.gz"
    broken.write_bytes(b"neither the one nor the other")
    errors = []
    for where in ("/nowhere/*.gz", str(broken)):
        extra = ["--set", f"train_data.{section}={where}"]
        if project.program is RECAP:
            extra += ["--set", "train_data.ignore_data_errors=false"]
        worker = start_worker(project, *extra)
        done = [
            project.train(tmp_path / f"run-{len(errors)}", *extra, workers=address)
            for address in ("", worker.address)
        ]
        assert [one.returncode for one in done] == [2, 2], done[1].stderr
        found = [re.findall("^error: .*", one.stderr, re.M) for one in done]
        assert found[0] == found[1] != []
        errors += found[0]
        assert worker.process.poll() is None
    assert "/nowhere" in errors[0]
    assert str(broken) in errors[1]


@pytest.mark.parametrize(("given", "message"), [("nowhere", "no host:port"), ("a:x", "host:port")])
def test_an_address_that_is_none_is_refused(
    given: str, message: str, tmp_path: Path, ranker: Project
) -> None:
    done = ranker.train(tmp_path / "run", workers=given)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(ranker: Project, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        worker = Worker(ranker, tmp_path / "log", port)
        assert worker.process.wait(PATIENCE_S) == 2
    assert f"port {port} is in use" in worker.log.read_text()
    assert worker.process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_ends_at_once(
    number: signal.Signals, ranker: Project, start_worker: StartWorker
) -> None:
    worker = start_worker(ranker)
    assert worker.address
    began = time.monotonic()
    worker.process.send_signal(number)
    assert worker.process.wait(10) == (0 if number == signal.SIGTERM else 130)
    assert time.monotonic() - began < 1.5
