"""The reader: every row once an epoch over all processes, whatever the row groups, and positions
that can be taken up.
"""

import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tml.data.parquet import (
    Columns,
    DataError,
    GroupBy,
    ParquetRows,
    Position,
    ShuffledReader,
    read_columns,
    split_evenly,
)


def write(path: Path, values: list[int], row_group: int, **extra: object) -> None:
    table = pa.table({"x": pa.array(values, pa.int64()), **extra})
    pq.write_table(table, path, row_group_size=row_group)


def reader(
    folder: Path,
    batch_size: int,
    *,
    epochs: int = 1,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    window: int = 1 << 20,
    offset: int = 0,
    limit: int | None = None,
) -> ShuffledReader:
    rows = ParquetRows(str(folder / "*.parquet"), ["x"], offset, limit)
    return ShuffledReader(rows, batch_size, epochs, seed, rank, world, window)


def values(source: ShuffledReader, position: Position | None = None) -> list[list[int]]:
    return [batch.columns["x"].tolist() for batch in source.batches(position or Position())]


def flat(batches: list[list[int]]) -> list[int]:
    return [value for batch in batches for value in batch]


def test_twenty_rows_in_row_groups_of_five_and_batches_of_two_give_twenty_rows(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.parquet", list(range(20)), row_group=5)
    batches = values(reader(tmp_path, 2))
    assert [len(batch) for batch in batches] == [2] * 10
    assert sorted(flat(batches)) == list(range(20))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("row_group", [1, 3, 7, 100])
@pytest.mark.parametrize("window", [1, 10, 1000])
def test_every_row_once_per_epoch_over_all_ranks(
    tmp_path: Path, world: int, row_group: int, window: int
) -> None:
    write(tmp_path / "a.parquet", list(range(31)), row_group)
    write(tmp_path / "b.parquet", list(range(31, 50)), row_group)
    ranks = [
        list(
            reader(tmp_path, 4, epochs=3, rank=rank, world=world, window=window).batches(Position())
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "every rank makes the same steps"
    for epoch in range(3):
        seen = Counter[int]()
        for batches in ranks:
            per_epoch = len(batches) // 3
            for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch]:
                seen.update(batch.columns["x"].tolist())
        assert seen == Counter(range(50))
    for step in zip(*ranks, strict=True):
        assert {batch.num_rows_all for batch in step} == {sum(len(b.columns["x"]) for b in step)}
        assert len({batch.after for batch in step}) == 1


def test_the_last_short_batch_is_kept_and_a_rank_without_rows_gets_an_empty_one(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.parquet", list(range(9)), row_group=4)
    first, second = (values(reader(tmp_path, 4, rank=rank, world=2)) for rank in range(2))
    assert [len(batch) for batch in first] == [4, 1]
    assert [len(batch) for batch in second] == [4, 0]
    assert sorted(flat(first) + flat(second)) == list(range(9))


def test_rows_are_shuffled_differently_each_epoch_and_alike_for_a_seed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", list(range(100)), row_group=10)
    both = flat(values(reader(tmp_path, 100, epochs=2)))
    assert both[:100] != list(range(100))
    assert both[:100] != both[100:]
    assert both == flat(values(reader(tmp_path, 7, epochs=2)))
    assert both != flat(values(reader(tmp_path, 100, epochs=2, seed=1)))


def test_rows_of_one_row_group_are_shuffled(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", list(range(100)), row_group=100)
    mixed = flat(values(reader(tmp_path, 100)))
    assert sorted(mixed) == list(range(100))
    assert sum(abs(a - b) > 10 for a, b in pairwise(mixed)) > 50


def test_small_windows_still_mix_rows_of_distant_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", list(range(1000)), row_group=10)
    first = values(reader(tmp_path, 50, window=50))[0]
    assert len({value // 10 for value in first}) == 5
    assert max(first) - min(first) > 300


def test_offset_and_limit_count_rows_across_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", list(range(10)), row_group=4)
    write(tmp_path / "b.parquet", list(range(10, 20)), row_group=4)
    got = flat(values(reader(tmp_path, 3, offset=5, limit=9)))
    assert sorted(got) == list(range(5, 14))
    pattern = str(tmp_path / "*.parquet")
    assert read_columns(pattern, ["x"], offset=5, limit=9)["x"].tolist() == list(range(5, 14))
    with pytest.raises(DataError, match="no row is left"):
        reader(tmp_path, 3, offset=20)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 4, 7, 9])
def test_a_position_continues_exactly(tmp_path: Path, world: int, steps: int) -> None:
    write(tmp_path / "a.parquet", list(range(53)), row_group=6)
    for rank in range(world):
        source = reader(tmp_path, 5, epochs=4, rank=rank, world=world, window=20)
        whole = list(source.batches(Position()))
        position = whole[steps - 1].after if steps else Position()
        position = Position.from_json(position.to_json())
        rest = list(source.batches(position))
        assert source.steps_from(position) == len(rest) == len(whole) - steps
        for batch, again in zip(whole[steps:], rest, strict=True):
            assert batch.columns["x"].tolist() == again.columns["x"].tolist()
            assert batch.after == again.after
            assert batch.num_rows_all == again.num_rows_all


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_processes_reads_the_rest_of_the_epoch_once(
    tmp_path: Path, before: int, after: int
) -> None:
    write(tmp_path / "a.parquet", list(range(101)), row_group=9)
    seen: list[int] = []
    position = Position()
    for rank in range(before):
        batches = list(reader(tmp_path, 6, rank=rank, world=before, window=30).batches(Position()))
        seen += [x for batch in batches[:4] for x in batch.columns["x"].tolist()]
        position = batches[3].after
    for rank in range(after):
        seen += flat(values(reader(tmp_path, 6, rank=rank, world=after, window=30), position))
    assert sorted(seen) == list(range(101))


def test_ids_above_two_to_the_31_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [2**31 + 5, 2**62], row_group=2)
    assert read_columns(str(tmp_path / "*.parquet"), ["x"])["x"].tolist() == [2**31 + 5, 2**62]


def test_data_that_has_shrunk_since_the_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", list(range(10)), row_group=4)
    with pytest.raises(DataError, match="data has changed"):
        list(reader(tmp_path, 3).batches(Position(0, ((4, 11),))))


def test_intervals_split_evenly_with_longer_parts_first() -> None:
    assert split_evenly([(0, 3), (10, 14)], 2) == [((0, 3), (10, 11)), ((11, 14),)]
    assert split_evenly([(0, 1)], 3) == [((0, 1),), (), ()]


class TestBadInput:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no file matches .*absent"):
            read_columns(str(tmp_path / "absent*.parquet"), ["x"])

    @pytest.mark.parametrize("keep", [0, 3, 100, -1])
    def test_a_truncated_file_is_named(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "a.parquet"
        write(path, list(range(100)), row_group=10)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"a\.parquet .*is not a complete parquet file"):
            read_columns(str(path), ["x"])

    def test_a_damaged_page_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"x": list(range(1000))}), path, compression="zstd")
        content = bytearray(path.read_bytes())
        content[4:300] = bytes(296)
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet"):
            read_columns(str(path), ["x"])

    def test_a_missing_column_lists_those_there(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", [1], row_group=1, y=pa.array([2]))
        with pytest.raises(DataError, match="no column 'lhs'; it has x, y"):
            read_columns(str(tmp_path / "a.parquet"), ["lhs"])

    def test_names_instead_of_ids_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"x": ["u1"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"must hold integers, not string.*prepare\.py"):
            read_columns(str(tmp_path / "a.parquet"), ["x"])

    def test_a_null_is_named_with_its_row(self, tmp_path: Path) -> None:
        table = pa.table({"x": pa.array([1, 2, 3, None], pa.int64())})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        with pytest.raises(DataError, match="row 3: column 'x' is null"):
            read_columns(str(tmp_path / "a.parquet"), ["x"])


@pytest.mark.parametrize("window", [10, 40])
def test_numbers_held_as_smaller_ones_are_the_same_in_every_batch(
    tmp_path: Path, window: int
) -> None:
    write(tmp_path / "a.parquet", [7 * value for value in range(40)], row_group=5)
    rows = ParquetRows(str(tmp_path / "*.parquet"), ["x"])

    def refuse_none(*_: object) -> None:
        return None

    held = ShuffledReader(rows, 6, 2, 3, 0, 1, window, refuse_none, hold_as=np.int32)
    whole = ShuffledReader(rows, 6, 2, 3, 0, 1, window, refuse_none)
    assert values(held) == values(whole)
    assert {batch.columns["x"].dtype for batch in held.batches(Position())} == {np.dtype(np.int64)}


def test_a_number_too_large_for_what_holds_it_comes_to_the_check_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1, 2**32 + 1], row_group=1)
    rows = ParquetRows(str(tmp_path / "*.parquet"), ["x"])
    checked: list[int] = []

    def note(columns: Columns, path: str, first_row: int) -> None:
        checked.extend(columns["x"].tolist())

    list(ShuffledReader(rows, 2, 1, 0, check=note, hold_as=np.int32).batches(Position()))
    assert sorted(checked) == [1, 2**32 + 1]


