"""Edges → batches: reader, checks, and the layout in which the model scores them.

`to_batch` is a pure function of (edges, step, rank, seed): the negatives of a step are drawn from a
generator made of those numbers, so a run that is taken up again draws the same ones. A batch is a
list of groups, the edges of one pair of tables, sorted by relation; a group's ids and those of its
negatives are looked up in one go per table.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.twhin.config import SIDES, DataConfig, ModelConfig, Side
from projects.twhin.negatives import NegativeSampler
from tml.data.parquet import Columns, DataError, ParquetRows, Position, Reader, ShuffledReader
from tml.distributed import Job

COLUMNS = ("lhs", "rel", "rhs")
VALIDATION_STEP = 1 << 40
"""Steps of validation start here, so that their negatives are not those of a training step."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """The n edges of a batch whose relations join one pair of tables, sorted by relation.

    Chunk c of the group, edges [c·C, (c + 1)·C), shares the negatives of row c.
    """

    lhs_table: str
    rhs_table: str
    relation: Tensor  # (n,)
    lhs: Tensor  # (n,) rows of lhs_table
    rhs: Tensor  # (n,) rows of rhs_table
    lhs_negatives: Tensor  # (chunks, K) rows of lhs_table
    rhs_negatives: Tensor  # (chunks, K) rows of rhs_table
    lhs_log_counts: Tensor | None = None  # (chunks, K) logs of how often they are expected
    rhs_log_counts: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The group on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def lookups(self) -> list[tuple[str, Tensor]]:
        """(table, ids) of each set of vectors that the scores need: lhs, rhs, lhs and rhs
        negatives.
        """
        return [
            (self.lhs_table, self.lhs),
            (self.rhs_table, self.rhs),
            (self.lhs_table, self.lhs_negatives.flatten()),
            (self.rhs_table, self.rhs_negatives.flatten()),
        ]


@dataclass(frozen=True)
class EdgeBatch:
    """The edges of one step of one process."""

    groups: tuple[Group, ...]
    num_edges_all: int
    """Edges of this step over all processes: what the loss is divided by."""
    sides: tuple[Side, ...] = SIDES
    """Those that are asked for."""

    def to(self, device: torch.device) -> Self:
        """The batch on `device`."""
        groups = tuple(group.to(device) for group in self.groups)
        return dataclasses.replace(self, groups=groups)

    def ids(self, tables: Sequence[str]) -> dict[str, Tensor]:
        """Table → ids of all groups' lookups, one behind the other; empty for a table that the
        batch does not touch.
        """
        found: dict[str, list[Tensor]] = {table: [] for table in tables}
        for group in self.groups:
            for table, ids in group.lookups():
                found[table].append(ids)
        return {
            table: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            for table, parts in found.items()
        }


class EdgeLayout:
    """What the relations say about edges: which tables they join, and how many rows those have."""

    def __init__(self, model: ModelConfig) -> None:
        self.relations = model.relations
        self.num_rows = {table.name: table.num_embeddings for table in model.embeddings.tables}
        pairs = [(relation.lhs, relation.rhs) for relation in model.relations]
        self.pairs = list(dict.fromkeys(pairs))
        self.pair_of = np.array([self.pairs.index(pair) for pair in pairs])
        self.sampling_rates = np.array([relation.sampling_rate for relation in model.relations])
        softmax = model.loss.softmax
        self.corrects = softmax is not None and softmax.log_q
        self._samplers: dict[tuple[int, int, float], NegativeSampler] = {}
        self._degrees: dict[tuple[int, int], Ints] = {}
        self._lhs_rows = np.array([self.num_rows[relation.lhs] for relation in model.relations])
        self._rhs_rows = np.array([self.num_rows[relation.rhs] for relation in model.relations])

    def count_degrees(self, config: DataConfig) -> None:
        """Count each entity's edges of `config`, by pair of tables and side, where negatives are
        drawn by them.
        """
        if not config.degree_power or not config.global_negatives:
            return
        rows = ParquetRows(config.data_root, COLUMNS, config.offset, config.limit)
        for number, tables in enumerate(self.pairs):
            for side in (0, 1):
                self._degrees[number, side] = np.zeros(self.num_rows[tables[side]], np.int64)
        for piece in rows.pieces:
            columns = rows.read(piece)
            self.check(columns, piece.path, piece.file_row)
            pair = self.pair_of[columns["rel"]]
            for (number, side), degrees in self._degrees.items():
                ids = columns[("lhs", "rhs")[side]][pair == number]
                degrees += np.bincount(ids, minlength=len(degrees))

    def sampler(self, pair: int, side: int, power: float) -> NegativeSampler:
        """What draws the negatives of one side (0 or 1) of a pair of tables."""
        key = (pair, side, power)
        if key not in self._samplers:
            table = self.pairs[pair][side]
            degrees = self._degrees.get((pair, side))
            self._samplers[key] = NegativeSampler(self.num_rows[table], degrees, power)
        return self._samplers[key]

    def smallest_type(self) -> type[np.int32 | np.int64]:
        """The smallest type that holds every id."""
        largest = max(len(self.relations), *self.num_rows.values())
        return np.int32 if largest <= np.iinfo(np.int32).max else np.int64

    def check(self, columns: Columns, path: str, first_row: int) -> None:
        """Refuse ids out of range; they would be read as another entity's row, or crash."""
        relation = columns["rel"]
        names = ", ".join(f"{i} {r.name}" for i, r in list(enumerate(self.relations))[:12])
        _check_range(
            relation, len(self.relations), path, first_row, "rel", f"relations are {names}"
        )
        for side, rows in (("lhs", self._lhs_rows), ("rhs", self._rhs_rows)):
            limits = rows[relation]
            values = columns[side]
            if (bad := (values < 0) | (values >= limits)).any():
                at = int(np.argmax(bad))
                found = self.relations[int(relation[at])]
                table = getattr(found, side)
                raise DataError(
                    f"{path}, row {first_row + at}: {side} {values[at]} of relation {found.name!r} "
                    f"is out of range: table {table!r} has {limits[at]} rows "
                    f"(ids 0 to {limits[at] - 1}); "
                    "set its num_embeddings, or prepare the data again"
                )


