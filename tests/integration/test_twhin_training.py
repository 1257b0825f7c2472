"""The whole of run.py on a small real run: resuming after kill -9 and SIGTERM, a full disk, bad
input, what is left behind.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests import programs
from tml import checkpoint
from tml.logs import read_records

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "projects" / "twhin" / "run.py"
NUM_USERS, NUM_TWEETS, NUM_EDGES = 300, 200, 6000
STEPS = 2 * 30
"""Two epochs of 30 batches of 200 edges."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edges between users and tweets of the same of 10 communities."""
    folder = tmp_path_factory.mktemp("graph")
    generator = np.random.default_rng(0)
    for split, count in (("train", NUM_EDGES), ("valid", 500), ("test", 500)):
        lhs = generator.integers(NUM_USERS, size=count)
        rhs = lhs % 10 + 10 * generator.integers(NUM_TWEETS // 10, size=count)
        rel = generator.integers(2, size=count)
        (folder / split).mkdir()
        table = pa.table({"lhs": lhs, "rel": rel, "rhs": rhs})
        pq.write_table(table, folder / split / "part-0.parquet", row_group_size=700)
    return folder


def config_tree(graph: Path, **training: Any) -> dict[str, Any]:
    tables = [
        {"name": name, "num_embeddings": rows, "embedding_dim": 16}
        for name, rows in (("user", NUM_USERS), ("tweet", NUM_TWEETS))
    ]
    ramp = {"linear_ramp_to_constant": {"learning_rate": 0.2, "num_ramp_steps": 40}}
    return {
        "training": {"num_epochs": 2, "train_log_every_n": 4, "checkpoint_every_n": 10, **training},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": r, "lhs": "user", "rhs": "tweet"} for r in ("fav", "reply")],
            "loss": {"softmax": {}},
            "translation_optimizer": {"adagrad": {"lr": 0.1}, "learning_rate": ramp},
        },
        "train_data": {
            "data_root": f"{graph}/train/*.parquet",
            "per_replica_batch_size": 200,
            "global_negatives": 20,
            "in_batch_negatives": 9,
            "shuffle_rows": 2000,
        },
        "validation_data": {"data_root": f"{graph}/valid/*.parquet"},
        "test_data": {"data_root": f"{graph}/test/*.parquet"},
    }


def command(config: Path, save_dir: Path, *extra: str, ranks: int = 1) -> list[str]:
    given = [f"--config_yaml_path={config}", f"--save_dir={save_dir}", *extra]
    return [*programs.torchrun(ranks), str(SCRIPT), *given]


