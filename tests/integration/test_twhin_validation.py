"""Validation by ranking while training goes on: it disturbs nothing, keeps the best step, ends
early, and decides the same when it is cut short; with two ranks, too.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from projects.twhin import validation
from projects.twhin.config import TwhinConfig
from projects.twhin.evaluate import evaluate_split
from projects.twhin.evaluator import follow
from projects.twhin.export import load_vectors, resolve_run
from projects.twhin.run import main, run
from tml import checkpoint
from tml.checkpoint import CheckpointError
from tml.config import load_config
from tml.distributed import Job
from tml.logs import read_records

ROOT = Path(__file__).parents[2]
STEPS = 10
"""Steps of an epoch."""
EARLY = {"every_n_epochs": 0.5, "patience": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products take longest where their threads wait for each other on a busy machine."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edges between users and tweets of the same of 10 communities, too few for 24 dimensions: it
    gets worse after some epochs.
    """
    folder = tmp_path_factory.mktemp("graph")
    generator = np.random.default_rng(0)
    for split, count in (("train", 1000), ("valid", 300), ("test", 300)):
        lhs = generator.integers(60, size=count)
        rhs = lhs % 10 + 10 * generator.integers(8, size=count)
        rel = generator.integers(2, size=count)
        pq.write_table(pa.table({"lhs": lhs, "rel": rel, "rhs": rhs}), folder / f"{split}.parquet")
    tables = [
        {"name": name, "num_embeddings": rows, "embedding_dim": 24}
        for name, rows in (("user", 60), ("tweet", 80))
    ]
    tree: dict[str, Any] = {
        "training": {"num_epochs": 40, "train_log_every_n": 4, "checkpoint_max_to_keep": 1},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": r, "lhs": "user", "rhs": "tweet"} for r in ("fav", "reply")],
            "loss": {"softmax": {}},
        },
        "train_data": {
            "data_root": str(folder / "train.parquet"),
            "per_replica_batch_size": 100,
            "global_negatives": 20,
        },
        "validation_data": {"data_root": str(folder / "valid.parquet")},
        "test_data": {"data_root": str(folder / "test.parquet")},
        "evaluation": {"during_training": EARLY},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def train(config: Path, save_dir: Path, **settings: Any) -> int | None:
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return run(load_config(TwhinConfig, config, overrides), save_dir)


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(config, save_dir) is None
    return save_dir


def records(save_dir: Path) -> list[dict[str, Any]]:
    """Those of training and ranking, without what depends on the clock or on the planned end."""
    clocked = ("time", "rate", "left_s", "memory_bytes", "seconds", "total_steps")
    return [
        {name: value for name, value in record.items() if name not in clocked}
        for record in read_records(save_dir / "metrics.jsonl")
        if record["kind"] != "metrics"
    ]


def rankings(save_dir: Path) -> dict[int, dict[str, Any]]:
    return {one["step"]: one for one in records(save_dir) if one["kind"] == validation.RECORD}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_training_ends_early_and_the_best_step_is_kept_exported_and_tested(
    unbroken: Path, config: Path
) -> None:
    found = {step: one["mrr"] for step, one in rankings(unbroken).items()}
    best, last = max(found, key=lambda step: found[step]), max(found)
    assert list(found) == list(range(5, last + 1, 5))
    assert 5 < best < last < 40 * STEPS
    assert last == best + 2 * 5, "a patience of 2"
    assert checkpoint.complete_steps(unbroken) == [best, last], "and one to keep"
    marks = {
        int(path.stem): read(path) for path in (unbroken / "evaluation/validation").glob("*.json")
    }
    assert {s: one["link_prediction"]["mean"]["mrr"] for s, one in marks.items()} == found
    assert set(marks[best]["link_prediction"]["relations"]) == {"fav", "reply"}
    named = read(unbroken / "evaluation" / "best.json")
    assert (named["step"], named["mrr"], named["split"]) == (best, found[best], "validation")

    metrics = read(unbroken / "metrics.json")
    assert (metrics["step"], metrics["best_step"], metrics["split"]) == (last, best, "test")
    folder, resolved = resolve_run(unbroken, "best")
    assert folder.name == str(best)
    vectors = load_vectors(folder, resolved.model)
    exported = np.stack(
        pq.read_table(unbroken / "vectors" / "user.parquet").column("vector").to_pylist()
    )
    assert (exported == vectors.tables["user"].numpy()).all()
    alone = Job(0, 1, 1, torch.device("cpu"))
    assert metrics == {**metrics, **evaluate_split(resolved, "test", vectors, alone)}


