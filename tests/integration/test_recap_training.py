"""The whole of the ranker's main.py on a small real run: resuming after kill -9 and SIGTERM, ranks,
accumulation, warm start, the evaluator role, prediction, bad input.
"""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests import programs
from tml import checkpoint
from tml.logs import read_records

ROOT = Path(__file__).parents[2]
RECAP = ROOT / "projects" / "home" / "recap"
STEPS = 24
ROWS = 600

SCHEMA = [
    ("cont", "float_list", 20),
    ("bin", "int64_list", 6),
    ("disc", "int64_list", 3),
    ("author_vector", "float_list", 8),
    ("meta.user_id", "int64_list", 1),
    ("label.a", "int64_list", 1),
    ("label.b", "int64_list", 1),
    ("label.c", "int64_list", 1),
]
MLP = {"layer_sizes": [16, 1]}


def config_tree(folder: Path, **training: Any) -> dict[str, Any]:
    schema = [{"feature_name": n, "dtype": t, "length": size} for n, t, size in SCHEMA]
    (folder / "schema.json").write_text(json.dumps({"schema": schema}))
    data = {
        "inputs": f"{folder}/data/*.gz",
        "global_batch_size": 48,
        "seg_dense_schema": {
            "schema_path": f"{folder}/schema.json",
            "renamed_features": {
                "continuous": "cont",
                "binary": "bin",
                "discrete": "disc",
                "author_embedding": "author_vector",
                "meta__user_id": "meta.user_id",
            },
        },
        # Neither the order nor the number of the model's tasks.
        "tasks": {"label.c": None, "label.b": None, "label.a": None},
        "examples_shuffle_buffer_size": 100,
        "preprocess": {"truncate_and_slice": {"continuous_feature_truncation": 12}},
    }
    ramp = {"linear_ramp_to_constant": {"learning_rate": 0.01, "num_ramp_steps": 10}}
    block = {"output_size": 16, "aggregation_size": 8}
    return {
        "training": {
            "num_train_steps": STEPS,
            "train_log_every_n": 4,
            "checkpoint_every_n": 8,
            **training,
        },
        "model": {
            "tasks": {"label.a": {"mlp_config": MLP}, "label.b": {"mlp_config": MLP}},
            "backbone": {"mask_net_config": {"mask_blocks": [block, block]}},
            "featurization_config": {"double_norm_log_config": {}},
        },
        "train_data": data,
        "validation_data": {"all": data, "only_b": {**data, "evaluation_tasks": ["label.b"]}},
        "optimizer": {
            "multi_task_learning_rates": {
                "backbone_learning_rate": ramp,
                "tower_learning_rates": {"label.a": ramp, "label.b": {"constant": 0.005}},
            }
        },
    }


