"""projects.home.recap.data.dataset and stream: order, shares, positions; parquet and TFRecords
alike.
"""

import gzip
import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from projects.home.recap.data.batch import RankingBatch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.dataset import Dataset, build_dataset, describe_features
from projects.home.recap.data.stream import Piece, StreamPosition, deal, join_positions
from tml.config import ConfigError, build_config
from tml.data.example import encode_examples
from tml.data.parquet import DataError
from tml.data.tfrecord import TFRecordWriter
from tml.distributed import Job

SCHEMA = [
    {"feature_name": "x", "dtype": "float_list", "length": 2},
    {"feature_name": "id", "dtype": "int64_list", "length": 1},
    {"feature_name": "like", "dtype": "int64_list", "length": 1},
]
SIZES = (23, 5, 40, 17, 31)
TOTAL = sum(SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files; row i has id i, x = (i, −i) and likes where i is even."""
    first = 0
    for number, size in enumerate(SIZES):
        ids = np.arange(first, first + size)
        first += size
        write(tmp_path / f"{number}.gz", ids)
    (tmp_path / "schema.json").write_text(json.dumps({"schema": SCHEMA}))
    return tmp_path


def write(path: Path, ids: Any, label: Any = None) -> None:
    columns = {
        "x": np.stack([ids, -ids], axis=1).astype(np.float32),
        "id": ids[:, None],
        "like": (ids % 2 == 0).astype(np.int64)[:, None] if label is None else label,
    }
    with TFRecordWriter(path, "gzip" if path.suffix == ".gz" else None) as writer:
        for record in encode_examples(columns):
            writer.write(record)


def config(folder: Path, **changes: Any) -> RecapDataConfig:
    tree = {
        "inputs": f"{folder}/*.gz",
        "seg_dense_schema": {
            "schema_path": f"{folder}/schema.json",
            "renamed_features": {"continuous": "x"},
        },
        "tasks": {"like": None},
        "examples_shuffle_buffer_size": 16,
        "interleave_num_parallel_calls": 3,
        **changes,
    }
    return build_config(RecapDataConfig, tree, "test")


def dataset(
    config: RecapDataConfig,
    rank: int = 0,
    world_size: int = 1,
    *,
    batch_rows: int = 8,
    num_epochs: int | None = 1,
    shuffle: bool = True,
    **options: Any,
) -> Dataset:
    job = Job(rank, world_size, world_size, torch.device("cpu"))
    return build_dataset(
        config,
        describe_features(config),
        job,
        1,
        batch_rows,
        num_epochs=num_epochs,
        shuffle=shuffle,
        **options,
    )


def ids(batches: list[RankingBatch]) -> list[int]:
    return [number for batch in batches for number in batch.ids["id"].tolist()]


def read(data: Dataset, position: Any = None, limit: int | None = None) -> tuple[Any, list[Any]]:
    batches, after = [], []
    for batch, place in data.batches(data.start() if position is None else position):
        batches.append(batch)
        after.append(place)
        if len(batches) == limit:
            break
    return batches, after


def same(left: RankingBatch, right: RankingBatch) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (left.ids["id"], right.ids["id"]),
            (left.continuous, right.continuous),
            (left.labels, right.labels),
            (left.weights, right.weights),
        )
    )


def test_evaluation_reads_every_row_once_in_order(folder: Path) -> None:
    batches, _ = read(dataset(config(folder), shuffle=False, num_epochs=None))
    assert ids(batches) == list(range(TOTAL))
    assert [len(batch) for batch in batches] == [8] * 14 + [4]
    assert torch.equal(torch.cat([b.continuous[:, 0] for b in batches]), torch.arange(TOTAL * 1.0))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_record_is_read_once_in_an_epoch_over_all_processes(
    folder: Path, world_size: int, threads: int
) -> None:
    data = config(folder, map_num_parallel_calls=threads)
    for shuffle in (True, False):
        found: list[int] = []
        for rank in range(world_size):
            one = dataset(data, rank, world_size, batch_rows=1, shuffle=shuffle)
            found += ids(read(one)[0])
        assert sorted(found) == list(range(TOTAL))


def test_training_mixes_rows_anew_in_each_epoch_and_threads_change_nothing(folder: Path) -> None:
    orders = [
        ids(read(dataset(config(folder, **changes), batch_rows=1, num_epochs=2))[0])
        for changes in ({}, {"map_num_parallel_calls": 3})
    ]
    assert orders[0] == orders[1]
    first, second = orders[0][:TOTAL], orders[0][TOTAL:]
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    assert first != second
    assert first != sorted(first)
    # A window of 16 rows comes from three files in turns.
    starts = np.cumsum([0, *SIZES])
    assert len(set(np.searchsorted(starts, first[:16], side="right").tolist())) >= 3


def test_without_a_buffer_rows_keep_the_order_of_their_files(folder: Path) -> None:
    plain = config(folder, examples_shuffle_buffer_size=0, interleave_num_parallel_calls=1)
    found = ids(read(dataset(plain, batch_rows=1))[0])
    jumps = sum(b != a + 1 for a, b in itertools.pairwise(found))
    assert jumps < len(SIZES)
    assert found != sorted(found)


def test_batches_run_across_the_seams_of_epochs(folder: Path) -> None:
    batches, after = read(dataset(config(folder), batch_rows=50, num_epochs=3))
    assert [len(batch) for batch in batches] == [50] * (3 * TOTAL // 50)  # the rest is dropped
    counts = Counter(ids(batches[:5]))
    assert set(counts.values()) <= {2, 3}
    assert [place.epoch for place in after] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_going_on_yields_the_batches_of_the_unbroken_run(
    folder: Path, rank: int, threads: int
) -> None:
    data = config(folder, map_num_parallel_calls=threads)
    batches, after = read(dataset(data, rank, 2, num_epochs=None), limit=25)
    assert after[-1].epoch >= 2
    for step in range(0, 24, 3):
        saved = json.loads(json.dumps(after[step].to_json()))
        other = json.loads(json.dumps(after[0].to_json()))
        again = dataset(data, rank, 2, num_epochs=None)
        place = again.resume([saved, other] if rank == 0 else [other, saved])
        found, _ = read(again, place, limit=24 - step)
        assert all(same(a, b) for a, b in zip(found, batches[step + 1 :], strict=True))


def test_a_position_is_small(folder: Path) -> None:
    _, after = read(dataset(config(folder), num_epochs=None), limit=20)
    assert max(len(json.dumps(place.to_json())) for place in after) < 300


@pytest.mark.parametrize(("before", "now"), [(2, 3), (3, 2), (2, 1), (1, 4), (7, 2)])
def test_another_number_of_processes_reads_what_is_left(
    folder: Path, before: int, now: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = config(folder)
    read_before: list[int] = []
    trees = []
    for rank in range(before):
        batches, after = read(dataset(data, rank, before, batch_rows=4, num_epochs=2), limit=2)
        read_before += ids(batches)
        trees.append(after[-1].to_json())
    found: list[int] = []
    for rank in range(now):
        one = dataset(data, rank, now, batch_rows=1, num_epochs=2)
        with caplog.at_level(logging.WARNING):
            place = one.resume(trees)
        batches, after = read(one, place)
        found += ids(batches)
        # From within the dealt-out epoch too the run can be taken up.
        again = dataset(data, rank, now, batch_rows=1, num_epochs=2)
        middle = [json.loads(json.dumps(after[3].to_json()))] * now
        assert ids(read(again, again.resume(middle))[0]) == ids(batches[4:])
    assert f"{now} processes go on from the data positions of {before}" in caplog.text
    counts = Counter(read_before + found)
    # Everything twice, for two epochs; at most one window of each former process once more.
    assert all(counts[number] >= 2 for number in range(TOTAL))
    assert sum(counts.values()) - 2 * TOTAL <= 16 * before


def test_processes_that_are_epochs_apart_are_joined(folder: Path) -> None:
    trees, read_before = [], []
    for rank, limit in ((0, 2), (1, 30)):
        batches, after = read(
            dataset(config(folder), rank, 2, batch_rows=4, num_epochs=4), limit=limit
        )
        read_before += ids(batches)
        trees.append(after[-1].to_json())
    assert (trees[0]["epoch"], trees[1]["epoch"]) == (0, 2)
    one = dataset(config(folder), batch_rows=1, num_epochs=4)
    counts = Counter(read_before + ids(read(one, one.resume(trees))[0]))
    assert all(counts[number] >= 4 for number in range(TOTAL))
    assert sum(counts.values()) - 4 * TOTAL <= 2 * 16


def test_each_process_window_and_epoch_has_an_order_of_its_own(folder: Path) -> None:
    write(folder / "one.tfrecord", np.arange(64))
    data = config(folder, inputs=f"{folder}/*.tfrecord")
    orders = []
    for rank in (0, 1):
        found = ids(read(dataset(data, rank, 2, batch_rows=1, num_epochs=2))[0])
        windows = np.array(found).reshape(4, 16)  # two a epoch
        orders += [tuple(np.argsort(window).tolist()) for window in windows]
    assert len(set(orders)) == 8


def test_a_part_of_a_part_is_dealt_out_without_loss() -> None:
    shares = [deal([Piece(0, 5, 1, 2)], rank, 3) for rank in range(3)]
    assert shares[1] == (Piece(0, 5, 3, 6),)
    found = [n for [one] in shares for n in range(5, 60) if n % one.parts == one.part]
    assert sorted(found) == [n for n in range(5, 60) if n % 2 == 1]


def test_positions_of_different_epochs_are_joined_by_epoch() -> None:
    def pieces(epoch: int, rank: int, world_size: int) -> tuple[Piece, ...]:
        return deal([Piece(file) for file in range(4)], rank, world_size)

    behind = StreamPosition("f", 0, 3, (Piece(2, 5),), 2, 7)
    ahead = StreamPosition("f", 1, 1, (), 1, 0)
    joined = join_positions([behind, ahead], 0, 1, pieces)
    # Epoch 0: what process 0 had open. Epoch 1: all of its files, and the other's last.
    assert joined.epoch == 0
    assert joined.rest == ((Piece(2, 5),), (Piece(0), Piece(2), Piece(3)))
    half = join_positions([behind, ahead, ahead], 1, 2, pieces)
    assert half.rest[0] == (Piece(2, 5, 1, 2),)


def test_other_files_are_refused(folder: Path) -> None:
    data = config(folder)
    _, after = read(dataset(data), limit=2)
    tree = after[-1].to_json()
    (folder / "0.gz").rename(folder / "9.gz")
    with pytest.raises(DataError, match="the data has changed since the checkpoint"):
        dataset(data).resume([tree])
    (folder / "9.gz").unlink()
    with pytest.raises(DataError, match=r"its files were 5 of .*, now they are 4 of"):
        dataset(data).resume([tree])


def test_the_same_files_in_another_folder_are_the_same(folder: Path, tmp_path: Path) -> None:
    _, after = read(dataset(config(folder)), limit=2)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.glob("*.gz"):
        path.rename(moved / path.name)
    data = config(folder, inputs=f"{moved}/*.gz")
    assert dataset(data).resume([after[-1].to_json()]) == after[-1]


def test_too_few_records_for_all_processes_do_not_loop_for_ever(folder: Path) -> None:
    write(folder / "one.tfrecord", np.arange(1))
    data = config(folder, inputs=f"{folder}/*.tfrecord")
    with pytest.raises(DataError, match="process 1 of 2 found no record in a whole epoch"):
        read(dataset(data, 1, 2, num_epochs=None))


@pytest.mark.parametrize("threads", [1, 2])
def test_bad_records_and_files_are_refused_or_counted_named_and_left_out(
    folder: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = gzip.decompress((folder / "0.gz").read_bytes())
    damaged = bytearray(data)
    damaged[20] ^= 1
    (folder / "0.gz").write_bytes(gzip.compress(bytes(damaged)))
    cut = (folder / "3.gz").read_bytes()
    (folder / "3.gz").write_bytes(cut[:-30])
    labels = np.zeros((31, 1), dtype=np.int64)
    labels[7] = 9
    write(folder / "4.gz", np.arange(TOTAL - 31, TOTAL), labels)
    strict = config(folder, map_num_parallel_calls=threads)
    with pytest.raises(DataError, match=r"0\.gz, record 0 at byte 0: the crc"):
        read(dataset(strict, shuffle=False))
    lenient = config(folder, ignore_data_errors=True, map_num_parallel_calls=threads)
    one = dataset(lenient, shuffle=False, batch_rows=1)
    with caplog.at_level(logging.WARNING):
        found = ids(read(one)[0])
    assert one.num_errors == 3
    missing = sorted(set(range(TOTAL)) - set(found))
    assert missing[0] == 0
    assert missing[-1] == TOTAL - 31 + 7
    assert set(missing[1:-1]) <= set(range(68, 85))  # the end of 3.gz
    for words in ("0.gz, record 0", "3.gz, record", "4.gz, record 7: label like is 9"):
        assert words in caplog.text
    # Training over the same files goes on, and can be taken up, too.
    batches, after = read(dataset(lenient, num_epochs=None), limit=30)
    again = dataset(lenient, num_epochs=None)
    found_again, _ = read(again, again.resume([after[9].to_json()]), limit=20)
    assert all(same(a, b) for a, b in zip(found_again, batches[10:], strict=True))


def test_an_empty_glob_and_absent_features_are_errors(folder: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        dataset(config(folder, inputs=f"{folder}/*.none"))
    schema = [*SCHEMA, {"feature_name": "more", "dtype": "float_list", "length": 1}]
    (folder / "schema.json").write_text(json.dumps({"schema": schema}))
    with pytest.raises(DataError, match=r"0\.gz, record 0: feature more is not there"):
        read(dataset(config(folder), shuffle=False))


def test_dropped_negatives_fill_batches_and_go_on_alike(folder: Path) -> None:
    sample = {"downsample_negatives": {"batch_multiplier": 4, "engagements_list": ["rare"]}}
    schema = [*SCHEMA, {"feature_name": "rare", "dtype": "int64_list", "length": 1, "default": 0}]
    (folder / "schema.json").write_text(json.dumps({"schema": schema}))
    data = config(folder, preprocess=sample, tasks={"rare": None})
    batches, after = read(dataset(data, num_epochs=None), limit=12)
    assert all(len(batch) == 8 for batch in batches)
    assert all(torch.equal(batch.weights, torch.full((8, 1), 4.0)) for batch in batches)
    again = dataset(data, num_epochs=None)
    found, _ = read(again, again.resume([after[4].to_json()]), limit=7)
    assert all(same(a, b) for a, b in zip(found, batches[5:], strict=True))


def test_rates_weigh_rows_where_so_asked(folder: Path) -> None:
    rates = {"like": {"pos_downsampling_rate": 0.5, "neg_downsampling_rate": 0.1}}
    data = config(folder, tasks=rates)
    (batch, *_), _ = read(dataset(data, shuffle=False))
    torch.testing.assert_close(batch.weights[:, 0], torch.tensor([2.0, 10.0] * 4))
    (batch, *_), _ = read(dataset(data, shuffle=False, use_weights=False))
    assert batch.weights.tolist() == [[1.0]] * 8


def test_memory_of_a_reader_is_used_again(folder: Path) -> None:
    one = dataset(config(folder), num_epochs=20)
    read(one)
    assert len(one._rows._stream._buffers) <= 3  # type: ignore[attr-defined]


# Vectors that are looked up, and parquet


def vector_table(path: Path, entities: Any, vectors: list[list[float]]) -> None:
    columns = {"entity": entities, "vector": pa.array(vectors, type=pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_vectors_are_looked_up_by_id(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    entities: list[Any] = ["2", "0", "name", "1777777777777777777", "99999999999999999999", "007"]
    if kind == "numbers":
        entities = [2, 0, 500, 1777777777777777777, 501, 502]
    vectors = [[float(i), -float(i)] for i in range(1, 7)]
    vector_table(folder / "vectors.parquet", entities, vectors)
    table = {"name": "twhin", "path": f"{folder}/vectors.parquet", "by": "id"}
    write(folder / "0.gz", np.array([0, 1, 2, 1777777777777777777]))
    data = config(folder, inputs=f"{folder}/0.gz", vector_tables=[table])
    assert describe_features(data).vectors == {"twhin": 2}
    with caplog.at_level(logging.WARNING):
        [batch], _ = read(dataset(data, shuffle=False))
    assert batch.vectors["twhin"].tolist() == [[2.0, -2.0], [0.0, 0.0], [1.0, -1.0], [4.0, -4.0]]
    assert "twhin: 1 rows had an id that is not in it" in caplog.text


@pytest.mark.parametrize(
    ("entities", "vectors", "words"),
    [
        (["1", "1"], [[1.0], [2.0]], "holds entity 1 twice"),
        (["1", "2"], [[1.0], [2.0, 3.0]], "row 1: the vector is of length 2"),
    ],
)
def test_vector_tables_that_are_none_are_refused(
    folder: Path, entities: list[str], vectors: list[list[float]], words: str
) -> None:
    vector_table(folder / "vectors.parquet", entities, vectors)
    table = {"name": "twhin", "path": f"{folder}/vectors.parquet", "by": "id"}
    with pytest.raises(DataError, match=words):
        dataset(config(folder, vector_tables=[table]))


def test_vectors_by_an_id_that_is_not_there_are_refused(folder: Path) -> None:
    vector_table(folder / "vectors.parquet", ["1"], [[1.0]])
    table = {"name": "twhin", "path": f"{folder}/vectors.parquet", "by": "author"}
    with pytest.raises(ConfigError, match="the data has no id 'author'; there are id"):
        describe_features(config(folder, vector_tables=[table]))
    with pytest.raises(DataError, match=r"absent\.parquet cannot be read as parquet"):
        describe_features(
            config(folder, vector_tables=[{**table, "path": "absent.parquet", "by": "id"}])
        )


def test_parquet_goes_through_the_same_preprocessing(tmp_path: Path) -> None:
    count = 64
    columns = {
        "x": pa.array([[float(i), 9.0] for i in range(count)], type=pa.list_(pa.float32())),
        "id": np.arange(count),
        "like": (np.arange(count) % 16 == 0).astype(np.int64),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    (tmp_path / "spec.yaml").write_text(
        "continuous: [{column: x, width: 2}]\nids: [id]\nlabels: [like]\n"
    )
    vector_table(tmp_path / "vectors.parq", ["3"], [[5.0]])
    tree = {
        "inputs": f"{tmp_path}/*.parquet",
        "feature_spec": f"{tmp_path}/spec.yaml",
        "tasks": {"like": {"pos_downsampling_rate": 0.5}},
        "vector_tables": [{"name": "twhin", "path": f"{tmp_path}/vectors.parq", "by": "id"}],
        "preprocess": {
            "truncate_and_slice": {"continuous_feature_truncation": 1},
            "downsample_negatives": {"batch_multiplier": 2, "engagements_list": ["like"]},
        },
    }
    data = build_config(RecapDataConfig, tree, "test")
    features = describe_features(data)
    assert (features.num_continuous, features.vectors) == (1, {"twhin": 1})
    batches, _ = read(dataset(data, shuffle=False, batch_rows=32))
    [batch] = batches
    assert (len(batch), batch.continuous.shape[1]) == (32, 1)
    likes = batch.labels[:, 0] > 0
    assert int(likes.sum()) == 4
    # 28 of 60 others are kept; likes were sampled at a half.
    torch.testing.assert_close(batch.weights[~likes, 0], torch.full((28,), 60 / 28))
    assert batch.weights[likes, 0].tolist() == [2.0] * 4
    expected = [[5.0] if number == 3 else [0.0] for number in batch.ids["id"].tolist()]
    assert batch.vectors["twhin"].tolist() == expected