def test_validation_does_not_disturb_training(unbroken: Path, config: Path, tmp_path: Path) -> None:
    settings = {
        "evaluation__during_training": "null",
        "training__num_train_steps": checkpoint.complete_steps(unbroken)[-1] // 4 * 4,
    }
    assert train(config, tmp_path / "run", **settings) is None
    found = [one for one in records(unbroken) if one["kind"] == "train"]
    assert [one for one in records(tmp_path / "run") if one["kind"] == "train"] == found
    assert "best_step" not in read(tmp_path / "run" / "metrics.json")


def cut(run: Path, copy: Path, step: int) -> None:
    """A copy of a run as it was when the checkpoint of `step` had just been saved."""
    shutil.copytree(run, copy)
    for folder in checkpoint.complete_steps(copy):
        if folder > step:
            shutil.rmtree(copy / str(folder))
    (copy / "metrics.json").unlink()


@pytest.mark.parametrize("what", ["the best", "the last"])
def test_a_run_that_was_cut_short_decides_what_the_unbroken_one_does(
    what: str, unbroken: Path, config: Path, tmp_path: Path
) -> None:
    best, last = checkpoint.complete_steps(unbroken)
    step = best if what == "the best" else last
    cut(unbroken, tmp_path / "run", step)
    # Killed while it was measured: no mark, no record, best.json from before.
    (tmp_path / "run" / "evaluation" / "validation" / f"{step}.json").unlink()
    path = tmp_path / "run" / "metrics.jsonl"
    kept = [one for one in read_records(path) if one["step"] < step or one["kind"] == "train"]
    path.write_text("".join(json.dumps(one) + "\n" for one in kept))
    (tmp_path / "run" / "evaluation" / "best.json").unlink()
    assert train(config, tmp_path / "run") is None
    assert rankings(tmp_path / "run") == rankings(unbroken)
    assert checkpoint.complete_steps(tmp_path / "run") == [best, last]
    assert read(tmp_path / "run" / "metrics.json") == read(unbroken / "metrics.json")
    for name in ("evaluation/best.json", f"evaluation/validation/{step}.json"):
        assert read(tmp_path / "run" / name) == read(unbroken / name)


def test_a_signal_during_a_validation_stops_the_run_which_goes_on_as_the_unbroken_one(
    unbroken: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = validation.Validation._rank

    def interrupted(self: validation.Validation, folder: Path) -> Any:
        if folder.name == "10":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, folder)

    monkeypatch.setattr(validation.Validation, "_rank", interrupted)
    assert train(config, tmp_path / "run") == signal.SIGTERM
    assert "validation at step 10 given up" in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert max(checkpoint.complete_steps(tmp_path / "run")) == 10
    assert not (tmp_path / "run" / "evaluation" / "validation" / "10.json").exists()
    monkeypatch.undo()
    assert train(config, tmp_path / "run") is None
    assert records(tmp_path / "run") == records(unbroken)
    assert read(tmp_path / "run" / "metrics.json") == read(unbroken / "metrics.json")


