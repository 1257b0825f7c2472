"""Parquet → arrays of integers: all of it (`read_columns`) or shuffled batches in bounded memory
(`ShuffledReader`).

Order of an epoch. The rows [offset, offset + limit) of the files, in order of their names, lie in
row groups. The row groups are put in random order and gathered into windows of about `window_rows`
rows; the rows of a window are put in random order. The result is one global order that depends on
(seed, epoch) alone, not on the number of processes. Each process takes one stretch of it, the
stretches differ by at most one row, so every row is read once in an epoch, and a process reads
little more than its own share of the files.

A position is the list of stretches that no process has read yet. It can be taken up by any number
of processes.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Columns = dict[str, NDArray[np.int64]]
Interval = tuple[int, int]
Check = Callable[[Columns, str, int], None]
"""Called with columns, the file they are from and the number of their first row there; raises
DataError.
"""


class DataError(ValueError):
    """Data that its owner has to mend; the message says which file, what and how."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + num_rows) of one row group of one file."""

    path: str
    row_group: int
    start: int
    num_rows: int
    file_row: int
    """Number of the piece's first row in its file."""


class ParquetRows:
    """The rows [offset, offset + limit) of the files that match `pattern`, as pieces of row
    groups.
    """

    def __init__(
        self, pattern: str, columns: Sequence[str], offset: int = 0, limit: int | None = None
    ) -> None:
        self.pattern = pattern
        self.columns = tuple(columns)
        self._metadata: dict[str, Any] = {}
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"no file matches {pattern}; check the path, or make the data first")
        self.pieces = list(self._cut(paths, offset, offset + limit if limit else None))
        self.num_rows = sum(piece.num_rows for piece in self.pieces)
        if not self.num_rows:
            raise DataError(f"no row is left of {pattern} (offset {offset}, limit {limit})")

    def _cut(self, paths: Sequence[str], first: int, last: int | None) -> Iterator[Piece]:
        position = 0
        for path in paths:
            metadata = self._read_metadata(path)
            file_row = 0
            for index in range(metadata.num_row_groups):
                count = metadata.row_group(index).num_rows
                start = min(max(first - position, 0), count)
                stop = count if last is None else min(max(last - position, 0), count)
                if stop > start:
                    yield Piece(path, index, start, stop - start, file_row + start)
                position += count
                file_row += count

    def _read_metadata(self, path: str) -> Any:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise _broken(path, error) from error
        schema = file.schema_arrow
        for column in self.columns:
            if column not in schema.names:
                raise DataError(
                    f"{path} has no column {column!r}; it has {', '.join(schema.names) or 'none'}; "
                    f"needed are {', '.join(self.columns)}"
                )
            if not pa.types.is_integer(schema.field(column).type):
                raise DataError(
                    f"{path}: column {column!r} must hold integers, "
                    f"not {schema.field(column).type}; "
                    "names are turned into ids by projects/twhin/prepare.py"
                )
        # Kept: parsing a footer of thousands of row groups again for each of them takes longer than
        # reading the rows.
        self._metadata[path] = file.metadata
        return file.metadata

    def read(self, piece: Piece) -> Columns:
        """The columns of one piece as int64 arrays of its num_rows."""
        try:
            with pq.ParquetFile(piece.path, metadata=self._metadata[piece.path]) as file:
                table = file.read_row_group(piece.row_group, columns=list(self.columns))
        except (pa.ArrowException, OSError) as error:
            raise _broken(piece.path, error) from error
        table = table.slice(piece.start, piece.num_rows)
        return {name: self._to_numpy(table.column(name), name, piece) for name in self.columns}

    def _to_numpy(self, column: pa.ChunkedArray, name: str, piece: Piece) -> NDArray[np.int64]:
        if column.null_count:
            row = piece.file_row + int(np.argmax(column.is_null().to_numpy()))
            raise DataError(
                f"{piece.path}, row {row}: column {name!r} is null; every edge needs a value"
            )
        return np.asarray(column.to_numpy(), dtype=np.int64)


