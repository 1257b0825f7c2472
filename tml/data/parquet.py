"""Parquet → arrays: all of it (`read_columns`) or shuffled batches in bounded memory
(`ShuffledReader`).

What a column holds is said by its `Kind`: whole numbers, numbers, vectors (all rows of one width)
or lists (`Lists`).

Order of an epoch. The rows [offset, offset + limit) of the files, in order of their names, lie in
row groups. The row groups are put in random order and gathered into windows of about `window_rows`
rows; the rows of a window are put in random order. The result is one global order that depends on
(seed, epoch) alone, not on the number of processes. Where rows are grouped, those of a window that
have the same key follow each other, and the keys are in random order. Each process takes one
stretch of the order, the
stretches differ by at most one row, so every row is read once in an epoch, and a process reads
little more than its own share of the files.

Without shuffling, the order is that of the files.

One window is in memory at a time, once: a piece is copied into it as soon as it is read, and the
window is let go of before the next one is read.

A position is the list of stretches that no process has read yet. It can be taken up by any number
of processes.
"""

import glob
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Columns = dict[str, Any]
"""Name → array with a row an item, (n,) or (n, width), or `Lists`."""
Interval = tuple[int, int]
Rows = range | NDArray[np.integer[Any]]
"""Rows of a window, in the order in which they are read."""
Check = Callable[[Columns, str, int], None]
"""Called with columns, the file they are from and the number of their first row there; raises
DataError.
"""
GroupBy = Callable[[Columns, int], NDArray[np.int64]]
"""Called with the columns of a window and the epoch; returns a key for each row (n,). Rows of one
key follow each other.
"""


class DataError(ValueError):
    """Data that its owner has to mend; the message says which file, what and how."""