def build_reader(
    config: DataConfig, layout: EdgeLayout, job: Job, seed: int, num_epochs: int, micro_batches: int
) -> ShuffledReader:
    """The reader of this process; a batch is `micro_batches` times per_replica_batch_size edges."""
    rows = ParquetRows(config.data_root, COLUMNS, config.offset, config.limit)
    return ShuffledReader(
        rows,
        config.per_replica_batch_size * micro_batches,
        num_epochs,
        seed,
        job.rank,
        job.world_size,
        config.shuffle_rows,
        layout.check,
        group_by=partial(_questions, layout, config) if config.grouped else None,
        hold_as=layout.smallest_type(),
    )


def _questions(layout: EdgeLayout, config: DataConfig, columns: Columns, epoch: int) -> Ints:
    """A key of each edge's question in `epoch`: the relation and the entity that asks."""
    (side,) = config.sides(epoch)
    asking = columns["lhs" if side == "rhs" else "rhs"]
    keys: Ints = asking.astype(np.int64) * len(layout.relations) + columns["rel"]
    return keys


def read_batches(
    reader: Reader,
    layout: EdgeLayout,
    config: DataConfig,
    job: Job,
    seed: int,
    position: Position,
    first_step: int,
) -> Iterator[tuple[EdgeBatch, Position]]:
    """Batches from `position`, each with the position behind it; the first is the batch of step
    `first_step`.
    """
    for step, read in enumerate(reader.batches(position), start=first_step):
        generator = np.random.default_rng([seed, step, job.rank])
        rows_all = read.num_rows_all
        batch = to_batch(read.columns, layout, config, generator, rows_all, read.epoch)
        yield batch, read.after


def to_batch(
    columns: Columns,
    layout: EdgeLayout,
    config: DataConfig,
    generator: np.random.Generator,
    num_edges_all: int,
    epoch: int = 0,
) -> EdgeBatch:
    """Arrays lhs, rel, rhs of (n,) → groups by pair of tables, with drawn negatives for each side
    and chunk. Relations of a sampling rate below 1 lose edges first.
    """
    columns = _sample(columns, layout, generator)
    sides = config.sides(epoch)
    relation = columns["rel"]
    order = np.lexsort((relation, layout.pair_of[relation]))
    lhs, relation, rhs = columns["lhs"][order], relation[order], columns["rhs"][order]
    pair = layout.pair_of[relation]
    groups = []
    for number in np.unique(pair):
        start, stop = np.searchsorted(pair, [number, number + 1])
        lhs_table, rhs_table = layout.pairs[number]
        chunks = -(-(stop - start) // config.chunk_size)
        samplers = [layout.sampler(int(number), side, config.degree_power) for side in (0, 1)]
        negatives = [
            sampler.draw(generator, (chunks, config.global_negatives if side in sides else 0))
            for sampler, side in zip(samplers, SIDES, strict=True)
        ]
        log_counts: list[Tensor | None] = [None, None]
        if layout.corrects:
            log_counts = [
                torch.from_numpy(sampler.log_counts(drawn, config.global_negatives))
                for sampler, drawn in zip(samplers, negatives, strict=True)
            ]
        groups.append(
            Group(
                lhs_table,
                rhs_table,
                torch.from_numpy(relation[start:stop]),
                torch.from_numpy(lhs[start:stop]),
                torch.from_numpy(rhs[start:stop]),
                torch.from_numpy(negatives[0]),
                torch.from_numpy(negatives[1]),
                *log_counts,
            )
        )
    return EdgeBatch(tuple(groups), num_edges_all, sides)


def _sample(columns: Columns, layout: EdgeLayout, generator: np.random.Generator) -> Columns:
    """Each edge with its relation's sampling rate."""
    if (layout.sampling_rates == 1).all():
        return columns
    kept = generator.random(len(columns["rel"])) < layout.sampling_rates[columns["rel"]]
    return {name: values[kept] for name, values in columns.items()}


def _check_range(
    values: Ints, limit: int, path: str, first_row: int, column: str, remedy: str
) -> None:
    bad = (values < 0) | (values >= limit)
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(
            f"{path}, row {first_row + at}: {column} {values[at]} is out of range "
            f"0 to {limit - 1}; {remedy}"
        )
