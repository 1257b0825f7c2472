"""Data as the entry scripts see it: `describe_features`, names and widths before anything is read,
and `build_dataset`, batches of this process's rows from TFRecords or parquet alike.
"""

import json
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from projects.home.recap.data import tables
from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.inputs import input_files
from projects.home.recap.data.preprocess import Preprocessor, weigh
from projects.home.recap.data.segdense import SegDenseLayout
from projects.home.recap.data.stream import RecordStream, StreamPosition
from projects.home.recap.data.vectors import VectorLookup, read_width
from tml.config import ConfigError
from tml.data.parquet import Position
from tml.distributed import Job
from tml.train import Place

logger = logging.getLogger(__name__)

DEFAULT_INTERLEAVE = 4
"""Files that are read at the same time where the config does not say."""


class Dataset(ABC):
    """Rows of one process; a position says where reading goes on, and can be saved as JSON."""

    num_rows: int | None
    """Rows of all processes in an epoch; None where that is not known before they are read."""

    @property
    @abstractmethod
    def num_errors(self) -> int:
        """Records left out so far, with ignore_data_errors."""

    @property
    def is_read_elsewhere(self) -> bool:
        """Whether another machine or process reads them: here, one only waits."""
        return False

    @abstractmethod
    def start(self) -> Place:
        """Before the first row."""

    @abstractmethod
    def resume(self, trees: list[Any]) -> Place:
        """This process's position, from the JSON of the positions of all processes that saved."""

    @abstractmethod
    def load_position(self, tree: dict[str, Any]) -> Place:
        """The position of this process whose `to_json` is `tree`."""

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
        return self.load_position(trees[0])

    def load_position(self, tree: dict[str, Any]) -> Place:
        """See Dataset."""
        return self._dataset.load_position(tree)

    def steps_from(self, position: Place) -> int | None:
        """See Dataset."""
        assert isinstance(position, Position)
        return self._dataset.steps_from(position)

    def batches(self, position: Place) -> Iterator[tuple[RankingBatch, Place]]:
        """See Dataset."""
        assert isinstance(position, Position)
        yield from self._dataset.batches(position)


class RecordRows(Dataset):
    """TFRecords: each process has a position of its own, and the number of rows is not known."""

    num_rows = None

    def __init__(self, stream: RecordStream) -> None:
        self._stream = stream

    @property
    def num_errors(self) -> int:
        """See Dataset; the lost rest of a file counts as one."""
        return sum(self._stream.errors.values())

    def start(self) -> Place:
        """See Dataset."""
        return self._stream.start()

    def resume(self, trees: list[Any]) -> Place:
        """See Dataset."""
        return self._stream.resume(trees)

    def load_position(self, tree: dict[str, Any]) -> Place:
        """See Dataset."""
        return StreamPosition.from_json(tree)

    def steps_from(self, position: Place) -> int | None:
        """See Dataset."""
        return None

    def batches(self, position: Place) -> Iterator[tuple[RankingBatch, Place]]:
        """See Dataset."""
        assert isinstance(position, StreamPosition)
        yield from self._stream.batches(position)