class RowError(ValueError):
    """A value that a `Kind` refuses; `row` counts from the first row that was given to it."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Lists:
    """n lists of numbers, end to end; rows are chosen as those of an array are."""

    values: NDArray[Any]  # (total,)
    offsets: NDArray[np.int64]  # (n + 1,) list i is values[offsets[i]:offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice | NDArray[Any]) -> "Lists":
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                stop = max(start, stop)
                offsets = self.offsets[start : stop + 1]
                return Lists(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        rows = np.arange(len(self))[rows]
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Lists(self.values[np.repeat(self.offsets[rows], lengths) + within], offsets)


@dataclass(frozen=True)
class Kind:
    """What a column holds, and how it becomes an array."""

    name: str
    """For messages: "integers"."""
    accepts: Callable[[pa.DataType], bool]
    decode: Callable[[pa.ChunkedArray], Any]
    """Column → array or Lists with as many rows; raises RowError."""
    remedy: str = "mend the column, or say otherwise what it holds"


@dataclass(frozen=True)
class Field:
    """A column of the files, and what is made of it."""

    column: str
    kind: Kind


def _is_boolean_or_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(_is_boolean_or_integer(kind) or pa.types.is_floating(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _to_integers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    if column.null_count:
        raise RowError(int(np.argmax(column.is_null().to_numpy())), "is null; a value is needed")
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _to_numbers(column: pa.ChunkedArray) -> NDArray[np.float32]:
    if column.null_count:  # null → NaN
        column = column.cast(pa.float64())
    return np.asarray(column.to_numpy(), dtype=np.float32)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _to_lists(column: pa.ChunkedArray) -> Lists:
    array = _joined(column)
    values = array.flatten()  # leaves out what belongs to nulls
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise RowError(_row_of(array, at), "holds a list with a null in it; leave it out")
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Lists(values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), offsets)


def _row_of(array: pa.Array, value: int) -> int:
    """Row of an array of lists that holds the value number `value`."""
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return int(np.searchsorted(np.cumsum(lengths), value, side="right"))


INTEGERS = Kind(
    "integers",
    lambda kind: bool(pa.types.is_integer(kind)),
    _to_integers,
    "names are turned into ids by projects/twhin/prepare.py",
)
"""(n,) int64; a null is refused."""
NUMBERS = Kind("numbers", _is_number, _to_numbers)
"""(n,) float32; null → NaN."""
INTEGER_LISTS = Kind(
    "lists of integers",
    lambda kind: _is_list(kind) and bool(pa.types.is_integer(kind.value_type)),
    _to_lists,
)
"""Lists of int64; null → the empty list, a null in a list is refused."""


def vectors(width: int) -> Kind:
    """Lists of numbers that all have `width`: (n, width) float32; null → a row of zeros."""

    def accepts(kind: pa.DataType) -> bool:
        if not (_is_list(kind) and _is_number(kind.value_type)):
            return False
        return not pa.types.is_fixed_size_list(kind) or kind.list_size == width

    def decode(column: pa.ChunkedArray) -> NDArray[np.float32]:
        array = _joined(column)
        present = array.is_valid().to_numpy(zero_copy_only=False)
        if not pa.types.is_fixed_size_list(array.type):
            lengths = array.value_lengths().fill_null(width).to_numpy(zero_copy_only=False)
            if (wrong := lengths != width).any():
                row = int(np.argmax(wrong))
                raise RowError(row, f"is a list of {lengths[row]}; lists of {width} are needed")
        values = array.flatten()  # leaves out what belongs to nulls
        if values.null_count:
            values = values.cast(pa.float64())
        numbers: NDArray[np.float32] = np.asarray(values, dtype=np.float32).reshape(-1, width)
        if present.all():
            return numbers
        whole = np.zeros((len(array), width), dtype=np.float32)
        whole[present] = numbers
        return whole

    return Kind(f"lists of {width} numbers", accepts, decode)


def concatenate(parts: Sequence[Any]) -> Any:
    """Arrays, or Lists, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    if not isinstance(parts[0], Lists):
        return np.concatenate(parts)
    ends = itertools.accumulate(part.offsets[-1] for part in parts)
    starts = itertools.chain([0], ends)
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Lists(
        np.concatenate([part.values for part in parts]),
        np.concatenate([[0], *offsets]).astype(np.int64),
    )


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
    """The rows [offset, offset + limit) of the files, as pieces of row groups.

    files: a glob, or the files' paths. columns: names of columns of integers, or name → Field.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        columns: Sequence[str] | Mapping[str, Field],
        offset: int = 0,
        limit: int | None = None,
    ) -> None:
        if not isinstance(columns, Mapping):
            columns = {name: Field(name, INTEGERS) for name in columns}
        self.fields = dict(columns)
        self.columns = tuple(self.fields)
        self.pattern = files if isinstance(files, str) else ", ".join(files)
        self._metadata: dict[str, Any] = {}
        self._types: dict[str, pa.DataType] = {}
        found = glob.glob(files, recursive=True) if isinstance(files, str) else files
        paths = sorted(found)
        if not paths:
            raise DataError(
                f"no file matches {self.pattern}; check the path, or make the data first"
            )
        self.pieces = list(self._cut(paths, offset, offset + limit if limit else None))
        self.num_rows = sum(piece.num_rows for piece in self.pieces)
        if not self.num_rows:
            raise DataError(f"no row is left of {self.pattern} (offset {offset}, limit {limit})")

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
        for field in self.fields.values():
            column, kind = field.column, field.kind
            if column not in schema.names:
                needed = dict.fromkeys(field.column for field in self.fields.values())
                raise DataError(
                    f"{path} has no column {column!r}; it has {', '.join(schema.names) or 'none'}; "
                    f"needed are {', '.join(needed)}"
                )
            self._types.setdefault(column, schema.field(column).type)
            if not kind.accepts(schema.field(column).type):
                raise DataError(
                    f"{path}: column {column!r} must hold {kind.name}, "
                    f"not {schema.field(column).type}; {kind.remedy}"
                )
        # Kept: parsing a footer of thousands of row groups again for each of them takes longer than
        # reading the rows.
        self._metadata[path] = file.metadata
        return file.metadata

    def read(self, piece: Piece) -> Columns:
        """The columns of one piece, each with its num_rows."""
        names = list(dict.fromkeys(field.column for field in self.fields.values()))
        try:
            with pq.ParquetFile(piece.path, metadata=self._metadata[piece.path]) as file:
                table = file.read_row_group(piece.row_group, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise _broken(piece.path, error) from error
        table = table.slice(piece.start, piece.num_rows)
        return {name: self._decode(table, field, piece) for name, field in self.fields.items()}

    def no_rows(self) -> Columns:
        """The columns without a row."""
        return {
            name: field.kind.decode(pa.chunked_array([], self._types[field.column]))
            for name, field in self.fields.items()
        }

    def _decode(self, table: pa.Table, field: Field, piece: Piece) -> Any:
        try:
            return field.kind.decode(table.column(field.column))
        except RowError as error:
            row = piece.file_row + error.row
            raise DataError(f"{piece.path}, row {row}: column {field.column!r} {error}") from error


def column_names(path: str) -> list[str]:
    """The columns of one file; raises DataError."""
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


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
    epoch: int
    """That which the rows belong to, from 0 on."""


class Reader(Protocol):
    """What yields the batches of one process: a ShuffledReader, or one that stands for it."""

    @property
    def num_rows(self) -> int:
        """Rows of all processes in an epoch."""
        ...

    def steps_from(self, position: Position) -> int:
        """Steps from `position` to the end of the last epoch."""
        ...

    def batches(self, position: Position) -> Iterator[ReadBatch]:
        """Batches from `position` to the end of the last epoch."""
        ...


class ShuffledReader:
    """Yields the batches of one process; see the module's docstring for the order.

    num_epochs: None goes on without end. min_rows: a step in which some process would have fewer
    rows than these, which can only be the last of an epoch, is left out. shuffle: False keeps the
    order of the files. group_by: rows of one key follow each other; None: all are mixed. hold_as:
    what the numbers of a window are kept as, such as int32 where `check` refuses all that do not
    fit; those of a batch are int64 again.
    """

    def __init__(
        self,
        rows: ParquetRows,
        batch_size: int,
        num_epochs: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_rows: int = 1 << 20,
        check: Check | None = None,
        *,
        min_rows: int = 0,
        shuffle: bool = True,
        group_by: GroupBy | None = None,
        hold_as: type[np.integer[Any]] | None = None,
    ) -> None:
        assert hold_as is None or check is not None
        assert min_rows <= batch_size
        assert shuffle or group_by is None
        self.rows = rows
        self.batch_size = batch_size
        self.num_epochs = num_epochs
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._window_rows = window_rows
        self._check = check
        self._min_rows = min_rows
        self._shuffle = shuffle
        self._group_by = group_by
        self._hold_as = hold_as
        if not self._steps(rows.num_rows):
            raise DataError(
                f"{rows.pattern} has {rows.num_rows:,} rows, too few for a step of {world_size} "
                f"processes with at least {min_rows} each"
            )

    @property
    def num_rows(self) -> int:
        """Rows of all processes in an epoch."""
        return self.rows.num_rows

    def steps_from(self, position: Position) -> int:
        """Steps from `position` to the end of the last epoch, where there is a last."""
        assert self.num_epochs is not None
        if position.epoch >= self.num_epochs:
            return 0
        remaining = self._remaining(position)
        whole_epochs = self.num_epochs - position.epoch - 1
        return self._steps(_length(remaining)) + whole_epochs * self._steps(self.rows.num_rows)

    def batches(self, position: Position) -> Iterator[ReadBatch]:
        """Batches from `position` to the end of the last epoch."""
        for epoch in itertools.count(position.epoch):
            if self.num_epochs is not None and epoch >= self.num_epochs:
                break
            remaining = self._remaining(position) if epoch == position.epoch else None
            yield from self._epoch(epoch, remaining or ((0, self.rows.num_rows),))

    def _epoch(self, epoch: int, remaining: tuple[Interval, ...]) -> Iterator[ReadBatch]:
        stretches = split_evenly(remaining, self._world_size)
        lengths = np.array([_length(stretch) for stretch in stretches])
        num_steps = self._steps(_length(remaining))
        batches = self._cut_batches(self._read_order(epoch, stretches[self._rank]))
        for step in range(1, num_steps + 1):
            columns = next(batches, None) or self.rows.no_rows()
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
            yield ReadBatch(columns, int((read - before).sum()), after, epoch)

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
        steps = -(-longest // self.batch_size)
        least = num_rows // self._world_size - (steps - 1) * self.batch_size  # of the last step
        return steps - (steps > 0 and least < self._min_rows)

    def _read_order(
        self, epoch: int, stretch: Sequence[Interval]
    ) -> Iterator[tuple[Columns, Rows]]:
        """The windows that hold `stretch` of the epoch's order, and which of their rows those
        are.
        """
        pieces = self.rows.pieces
        order = np.arange(len(pieces))
        if self._shuffle:
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
                columns = _read_pieces(self.rows, window, self._check, self._hold_as)
                keys = None if self._group_by is None else self._group_by(columns, epoch)
                chosen = self._choose(wanted, stop - start, [self._seed, epoch, number], keys)
                yield columns, chosen
                del columns, chosen, keys  # before the next window is read
            start = stop

    def _choose(
        self,
        wanted: Sequence[Interval],
        num_rows: int,
        seeds: list[int],
        keys: NDArray[np.int64] | None,
    ) -> Rows:
        """Which rows of a window of `num_rows` are read, in their order."""
        if not self._shuffle and len(wanted) == 1:
            return range(*wanted[0])  # no copy
        small = num_rows <= np.iinfo(np.int32).max
        order: NDArray[Any] = np.arange(num_rows, dtype=np.int32 if small else np.int64)
        if self._shuffle:
            generator = np.random.default_rng(seeds)
            generator.shuffle(order)
            if keys is not None:
                order = _group(order, keys, generator)
        return order if wanted == [(0, num_rows)] else concatenate([order[a:b] for a, b in wanted])

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

    def _cut_batches(self, stream: Iterator[tuple[Columns, Rows]]) -> Iterator[Columns]:
        """Batches of batch_size rows across the seams of `stream`, and what is left at its end.

        Rows are copied once, batch by batch: a shuffled copy of a whole window would take its
        memory twice.
        """
        parts: list[Columns] = []
        num_rows = 0
        for columns, chosen in stream:
            start = 0
            while start < len(chosen):
                stop = min(start + self.batch_size - num_rows, len(chosen))
                parts.append(self._take(columns, chosen[start:stop]))
                num_rows += stop - start
                start = stop
                if num_rows == self.batch_size:
                    yield _join_columns(parts)
                    parts, num_rows = [], 0
            del columns, chosen  # before the next window is read
        if parts:
            yield _join_columns(parts)

    def _take(self, columns: Columns, part: Rows) -> Columns:
        """Some rows of a window, for a batch."""
        rows = slice(part.start, part.stop) if isinstance(part, range) else part
        taken = {name: values[rows] for name, values in columns.items()}
        if self._hold_as is None:
            return taken
        return {name: _held_as(values, np.int64) for name, values in taken.items()}


def _group(
    order: NDArray[Any], keys: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[Any]:
    """`order` rearranged so that rows of one key follow each other, the keys in random order."""
    distinct, number = np.unique(keys[order], return_inverse=True)
    place = generator.permutation(len(distinct))
    return order[np.argsort(place[number], kind="stable")]


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


def _read_pieces(
    rows: ParquetRows,
    pieces: Sequence[Piece],
    check: Check | None,
    hold_as: type[np.integer[Any]] | None = None,
) -> Columns:
    """The columns of all pieces, each piece copied as soon as it is read; see `ShuffledReader`."""
    num_rows = sum(piece.num_rows for piece in pieces)
    whole: Columns = {}
    lists: dict[str, list[Lists]] = {}
    start = 0
    for piece in pieces:
        columns = rows.read(piece)
        if check is not None:
            check(columns, piece.path, piece.file_row)
        if hold_as is not None:
            columns = {name: _held_as(values, hold_as) for name, values in columns.items()}
        if len(pieces) == 1:
            return columns
        for name, values in columns.items():
            if isinstance(values, Lists):
                lists.setdefault(name, []).append(values)
                whole[name] = None  # keeps its place
                continue
            if name not in whole:
                whole[name] = np.empty((num_rows, *values.shape[1:]), values.dtype)
            whole[name][start : start + len(values)] = values
        start += piece.num_rows
    return whole | {name: concatenate(parts) for name, parts in lists.items()}


def _held_as(values: Any, kind: type[np.integer[Any]]) -> Any:
    """Whole numbers as another type; everything else as it is."""
    is_integer = isinstance(values, np.ndarray) and values.dtype.kind == "i"
    return values.astype(kind, copy=False) if is_integer else values


def _join_columns(parts: Sequence[Columns]) -> Columns:
    return {name: concatenate([columns[name] for columns in parts]) for name in parts[0]}


def _broken(path: str, error: Exception) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read: permission denied")
    size = Path(path).stat().st_size if Path(path).exists() else 0
    reason = " ".join(str(error).split())
    return DataError(
        f"{path} ({size:,} bytes) is not a complete parquet file: it is of another kind, or cut "
        f"short; name parquet files (a project's prepare.py writes them), or make it again. "
        f"Parquet says: {reason}"
    )
