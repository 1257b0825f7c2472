"""Training edges read here or by a data set worker: `training_reader`, and `serve`, the worker.

What travels are the columns lhs, rel, rhs of a step of one process; the trainer draws the
negatives.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa
import torch

from projects.twhin.config import TwhinConfig
from projects.twhin.data import COLUMNS, EdgeLayout, build_reader
from tml import logs
from tml.data.parquet import Position, ReadBatch, Reader, ShuffledReader
from tml.distributed import Job
from tml.machines import environment

if TYPE_CHECKING:  # a run that reads its own edges does without
    from tml.data.flight import Batch, Remote


def training_reader(config: TwhinConfig, layout: EdgeLayout, job: Job) -> Reader:
    """The reader of the edges that this process trains on: from a data set worker where the job has
    any, else from the files.
    """
    if environment.get(environment.TML_DATASETWORKERS):
        from tml.data import flight

        if workers := flight.addresses():
            remote = flight.Remote(workers, job.rank, job.world_size, _settings(config))
            return ServedReader(remote)
    return _read_here(config, layout, job.rank, job.world_size)


def serve(config: TwhinConfig) -> NoReturn:
    """Be the data set worker of the job that trains `config`, until a signal comes."""
    from tml.data import flight

    logs.set_up(0)
    torch.set_num_threads(1)
    layout = EdgeLayout(config.model)
    flight.serve(
        lambda rank, world_size: _Served(_read_here(config, layout, rank, world_size)),
        lambda: _settings(config),
    )


class ServedReader:
    """Edges that a data set worker reads."""

    def __init__(self, remote: "Remote") -> None:
        self._remote = remote
        assert remote.num_rows is not None
        self.num_rows = remote.num_rows

    def steps_from(self, position: Position) -> int:
        """See Reader."""
        steps = self._remote.steps_from(position.to_json())
        assert steps is not None
        return steps

    def batches(self, position: Position) -> Iterator[ReadBatch]:
        """See Reader."""
        for rows, message in self._remote.batches(position.to_json()):
            columns = {name: np.asarray(rows.column(name)) for name in COLUMNS}
            after = Position.from_json(message["after"])
            yield ReadBatch(columns, message["rows_all"], after, message["epoch"])


class _Served:
    """A reader as the worker serves it."""

    num_errors = 0

    def __init__(self, reader: ShuffledReader) -> None:
        self._reader = reader
        self.num_rows: int | None = reader.num_rows

    def start(self) -> Any:
        return Position().to_json()

    def resume(self, positions: list[Any]) -> Any:
        return positions[0]  # that of the whole job

    def steps_from(self, position: Any) -> int | None:
        return self._reader.steps_from(Position.from_json(position))

    def batches(self, position: Any) -> Iterator["Batch"]:
        for read in self._reader.batches(Position.from_json(position)):
            rows = pa.record_batch({name: pa.array(read.columns[name]) for name in COLUMNS})
            yield (
                rows,
                {
                    "after": read.after.to_json(),
                    "rows_all": read.num_rows_all,
                    "epoch": read.epoch,
                },
            )


def _read_here(
    config: TwhinConfig, layout: EdgeLayout, rank: int, world_size: int
) -> ShuffledReader:
    training = config.training
    job = Job(rank, world_size, local_world_size=1, device=torch.device("cpu"))
    micro_batches = training.gradient_accumulation or 1
    return build_reader(
        config.train_data, layout, job, training.seed, training.num_epochs, micro_batches
    )


def _settings(config: TwhinConfig) -> dict[str, Any]:
    """All that decides which edges a process gets, by the names of the config."""
    training = config.training
    tables = [(table.name, table.num_embeddings) for table in config.model.embeddings.tables]
    relations = [(relation.name, relation.lhs, relation.rhs) for relation in config.model.relations]
    return {
        "train_data": config.train_data.model_dump(mode="json"),
        "model.relations": relations,
        "model.embeddings.tables": tables,
        "training.seed": training.seed,
        "training.num_epochs": training.num_epochs,
        "training.gradient_accumulation": training.gradient_accumulation,
    }
