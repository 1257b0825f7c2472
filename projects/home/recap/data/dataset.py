"""Data as the entry scripts see it: `describe_features`, names and widths before anything is read,
and `build_dataset`, batches of this process's rows from TFRecords or parquet alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from projects.home.recap.data import tables
from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.inputs import input_files
from tml.data.parquet import Position
from tml.distributed import Job
from tml.train import Place


class Dataset(ABC):
    """Rows of one process; a position says where reading goes on, and can be saved as JSON."""

    num_rows: int | None
    """Rows of all processes in an epoch; None where that is not known before they are read."""

    @property
    @abstractmethod
    def num_errors(self) -> int:
        """Records left out so far, with ignore_data_errors."""

    @abstractmethod
    def start(self) -> Place:
        """Before the first row."""

    @abstractmethod
    def resume(self, trees: list[Any]) -> Place:
        """This process's position, from the JSON of the positions of all processes that saved."""

    @abstractmethod
    def steps_from(self, position: Place) -> int | None:
        """Batches from `position` to the end of the last epoch; None where not known."""

    @abstractmethod
    def batches(self, position: Place) -> Iterator[tuple[RankingBatch, Place]]:
        """This process's batches from `position`, each with the position behind it."""


class TableRows(Dataset):
    """Parquet: positions are those of the whole job, the same on every process."""

    def __init__(self, dataset: tables.TableDataset) -> None:
        self._dataset = dataset
        self.num_rows = dataset.num_rows

    @property
    def num_errors(self) -> int:
        """See Dataset."""
        return sum(self._dataset.errors.values())

    def start(self) -> Place:
        """See Dataset."""
        return self._dataset.start()

    def resume(self, trees: list[Any]) -> Place:
        """See Dataset."""
        return self._dataset.load_position(trees[0])

    def steps_from(self, position: Place) -> int | None:
        """See Dataset."""
        assert isinstance(position, Position)
        return self._dataset.steps_from(position)

    def batches(self, position: Place) -> Iterator[tuple[RankingBatch, Place]]:
        """See Dataset."""
        assert isinstance(position, Position)
        yield from self._dataset.batches(position)


def describe_features(config: RecapDataConfig) -> Features:
    """Names and widths of a batch, after preprocessing, from schema or spec alone."""
    return tables.describe(config)


def build_dataset(
    config: RecapDataConfig,
    features: Features,
    job: Job,
    seed: int,
    batch_rows: int,
    *,
    num_epochs: int | None,
    shuffle: bool,
    use_weights: bool = True,
    needs_labels: bool = True,
) -> Dataset:
    """The rows of `config` for one process of the job.

    batch_rows: rows of one process in a batch. num_epochs: None goes on without end. shuffle:
    training order; else one pass in the order of the files, every row. use_weights: rows are
    weighted by the sampling rates. needs_labels: else labels are 0 where the data has none.
    """
    return TableRows(
        tables.TableDataset(
            config,
            input_files(config),
            job,
            seed,
            batch_rows,
            num_epochs=num_epochs,
            shuffle=shuffle,
        )
    )