def train(
    config: Path, save_dir: Path, *extra: str, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    return programs.run(*command(config, save_dir, *extra, ranks=ranks))


def losses(save_dir: Path) -> list[tuple[str, int, float]]:
    """Everything that does not depend on the clock."""
    records = read_records(save_dir / "metrics.jsonl")
    return [(r["kind"], r["step"], r["loss"]) for r in records if r["kind"] != "metrics"]


@pytest.fixture(scope="module")
def config(graph: Path) -> Path:
    path = graph / "config.yaml"
    path.write_text(yaml.safe_dump(config_tree(graph, eval_log_every_n=20)))
    return path


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(config, save_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir


@pytest.fixture(scope="module")
def unbroken_two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(config, save_dir, "--no_evaluation", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir


def test_a_run_folder_explains_itself(unbroken: Path, config: Path) -> None:
    assert checkpoint.complete_steps(unbroken) == [10, 20, 30, 40, 50, 60]
    names = {path.name for path in unbroken.iterdir()} - {"10", "20", "30", "40", "50", "60"}
    assert names == {"metrics.jsonl", "metrics.json", "config.yaml", "vectors", ".lock"}
    meta = checkpoint.load_meta(unbroken / "30")
    assert meta["step"] == 30
    assert meta["world_size"] == 1
    assert meta["data_position"] == {"epoch": 1, "remaining": None}
    assert {"torch", "python"} <= meta["versions"].keys()
    records = read_records(unbroken / "metrics.jsonl")
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(4, 61, 4))
    validation = [r for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in validation] == [20, 40, 60]
    assert all(r["loss"] > 1 for r in validation), "with the negatives of the training data"
    assert records[-1]["kind"] == "metrics"


def test_training_learns_and_what_is_measured_beats_chance(unbroken: Path) -> None:
    curve = [loss for kind, _, loss in losses(unbroken) if kind == "train"]
    assert curve[-1] < 0.8 * curve[0]
    mean = json.loads((unbroken / "metrics.json").read_text())["link_prediction"]["mean"]
    chance = sum(1 / rank for rank in range(1, NUM_TWEETS + 1)) / NUM_TWEETS
    assert mean["mrr"] > 2 * chance


def test_vectors_are_those_of_the_last_checkpoint(unbroken: Path) -> None:
    table = pq.read_table(unbroken / "vectors" / "user.parquet")
    assert table.column("id").to_pylist() == list(range(NUM_USERS))
    vectors = np.stack(table.column("vector").to_pylist())
    saved = checkpoint.load_whole(unbroken / "60")["tables.user.weight"]
    assert (vectors == saved.numpy()).all()
    assert pq.read_table(unbroken / "vectors" / "relations.parquet").num_rows == 2


def wait_until(condition: Callable[[], bool], process: programs.Program) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last_step(save_dir: Path) -> int:
    path = save_dir / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return int(records[-1]["step"]) if records else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first checkpoint": lambda run: last_step(run) >= 4,
    "between checkpoints": lambda run: last_step(run) >= 24,
    "while a checkpoint is written": lambda run: (
        (run / "20").is_dir() and not (run / "20" / "COMPLETE").exists()
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_the_same_command_again_give_the_losses_of_an_unbroken_run(
    moment: str, config: Path, unbroken: Path, tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    arguments = command(config, save_dir)
    process = programs.start(*arguments, log=tmp_path / "log")
    wait_until(lambda: MOMENTS[moment](save_dir), process)
    process.kill()
    assert last_step(save_dir) < STEPS
    again = train(config, save_dir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(save_dir) == losses(unbroken)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (save_dir, unbroken)]
    assert metrics[0] == metrics[1]


def test_two_ranks_killed_and_started_again_give_the_losses_of_an_unbroken_run(
    config: Path, unbroken_two: Path, tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    arguments = command(config, save_dir, "--no_evaluation", ranks=2)
    process = programs.start(*arguments, log=tmp_path / "log")
    wait_until(lambda: last_step(save_dir) >= 12, process)
    process.kill()
    again = train(config, save_dir, "--no_evaluation", ranks=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(save_dir) == losses(unbroken_two)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_exactly(
    number: int, code: int, config: Path, unbroken: Path, tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    quiet = ["--set", "training.checkpoint_every_n=null"]
    process = programs.start(*command(config, save_dir, *quiet), log=tmp_path / "log")
    wait_until(lambda: last_step(save_dir) >= 8, process)
    process.send_signal(number)
    assert process.wait(60) == code
    (saved,) = checkpoint.complete_steps(save_dir)
    assert 8 <= saved < STEPS
    assert f"stopped by signal {number}" in (tmp_path / "log").read_text()
    assert train(config, save_dir).returncode == 0
    assert losses(save_dir) == losses(unbroken)


def test_two_ranks_under_torchrun_save_on_sigterm(
    config: Path, unbroken_two: Path, tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    extra = ["--no_evaluation", "--set", "training.checkpoint_every_n=null"]
    process = programs.start(*command(config, save_dir, *extra, ranks=2), log=tmp_path / "log")
    wait_until(lambda: last_step(save_dir) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert len(checkpoint.complete_steps(save_dir)) == 1
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert train(config, save_dir, "--no_evaluation", ranks=2).returncode == 0
    assert losses(save_dir) == losses(unbroken_two)


def test_a_checkpoint_of_two_ranks_is_taken_up_by_one(
    config: Path, unbroken_two: Path, tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    shutil.copytree(unbroken_two, save_dir)
    for step in checkpoint.complete_steps(save_dir)[1:]:
        shutil.rmtree(save_dir / str(step))
    done = train(config, save_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stdout
    records = [r for r in read_records(save_dir / "metrics.jsonl") if r["kind"] == "train"]
    # 10 steps of two ranks read 4,000 of the 12,000 edges; one rank needs 40 steps for the rest.
    assert records[-1]["step"] == 10 + 40
    assert records[-1]["examples_seen"] == 2 * NUM_EDGES


def test_accumulated_batches_equal_the_larger_batch(config: Path, tmp_path: Path) -> None:
    runs = []
    for name, size, count in (("one", 200, 1), ("two", 100, 2), ("four", 50, 4)):
        extra = [f"--set=train_data.per_replica_batch_size={size}", "--no_evaluation"]
        extra += [
            f"--set=training.gradient_accumulation={count}",
            "--set=training.num_train_steps=8",
        ]
        extra += ["--set=training.eval_log_every_n=100"]
        assert train(config, tmp_path / name, *extra).returncode == 0
        runs.append(losses(tmp_path / name))
    assert runs[0] == runs[1] == runs[2]


def test_overwrite_removes_the_run_and_nothing_else(config: Path, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    (save_dir / "notes.txt").write_text("mine")
    extra = ["--set=training.num_train_steps=4", "--no_evaluation"]
    assert train(config, save_dir, *extra).returncode == 0
    first = losses(save_dir)
    done = train(config, save_dir, "--overwrite_save_dir", *extra)
    assert "resuming" not in done.stdout
    assert losses(save_dir) == first
    assert (save_dir / "notes.txt").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_during_a_checkpoint_is_one_clear_error_and_the_last_one_stays(
    config: Path, unbroken: Path, small_disk: Path
) -> None:
    save_dir = small_disk / "run"
    done = train(config, save_dir)
    assert_one_error(done, "no space left on device", "the last complete checkpoint is")
    steps = checkpoint.complete_steps(save_dir)
    assert steps
    assert steps[-1] < STEPS
    assert {p.name for p in save_dir.iterdir() if p.name.isdigit()} == {str(s) for s in steps}
    # Room is made: the same command goes on, and ends like an unbroken run.
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert train(config, save_dir).returncode == 0
    assert losses(save_dir) == losses(unbroken)


def assert_one_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    errors = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def broken_graph(graph: Path, tmp_path: Path) -> Path:
    shutil.copytree(graph, tmp_path / "broken")
    return tmp_path / "broken"


def write_config(graph: Path, tree: dict[str, Any]) -> Path:
    (graph / "broken.yaml").write_text(yaml.safe_dump(tree))
    return graph / "broken.yaml"


class TestBadInput:
    def test_a_truncated_parquet_file(self, broken_graph: Path, tmp_path: Path) -> None:
        path = broken_graph / "train" / "part-0.parquet"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        config = write_config(broken_graph, config_tree(broken_graph))
        done = train(config, tmp_path / "run")
        assert_one_error(done, str(path), "not a complete parquet file", "make it again")

    def test_an_id_out_of_range(self, broken_graph: Path, tmp_path: Path) -> None:
        path = broken_graph / "train" / "part-0.parquet"
        columns = pq.read_table(path).to_pydict()
        columns["rhs"][4321] = NUM_TWEETS
        pq.write_table(pa.table(columns), path, row_group_size=1000)
        config = write_config(broken_graph, config_tree(broken_graph))
        done = train(config, tmp_path / "run")
        assert_one_error(done, f"{path}, row 4321: rhs {NUM_TWEETS}", "num_embeddings")
        assert not checkpoint.complete_steps(tmp_path / "run")

    def test_a_missing_column(self, broken_graph: Path, tmp_path: Path) -> None:
        path = broken_graph / "train" / "part-0.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["rel"]), path)
        config = write_config(broken_graph, config_tree(broken_graph))
        done = train(config, tmp_path / "run")
        assert_one_error(done, "no column 'rel'; it has lhs, rhs")

    def test_an_error_of_one_of_two_ranks_is_one_clear_error_too(
        self, broken_graph: Path, tmp_path: Path
    ) -> None:
        path = broken_graph / "train" / "part-0.parquet"
        columns = pq.read_table(path).to_pydict()
        columns["lhs"][5] = -1
        pq.write_table(pa.table(columns), path, row_group_size=100)
        tree = config_tree(broken_graph)
        tree["train_data"]["shuffle_rows"] = 100
        done = train(write_config(broken_graph, tree), tmp_path / "run", ranks=2)
        assert_one_error(done, f"{path}, row 5: lhs -1")

    def test_a_vocabulary_of_other_data_is_refused_before_training(
        self, graph: Path, tmp_path: Path
    ) -> None:
        pq.write_table(pa.table({"id": [0], "entity": ["u"]}), tmp_path / "vocab.parquet")
        tree = config_tree(graph)
        tree["model"]["embeddings"]["tables"][0]["vocab"] = str(tmp_path / "vocab.parquet")
        done = train(write_config(tmp_path, tree), tmp_path / "run")
        assert_one_error(done, "has 1 entities", "'user' has 300 rows")
        assert "step" not in done.stdout

    def test_a_run_that_diverges_ends_and_keeps_its_last_finite_checkpoint(
        self, config: Path, tmp_path: Path
    ) -> None:
        rates = [
            f"--set=model.embeddings.tables.{table}.optimizer={{sgd: {{lr: 1.0e+38}}}}"
            for table in (0, 1)
        ]
        start = ["--set=training.num_train_steps=10", "--no_evaluation"]
        assert train(config, tmp_path / "run", *start).returncode == 0
        done = train(config, tmp_path / "run", *rates)
        assert_one_error(done, "training has diverged", "lower the learning rates")
        assert checkpoint.complete_steps(tmp_path / "run") == [10]

    def test_an_unknown_config_key(self, graph: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path, config_tree(graph, num_epoch=3))
        done = train(config, tmp_path / "run")
        assert_one_error(done, "training.num_epoch: unknown key; did you mean num_epochs?")

    def test_no_data(self, tmp_path: Path) -> None:
        config = write_config(tmp_path, config_tree(tmp_path / "absent"))
        assert_one_error(train(config, tmp_path / "run"), "no file matches", "absent")

    def test_a_checkpoint_of_another_model(
        self, config: Path, unbroken: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(unbroken, tmp_path / "run")
        done = train(config, tmp_path / "run", "--set=model.embeddings.tables.0.num_embeddings=301")
        assert_one_error(done, "table 'user' has 300 rows there, 301 in the config", "--warm_start")