def test_a_window_is_in_memory_once_and_let_go_of_before_the_next(tmp_path: Path) -> None:
    count, window = 1 << 18, 1 << 16
    write(tmp_path / "a.parquet", list(range(count)), row_group=1 << 12)
    rows = ParquetRows(str(tmp_path / "*.parquet"), ["x"])

    def peak(**settings: Any) -> int:
        tracemalloc.start()
        for _ in ShuffledReader(rows, 1024, 1, 0, 0, 1, window, **settings).batches(Position()):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # A window and its order, which is int32; a tenth for what is read at the moment.
    assert peak() < 1.1 * (8 + 4) * window + 200_000
    assert peak(check=lambda *_: None, hold_as=np.int32) < 1.1 * (4 + 4) * window + 200_000


@pytest.mark.parametrize(
    ("group_by", "order"),
    [
        (None, [8, 2, 0, 7, 1, 6, 5, 9, 10, 4, 3, 11, 0, 6, 8, 7, 1, 2, 4, 10, 9, 3, 11, 5]),
        (
            lambda columns, _: columns["x"] // 4,
            [2, 0, 1, 7, 6, 8, 3, 9, 10, 11, 5, 4, 6, 7, 8, 0, 1, 2, 3, 10, 9, 11, 4, 5],
        ),
    ],
)
def test_the_order_of_a_seed_is_what_it_was(
    tmp_path: Path, group_by: GroupBy | None, order: list[int]
) -> None:
    # Runs that began with an earlier version go on from a position in this order.
    write(tmp_path / "a.parquet", list(range(12)), row_group=3)
    rows = ParquetRows(str(tmp_path / "*.parquet"), ["x"])
    for held in (None, np.int32):
        source = ShuffledReader(
            rows, 4, 2, 7, 0, 1, 6, lambda *_: None, group_by=group_by, hold_as=held
        )
        assert flat(values(source)) == order