def test_a_run_that_ended_early_is_finished_until_its_patience_is_raised(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    steps = checkpoint.complete_steps(unbroken)
    assert train(config, tmp_path / "run", training__num_epochs=50) is None
    said = " ".join(capsys.readouterr().out.split())
    assert "for 2 validations" in said
    assert "the run is finished, nothing is left to train" in said
    assert records(tmp_path / "run") == records(unbroken)
    assert checkpoint.complete_steps(tmp_path / "run") == steps
    assert train(config, tmp_path / "run", evaluation__during_training__patience=3) is None
    assert max(rankings(tmp_path / "run")) > steps[-1]


def test_another_goal_chooses_the_best_step_anew(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(unbroken, tmp_path / "run", checkpoint.complete_steps(unbroken)[0])
    during = "{every_n: 7, metric: recall@10, relation: reply, max_edges: 100}"
    settings = {
        "evaluation__during_training": during,
        "evaluation__retrieval": "{k: [10]}",
        "training__num_train_steps": checkpoint.complete_steps(unbroken)[0] + 10,
    }
    assert train(config, tmp_path / "run", **settings) is None
    said = " ".join(capsys.readouterr().out.split())
    change = r"\(mrr: 300 edges \((\w+)\), 1,600 known → recall@10 of reply: 100 of 300 edges \(\1"
    assert re.search(f"what is validated has changed {change}", said)
    named = read(tmp_path / "run" / "evaluation" / "best.json")
    assert (named["metric"], named["relation"]) == ("recall@10", "reply")
    report = read(tmp_path / "run" / "evaluation" / "validation" / f"{named['step']}.json")
    assert report["retrieval"]["relations"]["reply"]["recall@10"] == named["recall@10"]
    assert "link_prediction" not in report
    assert "of 300 edges" in report["retrieval"]["protocol"]


def test_a_finished_run_of_before_the_edges_were_part_of_it_keeps_its_best_step(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    steps = checkpoint.complete_steps(run_dir)
    path = run_dir / str(steps[-1]) / "meta.json"
    meta = read(path)
    meta["best"]["goal"] = "mrr"
    path.write_text(json.dumps(meta))
    for path in (run_dir / "evaluation").rglob("*.json"):
        path.write_text(json.dumps({k: v for k, v in read(path).items() if k != "measured_with"}))
    assert train(config, run_dir) is None
    said = " ".join(capsys.readouterr().out.split())
    assert "chosen anew" not in said
    assert "training ends" in said
    assert checkpoint.complete_steps(run_dir) == steps
    named = read(run_dir / "evaluation" / "best.json")
    assert named == read(unbroken / "evaluation" / "best.json")


def test_other_validation_edges_choose_the_best_step_anew(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint.complete_steps(unbroken)[-1]
    cut(unbroken, tmp_path / "run", last)
    edges = pq.read_table(config.parent / "valid.parquet")
    pq.write_table(edges, tmp_path / "moved.parquet")
    files = {"validation_data__data_root": tmp_path / "moved.parquet"}
    assert train(config, tmp_path / "run", **files) is None
    assert "what is validated" not in capsys.readouterr().out
    assert rankings(tmp_path / "run") == rankings(unbroken)
    assert read(tmp_path / "run" / "metrics.json") == read(unbroken / "metrics.json")

    pq.write_table(edges.slice(1), tmp_path / "fewer.parquet")
    files = {"validation_data__data_root": tmp_path / "fewer.parquet"}
    assert train(config, tmp_path / "run", **files, training__num_train_steps=last + 5) is None
    said = " ".join(capsys.readouterr().out.split())
    assert f"the best step is chosen anew, from step {last} on" in said
    assert "no better validation" not in said, "and so begins the patience"
    named = read(tmp_path / "run" / "evaluation" / "best.json")
    assert named["step"] in (last, last + 5)
    assert named["measured_with"].startswith("299 edges (")
    # The first number of a step is that of the edges before, the second of these.
    of_last = [one for one in records(tmp_path / "run") if one["kind"] == validation.RECORD]
    assert [one["step"] for one in of_last[-3:]] == [last, last, last + 5]
    mark = read(tmp_path / "run" / "evaluation" / "validation" / f"{last}.json")
    assert mark["link_prediction"]["mean"]["mrr"] == of_last[-2]["mrr"] != of_last[-3]["mrr"]


def test_an_evaluator_measures_anew_what_was_measured_with_something_else(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    best, last = checkpoint.complete_steps(unbroken)
    alone = ["evaluation.during_training=null"]
    for settings in (alone, [*alone, "evaluation.max_edges=100"]):
        follow(load_config(TwhinConfig, config, settings), tmp_path / "run", once=True)
        output = capsys.readouterr()
        steps = () if settings is alone else (best, last)
        assert [f"step {step};" in output.out for step in (best, last)] == [bool(steps)] * 2
        assert output.err.count("what is measured has changed (300 edges (") == bool(steps)
    named = read(tmp_path / "run" / "evaluation" / "best.json")
    assert named["measured_with"].startswith("100 of 300 edges (")
    assert named["step"] in (best, last)


def test_a_best_step_that_is_gone_is_chosen_anew(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the newest step folder alone was copied to another machine."""
    best, last = checkpoint.complete_steps(unbroken)
    cut(unbroken, tmp_path / "run", last)
    shutil.rmtree(tmp_path / "run" / str(best))
    assert train(config, tmp_path / "run", training__num_train_steps=last + 1) is None
    assert f"run/{best}, is gone" in " ".join(capsys.readouterr().out.split())
    found = {step: one["mrr"] for step, one in rankings(tmp_path / "run").items() if step >= last}
    assert list(found) == [last, last + 1]
    named = max(found, key=lambda step: found[step])
    assert read(tmp_path / "run" / "metrics.json")["best_step"] == named


def test_a_best_step_that_gave_way_to_a_better_one_is_not_missed(
    unbroken: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped behind the measurement that made another step the best: waiting is not reset."""
    best = checkpoint.complete_steps(unbroken)[0]
    cut(unbroken, tmp_path / "run", best)
    path = tmp_path / "run" / "evaluation" / "best.json"
    path.write_text(json.dumps({**read(path), "step": best}))
    before = checkpoint.load_meta(tmp_path / "run" / str(best))["best"]["step"]
    assert before not in checkpoint.complete_steps(tmp_path / "run")
    assert train(config, tmp_path / "run", training__num_train_steps=best) is None
    assert "is gone" not in " ".join(capsys.readouterr().out.split())
    assert read(path)["step"] == best


def test_a_step_is_measured_anew_for_another_goal(
    unbroken: Path, config: Path, tmp_path: Path
) -> None:
    last = checkpoint.complete_steps(unbroken)[-1]
    cut(unbroken, tmp_path / "run", last)
    settings = {"evaluation__during_training": "{max_edges: 100}"}
    assert train(config, tmp_path / "run", training__num_train_steps=last, **settings) is None
    report = read(tmp_path / "run" / "evaluation" / "validation" / f"{last}.json")
    assert "100 of 300 edges" in report["link_prediction"]["protocol"]


def test_a_relation_without_validation_edges_is_refused_at_the_start(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--config_yaml_path={config}", f"--save_dir={tmp_path / 'run'}"]
    third = "[{name: fav, lhs: user, rhs: tweet}, {name: reply, lhs: user, rhs: tweet}, "
    arguments += [f"--set=model.relations={third}{{name: none, lhs: user, rhs: tweet}}]"]
    arguments += ["--set=evaluation.during_training.relation=none"]
    assert main(arguments) == 2
    assert "validation_data has no edge of 'none'" in capsys.readouterr().err


def test_step_best_of_a_run_that_names_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no best step"):
        resolve_run(tmp_path, "best")


def test_two_ranks_measure_what_one_does_and_end_early(config: Path, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    command = [sys.executable, "-m", "tml.torchrun", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "projects" / "twhin" / "run.py"), f"--config_yaml_path={config}"]
    done = subprocess.run(
        [*command, f"--save_dir={save_dir}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("no better validation mrr for 2 validations") == 1
    folder, resolved = resolve_run(save_dir, "best")
    vectors = load_vectors(folder, resolved.model)
    limits = validation.for_training(resolved)
    alone = evaluate_split(limits, "validation", vectors, Job(0, 1, 1, torch.device("cpu")))
    mark = read(save_dir / "evaluation" / "validation" / f"{folder.name}.json")
    assert mark["edges"] == 300
    assert mark["link_prediction"]["mean"] == pytest.approx(alone["link_prediction"]["mean"])
    found = {step: one["mrr"] for step, one in rankings(save_dir).items()}
    assert int(folder.name) == max(found, key=lambda step: found[step])
    assert max(found) < 40 * STEPS


def test_two_ranks_give_up_a_long_validation_at_a_signal(config: Path, tmp_path: Path) -> None:
    """Of some 5 seconds: 24,000 queries, each with 20,000 candidates."""
    generator = np.random.default_rng(0)
    ends = {name: generator.integers(20_000, size=12_000) for name in ("lhs", "rhs")}
    edges = pa.table({**ends, "rel": np.zeros(12_000, np.int64)})
    pq.write_table(edges, tmp_path / "valid.parquet")
    command = [sys.executable, "-m", "tml.torchrun", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "projects" / "twhin" / "run.py"), f"--config_yaml_path={config}"]
    command += [f"--save_dir={tmp_path / 'run'}", "--set=model.embeddings.tables="]
    command[-1] += "[{name: user, num_embeddings: 20000, embedding_dim: 8}, "
    command[-1] += "{name: tweet, num_embeddings: 20000, embedding_dim: 8}]"
    command += [f"--set=validation_data.data_root={tmp_path}/valid.parquet"]
    command += ["--set=evaluation.during_training={every_n: 5}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    first = tmp_path / "run" / "5"
    while process.poll() is None and not checkpoint.is_complete(first):
        time.sleep(0.05)
    time.sleep(0.5)  # it is read again, then ranked
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert output.count("validation at step 5 given up") == 1, output
    assert "stopped by signal 15 after step 5; saved" in output
    assert "Traceback" not in output
    assert checkpoint.complete_steps(tmp_path / "run") == [5]
    assert checkpoint.load_meta(first)["is_measured"]
    assert not list((tmp_path / "run" / "evaluation").glob("**/*.json"))
