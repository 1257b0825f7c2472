"""The ranker's programs on tiny tables, in this process: what a run leaves, takes over, refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from projects.home.recap import evaluate, predict
from projects.home.recap.config import RecapConfig
from projects.home.recap.main import run
from projects.home.recap.model.build import load_model, read_config
from tml import checkpoint
from tml.checkpoint import CheckpointError
from tml.config import ConfigError, build_config
from tml.distributed import Job
from tml.logs import read_records
from tml.train import DivergedError, StopSignal

ROWS = 90
SPEC = {"continuous": ["x", "z"], "ids": ["user_id"], "labels": ["click"]}
Make = Callable[..., RecapConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    random = np.random.default_rng(0)
    x = random.normal(size=ROWS).astype(np.float32)
    click = (random.random(ROWS) < 1 / (1 + np.exp(-2 * x))).astype(np.int8)
    z = random.normal(size=ROWS).astype(np.float32)
    columns = {"x": x, "z": z, "user_id": np.arange(ROWS) % 7, "click": click}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (folder / "no_ids.yaml").write_text(yaml.safe_dump({**SPEC, "ids": []}))
    return folder


@pytest.fixture
def make(data: Path) -> Make:
    def make(**changes: Any) -> RecapConfig:
        """Some dotted keys (a__b) changed."""
        rows = {
            "inputs": f"{data}/*.parquet",
            "feature_spec": f"{data}/spec.yaml",
            "global_batch_size": 10,
            "tasks": {"click": None},
        }
        tree: dict[str, Any] = {
            "training": {"num_train_steps": 4, "checkpoint_every_n": 2},
            "model": {
                "tasks": {"click": {"mlp_config": {"layer_sizes": [1]}}},
                "backbone": {"mlp_config": {"layer_sizes": [4]}},
                "featurization_config": {"double_norm_log_config": {}},
            },
            "train_data": rows,
            "validation_data": {"all": dict(rows)},
            "optimizer": {"single_task_learning_rate": {"constant": 0.01}},
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = tree
            for key in parents:
                node = node[key]
            node[last] = value
        return build_config(RecapConfig, tree, "test")

    return make


def metrics(save_dir: Path) -> Any:
    return json.loads((save_dir / "metrics.json").read_text())


def calibration(folder: Path) -> tuple[float, bool]:
    """Saved log of the sampling ratio; whether there is a learned map."""
    saved = checkpoint.load_whole(folder)
    ratio = float(saved["model.calibration.log_ratios"])
    return ratio, bool(saved["model.calibration.learned"])


def test_a_run_taken_up_has_the_very_weights_of_an_unbroken_one(make: Make, tmp_path: Path) -> None:
    changes = {
        "model__tasks__click__mlp_config": {"layer_sizes": [8, 1], "dropout": {"rate": 0.5}},
        "calibration": {"partition": "all"},
    }
    run(make(**changes, training__num_train_steps=6), tmp_path / "unbroken")
    for steps in (3, 6):
        run(make(**changes, training__num_train_steps=steps), tmp_path / "broken")
    one, two = (checkpoint.load_whole(tmp_path / name / "6") for name in ("unbroken", "broken"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_marks_of_steps_that_are_trained_anew_are_forgotten(make: Make, tmp_path: Path) -> None:
    run(make(), tmp_path)
    for name in ("all", "dropped"):
        stale = tmp_path / "evaluation" / name / "6.json"
        stale.parent.mkdir(exist_ok=True)
        stale.write_text('{"tasks": {}}')
    run(make(training__num_train_steps=6), tmp_path)
    result = metrics(tmp_path)
    assert result["partitions"].keys() == {"all"}
    assert result["partitions"]["all"]["tasks"]["click"]["rows"] == ROWS


def test_a_run_that_ends_at_a_step_without_a_result_measures_it(make: Make, tmp_path: Path) -> None:
    run(make(training__num_train_steps=2, training__evaluated_by="evaluator"), tmp_path)
    assert metrics(tmp_path)["partitions"] == {}
    run(make(training__num_train_steps=2), tmp_path)
    assert metrics(tmp_path)["partitions"]["all"]["tasks"]["click"]["rows"] == ROWS
    kinds = [record["kind"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert kinds == ["train", "validation"]


def test_the_evaluator_completes_what_the_trainer_could_not_know(
    make: Make, tmp_path: Path
) -> None:
    config = make(training__evaluated_by="evaluator")
    run(config, tmp_path)
    assert evaluate.follow(config, tmp_path) is None
    result = metrics(tmp_path)
    assert result["step"] == 4
    marks = json.loads((tmp_path / "evaluation" / "all" / "4.json").read_text())
    assert result["partitions"] == {"all": marks}


def test_an_evaluator_without_validation_data_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs validation_data"):
        evaluate.follow(make(validation_data={}), tmp_path)


def test_neither_a_warm_start_nor_a_change_of_mind_undoes_sampling_twice(
    make: Make, tmp_path: Path
) -> None:
    tasks = {"click": {"neg_downsampling_rate": 0.5}}
    calibrates = make(
        train_data__tasks=tasks,
        training__downsampling_correction="calibration",
        calibration={"partition": "all"},
    )
    run(calibrates, tmp_path / "a")
    assert calibration(tmp_path / "a" / "4") == (pytest.approx(np.log(0.5)), True)

    warm = make(train_data__tasks=tasks, training__initial_checkpoint_dir=str(tmp_path / "a" / "4"))
    run(warm, tmp_path / "b")
    assert calibration(tmp_path / "b" / "4") == (0.0, False)

    run(make(train_data__tasks=tasks, training__num_train_steps=6), tmp_path / "a")
    assert calibration(tmp_path / "a" / "6") == (0.0, False)


def test_a_calibration_is_saved_with_the_weights_it_was_fitted_to_and_no_others(
    make: Make, tmp_path: Path
) -> None:
    config = make(
        calibration={"partition": "all"}, training__num_train_steps=8, training__validate_every_n=4
    )
    run(config, tmp_path)
    learned = {step: calibration(tmp_path / str(step))[1] for step in (2, 4, 6, 8)}
    assert learned == {2: False, 4: True, 6: False, 8: True}


@pytest.mark.parametrize("folds", [0, 1])
def test_what_cannot_be_measured_out_of_fold_is_not_shown_as_if_it_were(
    folds: int, make: Make, tmp_path: Path
) -> None:
    run(make(calibration={"partition": "all", "folds": folds, "kind": "isotonic"}), tmp_path)
    assert calibration(tmp_path / "4") == (0.0, True)
    assert "out_of_fold" not in metrics(tmp_path)["partitions"]["all"]


def test_evaluate_does_not_praise_a_calibration_on_the_rows_it_was_fitted_on(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make(calibration={"partition": "all"}), tmp_path)
    capsys.readouterr()
    assert evaluate.main(["--run", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == metrics(tmp_path)["partitions"]
    assert report["all"]["out_of_fold"]["tasks"]["click"] != report["all"]["tasks"]["click"]
    # Other rows of that name are measured with the calibration that the model has.
    other = "validation_data.all.global_batch_size=20"
    assert evaluate.main(["--run", str(tmp_path), "--json", "--set", other]) == 0
    assert "out_of_fold" not in json.loads(capsys.readouterr().out)["all"]


def test_what_is_wrong_with_a_new_run_is_found_before_the_old_one_is_removed(
    make: Make, tmp_path: Path
) -> None:
    run(make(), tmp_path)
    for changes in (
        {"training__initial_checkpoint_dir": str(tmp_path / "99")},
        {"model__stratifiers": [{"name": "s", "feature": "discrete", "index": 3, "value": 1}]},
        {
            "model__position_debias_config": {
                "max_position": 9,
                "num_dims": 2,
                "drop_probability": 0.5,
                "position_feature_name": "rank",
            }
        },
    ):
        with pytest.raises((ConfigError, CheckpointError)):
            run(make(**changes), tmp_path, overwrite=True)
    assert checkpoint.complete_steps(tmp_path) == [2, 4]
    # Its own last step can be where it starts anew from.
    warm = make(training__initial_checkpoint_dir=str(tmp_path / "4"))
    run(warm, tmp_path, overwrite=True)
    assert checkpoint.complete_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("partitions", [{}, None])
def test_a_model_that_diverged_is_neither_measured_nor_saved(
    partitions: Any, make: Make, tmp_path: Path
) -> None:
    """The loss of the first update is that of the weights before it: a number."""
    changes = {} if partitions is None else {"validation_data": partitions}
    config = make(
        training__num_train_steps=1,
        optimizer={"single_task_learning_rate": {"constant": 1e39}},
        **changes,
    )
    with pytest.raises(DivergedError, match="diverged"):
        run(config, tmp_path)
    assert checkpoint.complete_steps(tmp_path) == []


def test_a_partition_without_the_id_that_rows_are_grouped_by_is_refused(
    data: Path, make: Make, tmp_path: Path
) -> None:
    config = make(group_by="user_id", validation_data__all__feature_spec=f"{data}/no_ids.yaml")
    with pytest.raises(ConfigError, match=r"no id feature of validation_data\.all"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_interrupted_prediction_leaves_nothing(data: Path, make: Make, tmp_path: Path) -> None:
    run(make(), tmp_path / "run")
    config = read_config(tmp_path / "run" / "4")
    job = Job(0, 1, 1, torch.device("cpu"))
    model, _ = load_model(tmp_path / "run" / "4", config, job)
    stop = StopSignal()
    stop.number = 15
    output = tmp_path / "new" / "scores.parquet"
    predict.predict(config, model, f"{data}/*.parquet", output, job, stop=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    stop.number = None
    assert predict.predict(config, model, f"{data}/*.parquet", output, job, stop=stop) == ROWS
    assert pq.read_table(output).num_rows == ROWS
