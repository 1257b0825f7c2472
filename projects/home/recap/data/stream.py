"""TFRecord files → batches of one process in an order that can be taken up again: `RecordStream`.

Order. An epoch's files, in an order that depends on (seed, epoch), are dealt out to the processes;
where there are fewer files than processes, every process reads all files and takes the records
whose number modulo the number of processes is its own. So every record is read once in an epoch. A
process keeps some files open and takes turns between them; the rows so gathered form a window, and
are mixed by an order that depends on (seed, epoch, process, window). Batches are cut from the
windows, across the seams of windows and of epochs.

A position (`StreamPosition`) is where the files stood at the beginning of a window, and how many
rows of the window were given out. Going on from there yields the batches of the unbroken run, bit
by bit; for that the window is read again, and GZIP files, which cannot be entered in the middle,
are inflated up to their place. `join_positions` makes the positions of as many processes as there
were into those of another number: what is left of each file at the windows' beginnings is dealt out
anew, so at most one window of each former process is read twice.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from projects.home.recap.data.batch import RankingBatch
from projects.home.recap.data.preprocess import concatenate, scatter
from tml.data.parquet import DataError
from tml.data.prefetch import prefetch
from tml.data.tfrecord import Block, OnFault, TFRecordReader
from tml.distributed import Job

logger = logging.getLogger(__name__)

BLOCK_ROWS = 256
"""Records that are decoded at once, and rows of a window where nothing is mixed."""
NUM_NAMED = 20
"""Bad records that are named in warnings; the others are counted."""

ToRows = Callable[[Block, OnFault | None], RankingBatch]


class Piece(NamedTuple):
    """The records of one file, from `first` on, whose number modulo `parts` is `part`."""

    file: int
    """Number of the file, in order of names."""
    first: int = 0
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class StreamPosition:
    """How far one process has read."""

    files: str
    """Number and fingerprint of the files, so that other ones are noticed."""
    epoch: int = 0
    window: int = 0
    """Number of the window in the epoch."""
    opened: tuple[Piece, ...] = ()
    """What is left of the files that were open when the window began."""
    next: int = 0
    """Pieces of the epoch that were opened before the window."""
    taken: int = 0
    """Rows of the window that are read."""
    rest: tuple[tuple[Piece, ...], ...] = ()
    """Pieces of this epoch and those after it, where they are not the usual ones because the number
    of processes has changed.
    """

    def to_json(self) -> dict[str, Any]:
        """A JSON object for meta.json; some hundred bytes, more only in an epoch in which the
        number of processes changed.
        """
        return {
            "files": self.files,
            "epoch": self.epoch,
            "window": self.window,
            "opened": [list(piece) for piece in self.opened],
            "next": self.next,
            "taken": self.taken,
            "rest": [[list(piece) for piece in pieces] for pieces in self.rest],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            files=str(tree["files"]),
            epoch=int(tree["epoch"]),
            window=int(tree["window"]),
            opened=tuple(Piece(*piece) for piece in tree["opened"]),
            next=int(tree["next"]),
            taken=int(tree["taken"]),
            rest=tuple(tuple(Piece(*piece) for piece in pieces) for pieces in tree["rest"]),
        )


@dataclass(frozen=True)
class _Window:
    rows: RankingBatch
    at: StreamPosition
    """Where the window began."""
    after: StreamPosition
    """Where the next one begins."""


class RecordStream:
    """The rows of this process.

    window_rows: rows that are mixed. interleave: files open at once. threads: that inflate and
    decode; with several, the next window is read while one is given out. num_epochs: None goes on
    without end. shuffle: training; the last batch is dropped where it is not full. Otherwise all
    rows in order of files and records. skip_faults: bad records are counted in `errors`, named and
    left out.
    """

    def __init__(
        self,
        paths: Sequence[str],
        to_rows: ToRows,
        job: Job,
        seed: int,
        batch_rows: int,
        *,
        num_epochs: int | None,
        shuffle: bool,
        window_rows: int = 1024,
        interleave: int = 4,
        threads: int = 1,
        skip_faults: bool = False,
    ) -> None:
        self.errors: Counter[str] = Counter()
        """What was wrong → how often, with skip_faults."""
        self._paths = sorted(paths)
        self._files = _fingerprint(self._paths)
        self._to_rows, self._job, self._seed = to_rows, job, seed
        self._batch_rows, self._num_epochs, self._shuffle = batch_rows, num_epochs, shuffle
        self._mixes = shuffle and window_rows > 0
        self._interleave = interleave if shuffle else 1
        self._window_rows = window_rows if self._mixes else BLOCK_ROWS * self._interleave
        self._threads = threads
        self._skip_faults = skip_faults
        self._lock = Lock()
        self._buffers: list[NDArray[np.uint8]] = []  # of files that were read

    def start(self) -> StreamPosition:
        """Before the first row."""
        return StreamPosition(self._files)

    def resume(self, trees: Sequence[dict[str, Any]]) -> StreamPosition:
        """This process's position from those of all processes that saved. Raises DataError where
        the files are not those of that time.
        """
        positions = [StreamPosition.from_json(tree) for tree in trees]
        for position in positions:
            if position.files != self._files:
                raise DataError(
                    f"the data has changed since the checkpoint: its files were "
                    f"{_describe(position.files)}, now they are {_describe(self._files)} (of "
                    f"names and sizes), the first is {self._paths[0]}; bring those files back, or "
                    "start a new run from the checkpoint (training.initial_checkpoint_dir)"
                )
        rank, world_size = self._job.rank, self._job.world_size
        if len(positions) != world_size and rank == 0:
            logger.warning(
                "%d processes go on from the data positions of %d: the files are dealt out anew "
                "from the beginnings of their windows; up to %d rows of each former process are "
                "read twice",
                world_size,
                len(positions),
                self._window_rows,
            )
        return join_positions(positions, rank, world_size, self._pieces)

    def batches(self, position: StreamPosition) -> Iterator[tuple[RankingBatch, StreamPosition]]:
        """Batches from `position`, each with the position behind it."""
        held: list[RankingBatch] = []
        missing = self._batch_rows
        end = position
        with ExitStack() as stack:
            for window in self._enter_windows(position, stack):
                taken = position.taken if window.at == replace(position, taken=0) else 0
                while len(window.rows) - taken >= missing:
                    held.append(window.rows.slice(taken, taken + missing))
                    taken += missing
                    whole = taken == len(window.rows)
                    end = window.after if whole else replace(window.at, taken=taken)
                    yield concatenate(held), end
                    held, missing = [], self._batch_rows
                if taken < len(window.rows):
                    held.append(window.rows.slice(taken, len(window.rows)))
                    missing -= len(held[-1])
                end = window.after
        if held and not self._shuffle:
            yield concatenate(held), end

    # Windows

    def _enter_windows(self, position: StreamPosition, stack: ExitStack) -> Iterator[_Window]:
        """The windows from `position` on; threads and files are given back with `stack`."""
        files: list[_OpenFile] = []
        stack.callback(_close_all, files)
        if self._threads == 1:
            return self._windows(position, files, None)
        pool = stack.enter_context(ThreadPoolExecutor(self._threads, "read"))
        return stack.enter_context(prefetch(self._windows(position, files, pool), depth=1))

    def _windows(
        self, position: StreamPosition, files: "list[_OpenFile]", pool: Executor | None
    ) -> Iterator[_Window]:
        while self._num_epochs is None or position.epoch < self._num_epochs:
            # Of an epoch that is entered in the middle it is not known what it holds.
            found = position.window > 0 or bool(position.rest)
            for window in self._epoch(position, files, pool):
                found = True
                yield window
            if not found and self._num_epochs is None:
                raise DataError(
                    f"process {self._job.rank} of {self._job.world_size} found no record in a "
                    f"whole epoch of {len(self._paths)} files, the first is {self._paths[0]}; give "
                    "the run more data, or fewer processes"
                )
            position = self._next_epoch(position)

    def _epoch(
        self, position: StreamPosition, files: "list[_OpenFile]", pool: Executor | None
    ) -> Iterator[_Window]:
        """The windows from `position` to the end of its epoch."""
        at = replace(position, taken=0)
        pieces = at.rest[0] if at.rest else self._pieces(at.epoch, *self._place)
        files[:] = [self._open(piece) for piece in at.opened]
        finished = not files and at.next == len(pieces)
        while not finished:
            rows, num_opened = self._gather(files, pieces, at.next, pool)
            finished = not files and num_opened == len(pieces)
            after = self._next_epoch(at)
            if not finished:
                opened = tuple(file.piece for file in files)
                after = replace(at, window=at.window + 1, opened=opened, next=num_opened)
            if rows:
                yield _Window(self._mix(rows, at), at, after)
            at = after

    def _gather(
        self,
        files: "list[_OpenFile]",
        pieces: Sequence[Piece],
        next_piece: int,
        pool: Executor | None,
    ) -> tuple[list[RankingBatch], int]:
        """The rows of one window, from `files` in turns, which are replaced by the next pieces when
        they end; and the number of the piece that comes then.
        """
        gathered: list[RankingBatch] = []
        missing = self._window_rows
        while missing:
            while len(files) < self._interleave and next_piece < len(pieces):
                files.append(self._open(pieces[next_piece]))
                next_piece += 1
            if not files:
                break
            shares = [missing // len(files) + (i < missing % len(files)) for i in range(len(files))]
            read = (pool.map if pool else map)(_OpenFile.read, list(files), shares)
            for rows in read:
                gathered += rows
                missing -= sum(map(len, rows))
            files[:] = [file for file in files if not file.finished]
        return gathered, next_piece

    def _mix(self, rows: list[RankingBatch], at: StreamPosition) -> RankingBatch:
        if not self._mixes:
            return concatenate(rows)
        rank, world_size = self._place
        key = [self._seed, at.epoch, world_size, rank, at.window]
        places = np.random.default_rng(key).permutation(sum(map(len, rows)))
        return scatter(rows, torch.from_numpy(places))

    @property
    def _place(self) -> tuple[int, int]:
        return self._job.rank, self._job.world_size

    def _pieces(self, epoch: int, rank: int, world_size: int) -> tuple[Piece, ...]:
        """What one process reads in an epoch from its beginning."""
        order = np.arange(len(self._paths))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        return deal([Piece(int(file)) for file in order], rank, world_size)

    def _next_epoch(self, position: StreamPosition) -> StreamPosition:
        return StreamPosition(position.files, position.epoch + 1, rest=position.rest[1:])

    def _open(self, piece: Piece) -> "_OpenFile":
        on_fault = self._count_fault if self._skip_faults else None
        return _OpenFile(self._paths[piece.file], piece, self._to_rows, on_fault, self._buffers)

    def _count_fault(self, kind: str, message: str) -> None:
        with self._lock:
            self.errors[kind] += 1
            count = sum(self.errors.values())
        if count <= NUM_NAMED:
            last = "; further ones are only counted" if count == NUM_NAMED else ""
            logger.warning("left out: %s%s", message, last)


class _OpenFile:
    """A piece that is being read."""

    def __init__(
        self,
        path: str,
        piece: Piece,
        to_rows: ToRows,
        on_fault: OnFault | None,
        buffers: list[NDArray[np.uint8]],
    ) -> None:
        self.finished = False
        self._piece, self._to_rows, self._on_fault = piece, to_rows, on_fault
        self._buffers = buffers
        self._reader = TFRecordReader(
            path,
            first=piece.first,
            part=piece.part,
            parts=piece.parts,
            on_fault=on_fault,
            buffer=buffers.pop() if buffers else None,
        )

    @property
    def piece(self) -> Piece:
        """What is left."""
        return self._piece._replace(first=max(self._piece.first, self._reader.next_record))

    def read(self, count: int) -> list[RankingBatch]:
        """The next `count` rows; fewer at the end of the file."""
        batches = []
        while count:
            block = self._reader.read(min(count, BLOCK_ROWS))
            if block is None:
                self.finished = True
                self._reader.close()
                self._buffers.append(self._reader.buffer)
                break
            rows = self._to_rows(block, self._on_fault) if len(block) else ()
            if isinstance(rows, RankingBatch) and len(rows):
                batches.append(rows)
                count -= len(rows)
        return batches

    def close(self) -> None:
        """Give the file back."""
        self._reader.close()


def _close_all(files: list[_OpenFile]) -> None:
    for file in files:
        file.close()


def deal(pieces: Sequence[Piece], rank: int, world_size: int) -> tuple[Piece, ...]:
    """One process's share: every world_size-th piece, or, where there are fewer pieces than
    processes, its part of each.
    """
    if len(pieces) >= world_size:
        return tuple(pieces[rank::world_size])
    return tuple(
        Piece(file, first, part + parts * rank, parts * world_size)
        for file, first, part, parts in pieces
    )


def join_positions(
    positions: Sequence[StreamPosition],
    rank: int,
    world_size: int,
    pieces: Callable[[int, int, int], tuple[Piece, ...]],
) -> StreamPosition:
    """The position of process `rank` of `world_size` from those of all processes that saved.

    pieces: (epoch, rank, world_size) → what a process reads in an epoch from its beginning.
    """
    former = len(positions)
    if former == world_size:
        return positions[rank]
    first = min(position.epoch for position in positions)
    last = max(position.epoch + max(len(position.rest) - 1, 0) for position in positions)
    rest = []
    for epoch in range(first, last + 1):
        left: list[Piece] = []
        for number, position in enumerate(positions):
            if position.epoch > epoch:
                continue
            ahead = epoch - position.epoch
            usual = ahead >= len(position.rest)
            own = pieces(epoch, number, former) if usual else position.rest[ahead]
            left += own if ahead else (*position.opened, *own[position.next :])
        rest.append(deal(left, rank, world_size))
    return StreamPosition(positions[0].files, first, rest=tuple(rest))


def _fingerprint(paths: Sequence[str]) -> str:
    """Number of files, and a hash of their names below their common folder and of their sizes."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    lines = [f"{os.path.relpath(path, folder)} {os.path.getsize(path)}" for path in paths]
    return f"{len(paths)}:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def _describe(files: str) -> str:
    count, _, digest = files.partition(":")
    return f"{count} of fingerprint {digest}"
