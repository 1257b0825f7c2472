"""Training data read here or by a data set worker: `training_rows`, and `serve`, the worker.

A `RankingBatch` travels as an Arrow record batch whose columns are its tensors, named by their
parts: `continuous`, `ids/user_id`. Tensors of width 0 are left out; the trainer knows the widths.
"""

import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NoReturn

import pyarrow as pa
import torch
from torch import Tensor

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import Bag, Features, RankingBatch, empty_batch
from projects.home.recap.data.dataset import Dataset, build_dataset, describe_features
from tml import logs
from tml.config import ConfigError
from tml.data import flight
from tml.data.flight import Remote
from tml.distributed import Job
from tml.train import Place

logger = logging.getLogger(__name__)


def training_rows(config: RecapConfig, features: Features, job: Job) -> Dataset:
    """The rows that this process trains on: from a data set worker where the job has any, else from
    the files.
    """
    rows_of_process(config, job.world_size)  # a fault of the config is the trainer's to say
    workers = flight.addresses()
    if not workers:
        return _read_here(config, features, job.rank, job.world_size)
    return ServedRows(Remote(workers, job.rank, job.world_size, _settings(config)), features)


def rows_of_process(config: RecapConfig, world_size: int) -> int:
    """Rows of one update in one process."""
    rows = config.train_data.global_batch_size * (config.training.gradient_accumulation or 1)
    if rows % world_size:
        raise ConfigError(
            f"train_data.global_batch_size {config.train_data.global_batch_size} times "
            f"gradient_accumulation cannot be shared by {world_size} processes evenly; "
            "make it a multiple"
        )
    return rows // world_size


def serve(config: RecapConfig) -> NoReturn:
    """Be the data set worker of the job that trains `config`, until a signal comes."""
    logs.set_up(0)
    torch.set_num_threads(1)  # threads are train_data.map_num_parallel_calls
    flight.serve(
        lambda rank, world_size: _Served(
            _read_here(config, describe_features(config.train_data), rank, world_size)
        ),
        lambda: _settings(config),
    )


class ServedRows(Dataset):
    """Rows that a data set worker reads."""

    def __init__(self, remote: Remote, features: Features) -> None:
        self._remote = remote
        self._empty = empty_batch(features)
        self.num_rows = remote.num_rows

    @property
    def is_read_elsewhere(self) -> bool:
        """See Dataset."""
        return True

    @property
    def num_errors(self) -> int:
        """See Dataset."""
        return self._remote.num_errors

    def start(self) -> Place:
        """See Dataset."""
        return self._remote.start

    def resume(self, trees: list[Any]) -> Place:
        """See Dataset."""
        return self._remote.resume(trees)

    def load_position(self, tree: dict[str, Any]) -> Place:
        """See Dataset."""
        return flight.Place(tree)

    def steps_from(self, position: Place) -> int | None:
        """See Dataset."""
        return self._remote.steps_from(position.to_json())

    def batches(self, position: Place) -> Iterator[tuple[RankingBatch, Place]]:
        """See Dataset."""
        for rows, message in self._remote.batches(position.to_json()):
            yield from_arrow(rows, self._empty), flight.Place(message["after"])


class _Served:
    """A dataset as the worker serves it."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.num_rows = dataset.num_rows

    @property
    def num_errors(self) -> int:
        return self._dataset.num_errors

    def start(self) -> Any:
        return self._dataset.start().to_json()

    def resume(self, positions: list[Any]) -> Any:
        return self._dataset.resume(positions).to_json()

    def steps_from(self, position: Any) -> int | None:
        return self._dataset.steps_from(self._dataset.load_position(position))

    def batches(self, position: Any) -> Iterator[flight.Batch]:
        for batch, after in self._dataset.batches(self._dataset.load_position(position)):
            yield to_arrow(batch), {"after": after.to_json()}


def _read_here(config: RecapConfig, features: Features, rank: int, world_size: int) -> Dataset:
    return build_dataset(
        config.train_data,
        features,
        Job(rank, world_size, local_world_size=1, device=torch.device("cpu")),
        config.training.seed,
        rows_of_process(config, world_size),
        num_epochs=config.training.num_epochs,
        shuffle=True,
        use_weights=config.training.downsampling_correction == "weights",
    )


def _settings(config: RecapConfig) -> dict[str, Any]:
    """All that decides which rows a process gets, by the names of the config."""
    training = config.training
    return {
        "train_data": config.train_data.model_dump(mode="json"),
        "training.seed": training.seed,
        "training.num_epochs": training.num_epochs,
        "training.gradient_accumulation": training.gradient_accumulation,
        "training.downsampling_correction": training.downsampling_correction,
    }


# Batches on the wire


def to_arrow(batch: RankingBatch) -> pa.RecordBatch:
    """The tensors of a batch as columns."""
    columns: dict[str, pa.Array] = {}
    for one in fields(batch):
        value = getattr(batch, one.name)
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            column = _to_column(part)
            if column is not None:
                columns[f"{one.name}/{name}" if name else one.name] = column
    return pa.record_batch(columns)


def from_arrow(rows: pa.RecordBatch, empty: RankingBatch) -> RankingBatch:
    """The inverse of `to_arrow`; `empty` is a batch without rows that says what there is."""

    def read(name: str, like: Any) -> Any:
        if isinstance(like, dict):
            return {key: read(f"{name}/{key}", item) for key, item in like.items()}
        if name not in rows.schema.names:  # of width 0
            return like.new_empty(rows.num_rows, *like.shape[1:])
        column = rows.column(name)
        if isinstance(like, Bag):
            return Bag(_tensor(column.values), _tensor(column.offsets))
        values = column.flatten() if like.dim() == 2 else column
        return _tensor(values).reshape(rows.num_rows, *like.shape[1:])

    return RankingBatch(
        **{one.name: read(one.name, getattr(empty, one.name)) for one in fields(empty)}
    )


def _to_column(part: Tensor | Bag) -> pa.Array | None:
    if isinstance(part, Bag):
        return pa.LargeListArray.from_arrays(part.offsets.numpy(), part.values.numpy())
    if part.dim() == 1:
        return pa.array(part.numpy())
    if not part.shape[1]:
        return None
    return pa.FixedSizeListArray.from_arrays(part.contiguous().numpy().ravel(), part.shape[1])


def _tensor(values: pa.Array) -> Tensor:
    # Arrow's memory cannot be written to, which torch's can.
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
