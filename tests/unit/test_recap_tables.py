"""Parquet and a spec → batches: every value in its place, every row once, bad rows named."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.dataset import build_dataset
from projects.home.recap.data.tables import TableDataset, describe
from tml.config import ConfigError
from tml.data.parquet import DataError, Position
from tml.distributed import Job

SPEC: dict[str, Any] = {
    "continuous": ["age", {"column": "past", "width": 2}],
    "binary": ["flag"],
    "discrete": ["hashed"],
    "vectors": {"taste": 3},
    "categorical": {"item": {"num_values": 5}, "city": {"hash_rows": 9}},
    "bags": {"tags": {"num_values": 4}},
    "ids": ["user_id"],
    "timestamp": "at",
    "labels": ["click", "like"],
}


def columns(num_rows: int) -> dict[str, Any]:
    """Row i holds i wherever it can."""
    rows = range(num_rows)
    return {
        "age": pa.array([None if i == 1 else float(i) for i in rows], pa.float64()),
        "past": pa.array([[i, i + 0.5] for i in rows], pa.list_(pa.float32(), 2)),
        "flag": pa.array([i % 2 == 0 for i in rows]),
        "hashed": pa.array([i - 1 for i in rows], pa.int64()),
        "taste": pa.array([None if i == 2 else [i, 0, 1] for i in rows], pa.list_(pa.float32())),
        "item": pa.array([i % 5 for i in rows], pa.int32()),
        "city": pa.array([None if i == 0 else f"city {i}" for i in rows]),
        "tags": pa.array([[i % 4] * (i % 3) for i in rows], pa.list_(pa.int16())),
        "user_id": pa.array(rows, pa.int64()),
        "at": pa.array([1000 + i for i in rows], pa.int64()),
        "click": pa.array([i % 2 for i in rows], pa.int8()),
        "like": pa.array([i == 3 for i in rows]),
    }


def write(folder: Path, num_rows: int = 7, row_group: int = 3, **changed: Any) -> None:
    table = pa.table({**columns(num_rows), **changed})
    pq.write_table(table, folder / "a.parquet", row_group_size=row_group)
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))


def config(folder: Path, tasks: dict[str, Any] | None = None, **values: Any) -> RecapDataConfig:
    return RecapDataConfig(
        inputs=str(folder / "*.parquet"),
        feature_spec=str(folder / "spec.yaml"),
        tasks=tasks or {"like": None, "click": None},
        **values,
    )


def dataset(
    given: RecapDataConfig,
    batch_rows: int = 4,
    *,
    shuffle: bool = False,
    num_epochs: int | None = 1,
    rank: int = 0,
    world: int = 1,
    **more: bool,
) -> TableDataset:
    paths = sorted(str(path) for path in Path(str(given.inputs)).parent.glob("*.parquet"))
    job = Job(rank, world, world, torch.device("cpu"))
    return TableDataset(
        given, paths, job, 1, batch_rows, num_epochs=num_epochs, shuffle=shuffle, **more
    )


def users(source: TableDataset, position: Position | None = None) -> list[list[int]]:
    return [b.ids["user_id"].tolist() for b, _ in source.batches(position or source.start())]


def test_every_value_lands_where_it_belongs(tmp_path: Path) -> None:
    write(tmp_path)
    ((batch, _),) = dataset(config(tmp_path), batch_rows=7).batches(Position())
    features = describe(config(tmp_path))
    assert features.tasks == ("like", "click")
    assert (features.num_continuous, features.num_binary, features.num_discrete) == (3, 1, 1)
    assert features.continuous_names == ("age", "past.0", "past.1")
    assert features.categorical == {"item": 5, "city": 9}
    assert features.ids == ("user_id", "at")

    assert batch.continuous[:, 0].isnan().tolist() == [False, True] + [False] * 5
    assert batch.continuous[4].tolist() == [4, 4, 4.5]
    assert batch.binary[:, 0].tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert batch.discrete[:, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert batch.vectors["taste"][1].tolist() == [1, 0, 1]
    assert batch.vectors["taste"][2].tolist() == [0, 0, 0]  # null
    assert batch.categorical["item"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.categorical["city"][0] == 0  # null
    assert (batch.categorical["city"][1:] > 0).all()
    assert batch.bags["tags"].offsets.tolist() == [0, 0, 1, 3, 3, 4, 6, 6]
    assert batch.bags["tags"].values.tolist() == [1, 2, 2, 0, 1, 1]
    assert batch.ids["at"].tolist() == list(range(1000, 1007))
    assert batch.labels.tolist() == [[float(i == 3), float(i % 2)] for i in range(7)]
    assert batch.weights.tolist() == [[1, 1]] * 7
    assert batch.continuous.dtype == batch.binary.dtype == batch.labels.dtype == torch.float32


def test_the_rows_stay_together_when_they_are_shuffled(tmp_path: Path) -> None:
    write(tmp_path, 50, 8)
    seen = []
    for batch, _ in dataset(config(tmp_path), 6, shuffle=True).batches(Position()):
        user = batch.ids["user_id"]
        seen += user.tolist()
        assert (batch.continuous[:, 1] == user).all()
        assert (batch.categorical["item"] == user % 5).all()
        assert (batch.labels[:, 1] == user % 2).all()
        lengths = batch.bags["tags"].offsets.diff()
        assert (lengths == user % 3).all()
        assert (batch.bags["tags"].values == (user % 4).repeat_interleave(lengths)).all()
    assert sorted(seen) == list(range(50))
    assert seen != sorted(seen)


def test_evaluation_reads_all_rows_once_in_order_whatever_the_number_of_processes(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    assert users(dataset(config(tmp_path))) == [[0, 1, 2, 3], [4, 5, 6]]
    parts = [users(dataset(config(tmp_path), 2, rank=rank, world=2)) for rank in (0, 1)]
    assert parts == [[[0, 1], [2, 3]], [[4, 5], [6]]]


@pytest.mark.parametrize(
    ("num_rows", "world", "steps"), [(9, 1, 2), (10, 1, 3), (11, 2, 1), (12, 2, 2)]
)
def test_a_training_step_with_a_process_of_less_than_2_rows_is_left_out(
    tmp_path: Path, num_rows: int, world: int, steps: int
) -> None:
    # 11 rows over 2 processes: 6 and 5; batches of 4, then 2 and 1.
    write(tmp_path, num_rows)
    for rank in range(world):
        source = dataset(config(tmp_path), 4, shuffle=True, num_epochs=3, rank=rank, world=world)
        assert source.steps_from(source.start()) == 3 * steps
        batches = users(source)
        assert len(batches) == 3 * steps
        assert min(len(batch) for batch in batches) >= 2


def test_a_position_in_the_middle_is_taken_up_by_another_number_of_processes(
    tmp_path: Path,
) -> None:
    write(tmp_path, 40, 7)
    whole = dataset(config(tmp_path), 8, shuffle=True)
    batches = list(whole.batches(whole.start()))
    first, position = batches[0]
    position = whole.load_position(position.to_json())
    seen = first.ids["user_id"].tolist()
    for rank in (0, 1):
        source = dataset(config(tmp_path), 4, shuffle=True, rank=rank, world=2)
        assert source.steps_from(position) == 4
        seen += [user for batch in users(source, position) for user in batch]
    assert sorted(seen) == list(range(40))


def test_without_a_number_of_epochs_reading_goes_on(tmp_path: Path) -> None:
    write(tmp_path)
    source = dataset(config(tmp_path), shuffle=True, num_epochs=None)
    assert source.steps_from(source.start()) is None
    batches = source.batches(source.start())
    epochs = [next(batches)[1].epoch for _ in range(6)]
    assert epochs == [0, 1, 1, 2, 2, 3]


def test_rows_weigh_by_the_sampling_rates_and_their_own_column_once(tmp_path: Path) -> None:
    write(tmp_path, weight=pa.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]))
    tasks = {
        "like": {"pos_downsampling_rate": 0.5, "neg_downsampling_rate": 0.25},
        "click": None,
    }
    given = config(tmp_path, tasks, weight_column="weight")
    job = Job(0, 1, 1, torch.device("cpu"))
    for use_weights, wanted in (
        (True, [4, 8, 12, 4 / 0.5, 20, 24, 0]),
        (False, [1, 2, 3, 4, 5, 6, 0]),
    ):
        rows = build_dataset(
            given, describe(given), job, 1, 7, num_epochs=1, shuffle=False, use_weights=use_weights
        )
        ((batch, _),) = rows.batches(rows.start())
        assert batch.weights[:, 0].tolist() == wanted
        assert batch.weights[:, 1].tolist() == [1, 2, 3, 4, 5, 6, 0]


# What is wrong with the data


@pytest.mark.parametrize(
    ("change", "bad", "message"),
    [
        ({"click": [0, 1, 0, 1, 2, 0, 1]}, {4}, "a.parquet, row 4: column 'click' is 2; a label"),
        ({"click": [0, 1, 0, 1, None, 0, 1]}, {4}, "a.parquet, row 4: column 'click' is null"),
        ({"item": [0, 1, 2, 3, 4, 5, 0]}, {5}, "row 5: column 'item' is 5, out of range 0 to 4"),
        ({"tags": [[1], [], [-1], [], [], [9], []]}, {2, 5}, "row 2: column 'tags' is -1, out of"),
    ],
)
def test_a_bad_value_is_named_or_its_row_left_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    bad: set[int],
    message: str,
) -> None:
    write(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        users(dataset(config(tmp_path)))

    with caplog.at_level(logging.WARNING):
        source = dataset(config(tmp_path, ignore_data_errors=True))
        left = [user for batch in users(source) for user in batch]
    assert set(left) == set(range(7)) - bad
    assert message.split(";")[0] in caplog.text
    assert sum(source.errors.values()) == len(bad)


def test_to_predict_labels_may_be_absent_or_unknown(tmp_path: Path) -> None:
    write(tmp_path, click=pa.nulls(7, pa.int8()))
    table = pq.read_table(tmp_path / "a.parquet").drop_columns(["like"])
    pq.write_table(table, tmp_path / "a.parquet")
    ((batch, _),) = dataset(config(tmp_path), 7, needs_labels=False).batches(Position())
    assert batch.labels.tolist() == [[0, 0]] * 7
    with pytest.raises(DataError, match="no column 'like'"):
        dataset(config(tmp_path), 7)


def test_a_row_number_beyond_64_bits_is_out_of_range(tmp_path: Path) -> None:
    write(tmp_path, item=pa.array([0, 1, 2**63, 3, None, 4, 0], pa.uint64()))
    with pytest.raises(DataError, match=r"row 2: column 'item' is -.*, out of range 0 to 4"):
        users(dataset(config(tmp_path)))


def test_preprocess_is_refused_since_it_would_do_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match="preprocess is for TFRecords"):
        describe(config(tmp_path, preprocess={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taste": [[1.0, 2.0, 3.0]] * 5 + [[1.0]] * 2}, "row 5: column 'taste' is a list of 1"),
        ({"item": ["a"] * 7}, "'item' must hold row numbers"),
        ({"age": ["a"] * 7}, "'age' must hold numbers, not string"),
        ({"user_id": [1, 2, None, 4, 5, 6, 7]}, "row 2: column 'user_id' is null"),
    ],
)
def test_a_column_of_the_wrong_kind_is_an_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        users(dataset(config(tmp_path)))


def test_an_absent_column_and_an_absent_task_are_errors_with_both_lists(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(
        ConfigError, match=r"tasks: reply: no such label .*reply; labels there: click, like"
    ):
        describe(config(tmp_path, {"click": None, "reply": None}))
    table = pq.read_table(tmp_path / "a.parquet").drop_columns(["age"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'age'; it has past, flag"):
        dataset(config(tmp_path))


def test_vocabularies_and_bags_of_text_are_looked_up(tmp_path: Path) -> None:
    write(tmp_path, 3, tags=[["x", "q"], None, ["y"]])
    pq.write_table(pa.table({"value": ["y", "x"]}), tmp_path / "tags.vocabulary")
    spec = {**SPEC, "bags": {"tags": {"vocabulary": "tags.vocabulary"}}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert describe(config(tmp_path)).bags == {"tags": 3}
    ((batch, _),) = dataset(config(tmp_path)).batches(Position())
    assert batch.bags["tags"].values.tolist() == [2, 0, 1]
    assert batch.bags["tags"].offsets.tolist() == [0, 2, 2, 3]


def test_a_table_of_published_width_is_read_as_one_block(tmp_path: Path) -> None:
    values = np.arange(10 * 2117, dtype=np.float32).reshape(10, 2117)
    block = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 2117)
    pq.write_table(pa.table({"continuous": block, "click": [0, 1] * 5}), tmp_path / "a.parquet")
    spec = {"continuous": [{"column": "continuous", "width": 2117}], "labels": ["click"]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    ((batch, _),) = dataset(config(tmp_path, {"click": None}), 10).batches(Position())
    assert torch.equal(batch.continuous, torch.from_numpy(values))
    assert batch.binary.shape == (10, 0)