class PreparedRows(Dataset):
    """Rows of another dataset after what is done to whole batches: dropping of negatives, weights
    from sampling rates, lookups of vectors.

    by_rows: steps on single rows that the other dataset has not done yet.
    """

    def __init__(
        self,
        rows: Dataset,
        config: RecapDataConfig,
        preprocessor: Preprocessor,
        key: tuple[int, int],
        *,
        by_rows: bool,
        use_weights: bool,
    ) -> None:
        self.num_rows = rows.num_rows
        if preprocessor.batch_multiplier > 1:
            self.num_rows = None  # it depends on the labels where the last batch is not full
        self._rows, self._config, self._preprocessor = rows, config, preprocessor
        self._key, self._by_rows, self._use_weights = key, by_rows, use_weights
        self.lookups = [VectorLookup(table) for table in config.vector_tables]
        """Counts of found and missing ids."""

    @property
    def num_errors(self) -> int:
        """See Dataset."""
        return self._rows.num_errors

    def start(self) -> Place:
        """See Dataset."""
        return self._rows.start()

    def resume(self, trees: list[Any]) -> Place:
        """See Dataset."""
        return self._rows.resume(trees)

    def load_position(self, tree: dict[str, Any]) -> Place:
        """See Dataset."""
        return self._rows.load_position(tree)

    def steps_from(self, position: Place) -> int | None:
        """See Dataset."""
        return self._rows.steps_from(position)

    def batches(self, position: Place) -> Iterator[tuple[RankingBatch, Place]]:
        """See Dataset."""
        for batch, after in self._rows.batches(position):
            yield self._prepare(batch, after), after
        for lookup in self.lookups:
            if lookup.num_missing:
                logger.warning(
                    "vector table %s: %d rows had an id that is not in it and got zeros, %d had "
                    "one that is",
                    lookup.name,
                    lookup.num_missing,
                    lookup.num_found,
                )

    def _prepare(self, batch: RankingBatch, after: Place) -> RankingBatch:
        if self._by_rows:
            batch = self._preprocessor.rows(batch)
        if self._preprocessor.batch_multiplier > 1:
            # From the position alone, so that a run that is taken up draws the same rows.
            place = zlib.crc32(json.dumps(after.to_json()).encode())
            batch = self._preprocessor.sample(batch, np.random.default_rng([*self._key, place]))
        if self._use_weights:
            batch = weigh(batch, self._preprocessor.features.tasks, self._config)
        looked_up = {lookup.name: lookup(batch.ids[lookup.by]) for lookup in self.lookups}
        return replace(batch, vectors=batch.vectors | looked_up) if looked_up else batch


def describe_features(config: RecapDataConfig) -> Features:
    """Names and widths of a batch, after preprocessing, from schema or spec alone. Raises
    ConfigError.
    """
    if config.seg_dense_schema is not None:
        features = SegDenseLayout(config, needs_labels=False).features
    else:
        features = _preprocessor_of_tables(config).features
    return _with_vectors(features, config)


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

    features: what `describe_features` says; other features are refused. batch_rows: rows of one
    process in a batch. num_epochs: None goes on without end. shuffle: training order; else one pass
    in the order of the files, every row. use_weights: rows are weighted by the sampling rates.
    needs_labels: else labels are 0 where the data has none.
    """
    paths = input_files(config)
    rows: Dataset
    if config.seg_dense_schema is not None:
        layout = SegDenseLayout(config, needs_labels=needs_labels)
        preprocessor = layout.preprocessor
        rows = RecordRows(
            RecordStream(
                paths,
                layout.to_rows,
                job,
                seed,
                batch_rows * preprocessor.batch_multiplier,
                num_epochs=num_epochs if shuffle else 1,
                shuffle=shuffle,
                window_rows=config.examples_shuffle_buffer_size,
                interleave=config.interleave_num_parallel_calls or DEFAULT_INTERLEAVE,
                threads=config.map_num_parallel_calls or 1,
                skip_faults=config.ignore_data_errors,
            )
        )
    else:
        preprocessor = _preprocessor_of_tables(config)
        rows = TableRows(
            tables.TableDataset(
                _without_preprocess(config),
                paths,
                job,
                seed,
                batch_rows * preprocessor.batch_multiplier,
                num_epochs=num_epochs,
                shuffle=shuffle,
                needs_labels=needs_labels,
            )
        )
    found = _with_vectors(preprocessor.features, config)
    assert found == features, f"features of another config: {features}; those here: {found}"
    return PreparedRows(
        rows,
        config,
        preprocessor,
        (seed, job.rank),
        by_rows=config.seg_dense_schema is None,
        use_weights=use_weights,
    )


def _preprocessor_of_tables(config: RecapDataConfig) -> Preprocessor:
    return Preprocessor(config.preprocess, tables.describe(_without_preprocess(config)))


def _without_preprocess(config: RecapDataConfig) -> RecapDataConfig:
    """For tables, whose rows are preprocessed here."""
    return config.model_copy(update={"preprocess": None})


def _with_vectors(features: Features, config: RecapDataConfig) -> Features:
    """The features and the vectors that are looked up."""
    vectors = dict(features.vectors)
    for table in config.vector_tables:
        where = f"vector_tables: {table.name!r}"
        if table.by not in features.ids:
            raise ConfigError(
                f"{where}: by: the data has no id {table.by!r}; there are "
                f"{', '.join(features.ids) or 'none'}"
            )
        if table.name in vectors:
            raise ConfigError(f"{where}: there is a vector of that name already")
        vectors[table.name] = read_width(table)
    return replace(features, vectors=vectors)
