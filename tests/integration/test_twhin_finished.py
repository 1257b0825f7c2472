"""A finished run started again: it says so, and does only what is missing."""

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from projects.twhin import finished
from projects.twhin.config import TwhinConfig
from projects.twhin.exported import Exported
from projects.twhin.run import run
from tml.config import load_config
from tml.logs import read_records

SINCE = r"there since \d{4}-\d\d-\d\d \d\d:\d\d"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    generator = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 40)):
        edges = {
            "lhs": generator.integers(20, size=count),
            "rel": np.zeros(count, np.int64),
            "rhs": generator.integers(30, size=count),
        }
        pq.write_table(pa.table(edges), folder / f"{split}.parquet")
    tables = [
        {"name": name, "num_embeddings": rows, "embedding_dim": 4}
        for name, rows in (("user", 20), ("item", 30))
    ]
    tree: dict[str, Any] = {
        "training": {"num_epochs": 2},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": "likes", "lhs": "user", "rhs": "item"}],
            "loss": {"softmax": {}},
        },
        "train_data": {
            "data_root": str(folder / "train.parquet"),
            "per_replica_batch_size": 50,
            "global_negatives": 5,
        },
        "test_data": {"data_root": str(folder / "test.parquet")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("trained") / "run"
    assert run(load_config(TwhinConfig, config), save_dir) is None
    return save_dir


@pytest.fixture
def again(
    trained: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> "Again":
    shutil.copytree(trained, tmp_path / "run")
    return Again(config, tmp_path / "run", capsys)


class Again:
    """A copy of the finished run, to start again."""

    def __init__(self, config: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config, self.folder, self._capsys = config, folder, capsys

    def __call__(self, *overrides: str, **flags: bool) -> str:
        """Start it; returns what it says, in one line."""
        self._capsys.readouterr()
        assert run(load_config(TwhinConfig, self.config, overrides), self.folder, **flags) is None
        lines = self._capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if str(self.folder) not in line) <= 80
        return " ".join(" ".join(lines).split())

    def made(self) -> dict[str, int]:
        """Files of vectors → when they were made; for metrics see `measurements`."""
        paths = (self.folder / "vectors").iterdir()
        return {path.name: path.stat().st_mtime_ns for path in paths}

    def measurements(self) -> int:
        kinds = [one["kind"] for one in read_records(self.folder / "metrics.jsonl")]
        return kinds.count("metrics")


def test_it_says_so_and_makes_nothing_again(again: Again) -> None:
    assert again.measurements() == 1
    before = again.made()
    said = again()
    assert re.search(
        f"the run is finished, nothing is left to train: step 8 of 8; vectors and metrics are "
        f"{SINCE}; --repeat moves .* aside and trains anew, --overwrite_save_dir",
        said,
    )
    assert "200 edges, 1 relation; 20 user, 30 item;" in said
    assert said.count("link prediction") == 1  # the numbers, from the file
    assert "are there since" in again("training.train_log_every_n=3")  # changes no number
    assert (again.made(), again.measurements()) == (before, 1)


def test_who_follows_it_learns_that_it_has_ended(again: Again) -> None:
    path = again.folder / "metrics.json"
    os.utime(path, (0, 0))
    began = time.time()
    said = again()
    assert path.stat().st_mtime > began - 1
    assert "1970" not in said, "though the time is that of the measurement"
    shutil.rmtree(again.folder / "vectors")
    os.utime(path, (0, 0))
    again()
    assert path.stat().st_mtime > began - 1


@pytest.mark.parametrize("name", ["user.parquet", "relations.parquet", "vectors.json"])
def test_vectors_that_are_not_whole_are_exported_again(again: Again, name: str) -> None:
    path = again.folder / "vectors" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert re.search(f"vectors are made now, metrics are {SINCE}", again())
    assert path.read_bytes() == whole
    path.unlink()
    assert "vectors are made now" in again()


def test_vectors_of_an_earlier_step_folder_of_the_same_number_are_replaced(again: Again) -> None:
    os.utime(again.folder / "8" / "COMPLETE", (time.time() + 60,) * 2)
    assert "vectors are made now, metrics are there" in again()


def test_metrics_that_are_not_whole_are_measured_again(again: Again) -> None:
    path = again.folder / "metrics.json"
    whole = path.read_text()
    path.write_text(whole[:20])
    assert "metrics are made now" in again()
    assert path.read_text() == whole


def test_metrics_of_the_best_step_are_not_those_of_the_last(again: Again) -> None:
    path = again.folder / "metrics.json"
    path.write_text(path.read_text().replace('"step": 8,', '"step": 8, "best_step": 4,', 1))
    assert "metrics are made now" in again()
    assert "best_step" not in path.read_text()


def test_missing_vectors_are_exported_and_nothing_is_measured(again: Again) -> None:
    metrics = (again.folder / "metrics.json").read_text()
    shutil.rmtree(again.folder / "vectors")
    said = again()
    assert re.search(f"vectors are made now, metrics are {SINCE}", said)
    assert Exported.open(again.folder / "vectors").step == 8
    assert (again.folder / "metrics.json").read_text() == metrics
    assert again.measurements() == 1


def test_missing_metrics_are_measured_and_nothing_is_exported(again: Again) -> None:
    vectors = again.made()["user.parquet"]
    before = (again.folder / "metrics.json").read_text()
    (again.folder / "metrics.json").unlink()
    said = again()
    assert re.search(f"vectors are {SINCE}, metrics are made now", said)
    assert (again.folder / "metrics.json").read_text() == before
    assert (again.made()["user.parquet"], again.measurements()) == (vectors, 2)


def test_vectors_of_another_step_are_replaced(again: Again) -> None:
    path = again.folder / "vectors" / "vectors.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 4'))
    assert "vectors are made now, metrics are there" in again()
    assert '"step": 8' in path.read_text()


def test_metrics_of_other_settings_or_other_edges_are_measured_anew(again: Again) -> None:
    assert "metrics are made now" in again("evaluation.max_edges=10")
    assert "metrics are there" in again("evaluation.max_edges=10")
    edges = pq.read_table(again.config.parent / "test.parquet")
    path = again.folder.parent / "moved.parquet"
    pq.write_table(edges, path)
    moved = ("evaluation.max_edges=10", f"test_data.data_root={path}")
    assert "metrics are there" in again(*moved)  # the same edges
    pq.write_table(edges.slice(1), path)
    assert "metrics are made now" in again(*moved)


def test_who_wants_no_evaluation_misses_no_metrics(again: Again) -> None:
    (again.folder / "metrics.json").unlink()
    assert "metrics are made now" in again(evaluates=False)
    assert "metrics are there" in again(evaluates=False)
    assert again.measurements() == 1
    assert "metrics are made now" in again()
    assert again.measurements() == 2


def test_a_run_that_is_prolonged_makes_all_anew(again: Again) -> None:
    before = again.made()
    said = again("training.num_epochs=3")
    assert "the run is finished" not in said
    assert not set(before.values()) & set(again.made().values())
    assert again.measurements() == 2
    assert finished.look(again.folder, again.folder / "vectors", {"step": 12}, None).is_whole