def call(program: str, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return programs.run(str(RECAP / program), *arguments, **more)


def command(config: Path, save_dir: Path, *extra: str, ranks: int = 1) -> list[str]:
    given = [f"--config_path={config}", f"--save_dir={save_dir}", *extra]
    return [*programs.torchrun(ranks), str(RECAP / "main.py"), *given]


def train(
    config: Path, save_dir: Path, *extra: str, ranks: int = 1
) -> "subprocess.CompletedProcess[str]":
    return programs.run(*command(config, save_dir, *extra, ranks=ranks))


def records(save_dir: Path) -> list[dict[str, Any]]:
    """Everything that does not depend on the clock."""
    clock = {"time", "rate", "memory_bytes", "left_s"}
    return [
        {key: value for key, value in record.items() if key not in clock}
        for record in read_records(save_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recap")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_tree(folder)))
    made = call(
        "data/generate_random_data.py",
        f"--config_path={folder}/config.yaml",
        f"--n_examples={ROWS}",
        "--n_files=4",
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(config, save_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir


@pytest.fixture(scope="module")
def unbroken_two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(config, save_dir, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir


def variant(config: Path, path: Path, **changes: Any) -> Path:
    """A copy of the config with some dotted keys (a__b) changed."""
    tree = yaml.safe_load(config.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = tree
        for key in parents:
            node = node[key]
        node[last] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_run_ends_after_its_last_step_and_its_folder_explains_itself(unbroken: Path) -> None:
    assert checkpoint.complete_steps(unbroken) == [8, 16, 24]
    names = {path.name for path in unbroken.iterdir()} - {"8", "16", "24"}
    assert names == {"metrics.jsonl", "metrics.json", "config.yaml", "evaluation", ".lock"}
    steps = [record["step"] for record in records(unbroken) if record["kind"] == "train"]
    assert steps == [4, 8, 12, 16, 20, 24]
    result = json.loads((unbroken / "metrics.json").read_text())
    assert result["step"] == STEPS
    assert result["partitions"]["all"]["tasks"].keys() == {"label.a", "label.b"}
    assert result["partitions"]["only_b"]["tasks"].keys() == {"label.b"}
    assert result["partitions"]["all"]["tasks"]["label.a"]["rows"] == ROWS


def test_each_tower_learns_its_own_label(unbroken: Path) -> None:
    """Labels taken by position would pair label.a with label.c, and every AUC would stay at .5."""
    tasks = json.loads((unbroken / "metrics.json").read_text())["partitions"]["all"]["tasks"]
    for task, values in tasks.items():
        assert values["auc"] > 0.6, (task, values)


def test_the_learning_rate_of_each_group_follows_its_own_schedule(unbroken: Path) -> None:
    first = records(unbroken)[0]
    assert first["lr"] == {"backbone": 0.003, "label.a": 0.003, "label.b": 0.005}


def kill_at(config: Path, save_dir: Path, step: int, number: int, ranks: int = 1) -> int:
    """Start a run, send it a signal once it has logged `step`, and wait for its end."""
    process = programs.start(*command(config, save_dir, ranks=ranks))
    log = save_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and any(r["step"] >= step for r in read_records(log))):
        assert process.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if number == signal.SIGKILL:
        process.kill()
    else:
        process.send_signal(number)
    return process.wait(60)


@pytest.mark.parametrize(
    ("step", "number", "ranks"),
    [
        (4, signal.SIGKILL, 1),
        (12, signal.SIGKILL, 1),
        (12, signal.SIGTERM, 1),
        (12, signal.SIGKILL, 2),
    ],
)
def test_a_run_stopped_anywhere_and_called_again_writes_the_records_of_an_unbroken_one(
    step: int, number: int, ranks: int, config: Path, request: Any, tmp_path: Path
) -> None:
    expected = request.getfixturevalue("unbroken" if ranks == 1 else "unbroken_two")
    code = kill_at(config, tmp_path / "run", step, number, ranks)
    assert code == (143 if number == signal.SIGTERM else -number)
    done = train(config, tmp_path / "run", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert records(tmp_path / "run") == records(expected)


def test_four_micro_batches_are_the_batch_that_is_four_times_as_large(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    small = variant(
        config,
        tmp_path / "small.yaml",
        train_data__global_batch_size=12,
        training__gradient_accumulation=4,
    )
    done = train(small, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    ours = [r["loss"] for r in records(tmp_path / "run") if r["kind"] == "train"]
    theirs = [r["loss"] for r in records(unbroken) if r["kind"] == "train"]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_start_from_the_same_model_and_learn_as_one(
    unbroken: Path, unbroken_two: Path
) -> None:
    """Each reads other files, so batches differ; with the same model the first losses agree."""
    one, two = (
        [r["loss"] for r in records(run) if r["kind"] == "train"]
        for run in (unbroken, unbroken_two)
    )
    assert two[0] == pytest.approx(one[0], rel=0.1)
    assert two[-1] == pytest.approx(one[-1], rel=0.15)


def test_a_run_of_one_process_is_taken_up_by_two(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    assert kill_at(config, tmp_path / "run", 12, signal.SIGKILL) == -signal.SIGKILL
    done = train(config, tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.complete_steps(tmp_path / "run")[-1] == STEPS


def test_records_that_end_before_the_last_step_end_the_run(config: Path, tmp_path: Path) -> None:
    """How many records there are is not known before they are read."""
    short = variant(config, tmp_path / "short.yaml", training__num_epochs=1)
    done = train(short, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == ROWS // 48


def test_a_warm_start_takes_the_named_parts_and_nothing_else(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    warm = variant(
        config,
        tmp_path / "warm.yaml",
        training__initial_checkpoint_dir=str(unbroken / "24"),
        training__initial_checkpoint_parts=["backbone"],
        training__num_train_steps=1,
        optimizer={"single_task_learning_rate": {"constant": 0.0}},
    )
    done = train(warm, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (checkpoint.load_whole(f) for f in (unbroken / "24", tmp_path / "run" / "1"))
    names = [n for n in after if n.startswith("model.") and n.endswith("weight")]
    same = {n for n in names if torch.equal(before[n], after[n])}
    assert same
    assert all(".backbone" in n for n in same if before[n].dim() > 1)
    assert any("towers" in n for n in set(names) - same)


def test_the_evaluator_follows_the_checkpoints_and_marks_partitions_done(
    config: Path, tmp_path: Path
) -> None:
    apart = variant(config, tmp_path / "apart.yaml", training__evaluated_by="evaluator")
    run = tmp_path / "run"
    evaluator = programs.start(*command(apart, run), SPEC_TYPE="evaluator")
    done = train(apart, run)
    assert done.returncode == 0, done.stderr[-3000:]
    _, errors = evaluator.communicate(120)
    assert evaluator.returncode == 0, errors
    for step in (8, 16, 24):
        assert (run / "evaluation" / "all" / f"{step}.json").exists(), errors
        assert (run / "evaluation" / "only_b" / f"{step}.json").exists()
    assert "validation" not in {record["kind"] for record in records(run)}


def test_the_evaluator_gives_up_when_no_checkpoint_comes(config: Path, tmp_path: Path) -> None:
    short = variant(config, tmp_path / "short.yaml", training__eval_timeout_in_s=1)
    done = programs.run(*command(short, tmp_path / "none"), SPEC_TYPE="evaluator")
    assert done.returncode == 2
    assert "is the trainer running" in done.stderr


def test_evaluate_gives_the_numbers_of_the_run(unbroken: Path) -> None:
    done = call("evaluate.py", f"--run={unbroken}", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads((unbroken / "metrics.json").read_text())
    assert json.loads(done.stdout) == result["partitions"]


def test_predictions_are_those_that_were_measured(
    folder: Path, unbroken: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.yaml"
    weights.write_text("label.a: 2\nlabel.b: -0.5\n")
    output = tmp_path / "scores.parquet"
    done = call(
        "predict.py",
        f"--run={unbroken}",
        f"--inputs={folder}/data/*.gz",
        f"--output={output}",
        f"--weights={weights}",
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(output)
    assert table.num_rows == ROWS
    a, b = (table.column(f"probability.label.{name}").to_numpy() for name in "ab")
    score = 2 * a.astype(np.float64) - 0.5 * b.astype(np.float64)
    np.testing.assert_allclose(table.column("score").to_numpy(), score)
    tasks = json.loads((unbroken / "metrics.json").read_text())["partitions"]["all"]["tasks"]
    positives = tasks["label.a"]["positives"]
    assert a.sum() / positives == pytest.approx(tasks["label.a"]["calibration"], rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"weights.yaml", "scores.parquet"}


def test_a_weight_of_no_task_is_refused(folder: Path, unbroken: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.yaml"
    weights.write_text("label.z: 2\n")
    done = call(
        "predict.py",
        f"--run={unbroken}",
        f"--inputs={folder}/data/*.gz",
        f"--output={tmp_path}/scores.parquet",
        f"--weights={weights}",
    )
    assert done.returncode == 2
    assert "label.z: no task of the model; there are label.a, label.b" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_data__tasks": {"label.a": None, "label.c": None}},
            "label.b of the model is missing. Model: label.a, label.b. train_data.tasks: label.a,",
        ),
        (
            {
                "optimizer__multi_task_learning_rates__tower_learning_rates": {
                    "label.a": {"constant": 1}
                }
            },
            "label.b of the model is missing",
        ),
        ({"train_data__inputs": "/nowhere/*.gz"}, "/nowhere/*.gz"),
        ({"training": {}}, "set num_train_steps or num_epochs"),
        ({"training__initial_checkpoint_dir": "/nowhere/8"}, "/nowhere/8 does not exist"),
        ({"group_by": "session"}, "group_by: 'session' is no id feature"),
        ({"which_metrics": "auc, mcc"}, "mcc"),
        ({"model__backbone__mask_net_config__mask_blocks": []}, "at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changes: dict[str, Any], message: str, config: Path, tmp_path: Path
) -> None:
    done = train(variant(config, tmp_path / "bad.yaml", **changes), tmp_path / "run")
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_refused(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    narrow = [{"output_size": 8, "aggregation_size": 8}]
    other = variant(
        config, tmp_path / "other.yaml", model__backbone__mask_net_config__mask_blocks=narrow
    )
    done = train(other, unbroken)
    assert done.returncode == 2
    assert "it is of another model" in done.stderr
    assert checkpoint.complete_steps(unbroken) == [8, 16, 24]