def read_columns(
    pattern: str,
    columns: Sequence[str],
    offset: int = 0,
    limit: int | None = None,
    check: Check | None = None,
) -> Columns:
    """All rows of the files that match `pattern`, in order: column name → int64 array (rows,).
    Raises DataError.
    """
    rows = ParquetRows(pattern, columns, offset, limit)
    return _read_pieces(rows, rows.pieces, check)


@dataclass(frozen=True)
class Position:
    """How far a job has read: the epoch, and the stretches of its order that are not read yet
    (None: all).
    """

    epoch: int = 0
    remaining: tuple[Interval, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object for meta.json."""
        remaining = None if self.remaining is None else [list(pair) for pair in self.remaining]
        return {"epoch": self.epoch, "remaining": remaining}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        remaining = tree["remaining"]
        if remaining is not None:
            remaining = tuple((int(start), int(stop)) for start, stop in remaining)
        return cls(int(tree["epoch"]), remaining)


@dataclass(frozen=True)
class ReadBatch:
    """Rows of one step of one process."""

    columns: Columns
    """(n,) each; n is batch_size but for the last batch of an epoch, where it may be less, even
    0.
    """
    num_rows_all: int
    """Rows of this step over all processes."""
    after: Position
    """Where the job stands once this step is done."""


class ShuffledReader:
    """Yields the batches of one process; see the module's docstring for the order."""

    def __init__(
        self,
        rows: ParquetRows,
        batch_size: int,
        num_epochs: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_rows: int = 1 << 20,
        check: Check | None = None,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.num_epochs = num_epochs
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._window_rows = window_rows
        self._check = check

    def steps_from(self, position: Position) -> int:
        """Steps from `position` to the end of the last epoch."""
        if position.epoch >= self.num_epochs:
            return 0
        remaining = self._remaining(position)
        whole_epochs = self.num_epochs - position.epoch - 1
        return self._steps(_length(remaining)) + whole_epochs * self._steps(self.rows.num_rows)

    def batches(self, position: Position) -> Iterator[ReadBatch]:
        """Batches from `position` to the end of the last epoch."""
        for epoch in range(position.epoch, self.num_epochs):
            remaining = self._remaining(position) if epoch == position.epoch else None
            yield from self._epoch(epoch, remaining or ((0, self.rows.num_rows),))

    def _epoch(self, epoch: int, remaining: tuple[Interval, ...]) -> Iterator[ReadBatch]:
        stretches = split_evenly(remaining, self._world_size)
        lengths = np.array([_length(stretch) for stretch in stretches])
        num_steps = self._steps(_length(remaining))
        batches = self._cut_batches(self._read_order(epoch, stretches[self._rank]))
        for step in range(1, num_steps + 1):
            columns = next(batches, None) or self._no_rows()
            read = np.minimum(step * self.batch_size, lengths)
            before = np.minimum((step - 1) * self.batch_size, lengths)
            if step == num_steps:
                after = Position(epoch + 1)
            else:
                left = [
                    _skip(stretch, int(count))
                    for stretch, count in zip(stretches, read, strict=True)
                ]
                after = Position(epoch, _join([pair for stretch in left for pair in stretch]))
            yield ReadBatch(columns, int((read - before).sum()), after)

    def _remaining(self, position: Position) -> tuple[Interval, ...]:
        whole = ((0, self.rows.num_rows),)
        if position.remaining is None:
            return whole
        if position.remaining and position.remaining[-1][1] > self.rows.num_rows:
            raise DataError(
                f"the checkpoint's data position reaches to row {position.remaining[-1][1]:,} but "
                f"{self.rows.pattern} has {self.rows.num_rows:,} rows (offset and limit "
                f"applied): the data "
                "has changed; start a new run, or bring back the data"
            )
        return position.remaining

    def _steps(self, num_rows: int) -> int:
        longest = -(-num_rows // self._world_size)
        return -(-longest // self.batch_size)

    def _read_order(self, epoch: int, stretch: Sequence[Interval]) -> Iterator[Columns]:
        """The rows of `stretch` of the epoch's order, window by window."""
        pieces = self.rows.pieces
        order = np.random.default_rng([self._seed, epoch]).permutation(len(pieces))
        start = 0
        for number, window in enumerate(self._windows([pieces[index] for index in order])):
            stop = start + sum(piece.num_rows for piece in window)
            wanted = [
                (max(a, start) - start, min(b, stop) - start)
                for a, b in stretch
                if a < stop and b > start
            ]
            if wanted:
                columns = _read_pieces(self.rows, window, self._check)
                mixed = np.random.default_rng([self._seed, epoch, number]).permutation(stop - start)
                chosen = np.concatenate([mixed[a:b] for a, b in wanted])
                yield {name: values[chosen] for name, values in columns.items()}
            start = stop

    def _windows(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        window: list[Piece] = []
        num_rows = 0
        for piece in pieces:
            window.append(piece)
            num_rows += piece.num_rows
            if num_rows >= self._window_rows:
                yield window
                window, num_rows = [], 0
        if window:
            yield window

    def _cut_batches(self, stream: Iterator[Columns]) -> Iterator[Columns]:
        """Batches of batch_size rows across the seams of `stream`, and what is left at its end."""
        held = self._no_rows()
        for columns in stream:
            if len(held[self.rows.columns[0]]):
                columns = {k: np.concatenate([held[k], values]) for k, values in columns.items()}
            num_rows = len(columns[self.rows.columns[0]])
            whole = num_rows - num_rows % self.batch_size
            for start in range(0, whole, self.batch_size):
                yield {k: values[start : start + self.batch_size] for k, values in columns.items()}
            held = {k: values[whole:] for k, values in columns.items()}
        if len(held[self.rows.columns[0]]):
            yield held

    def _no_rows(self) -> Columns:
        return {name: np.empty(0, dtype=np.int64) for name in self.rows.columns}


def split_evenly(intervals: Sequence[Interval], parts: int) -> list[tuple[Interval, ...]]:
    """Cut `intervals`, joined end to end, into `parts` stretches whose lengths differ by at most 1,
    longer ones first.
    """
    total = _length(intervals)
    rest = tuple(intervals)
    stretches = []
    for part in range(parts):
        count = total // parts + (part < total % parts)
        stretches.append(_take(rest, count))
        rest = _skip(rest, count)
    return stretches


def _take(intervals: Sequence[Interval], count: int) -> tuple[Interval, ...]:
    taken = []
    for start, stop in intervals:
        if count <= 0:
            break
        taken.append((start, min(stop, start + count)))
        count -= stop - start
    return tuple(taken)


def _skip(intervals: Sequence[Interval], count: int) -> tuple[Interval, ...]:
    left = []
    for start, stop in intervals:
        if stop - start > count:
            left.append((start + count, stop))
        count = max(0, count - (stop - start))
    return tuple(left)


def _join(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Neighbouring intervals as one."""
    joined: list[Interval] = []
    for start, stop in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _length(intervals: Sequence[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


def _read_pieces(rows: ParquetRows, pieces: Sequence[Piece], check: Check | None) -> Columns:
    read = []
    for piece in pieces:
        columns = rows.read(piece)
        if check is not None:
            check(columns, piece.path, piece.file_row)
        read.append(columns)
    return {name: np.concatenate([columns[name] for columns in read]) for name in rows.columns}


def _broken(path: str, error: Exception) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read: permission denied")
    size = Path(path).stat().st_size if Path(path).exists() else 0
    reason = " ".join(str(error).split())
    return DataError(
        f"{path} ({size:,} bytes) is not a complete parquet file, "
        f"it may be cut short; make it again. "
        f"Parquet says: {reason}"
    )
