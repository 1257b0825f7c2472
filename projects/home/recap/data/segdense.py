"""TFRecords described by a segdense schema → rows: `read_schema`, `SegDenseLayout` (what a schema
gives to the model) and its `to_rows`, from a block of records to a `RankingBatch`.

A schema is a JSON file `{"schema": [{"feature_name", "dtype", "length"}, …]}`; length −1 is any
number. Two keys are added to the published ones: `default`, the value (or list of values) of
records that lack the feature, and `num_values` of an int64_list of any length: its values are rows,
0 to num_values − 1, of an embedding table.

What becomes of an entry: the features that the model calls continuous, binary and discrete are
those tensors; tasks are labels; other whole numbers are ids; other lists of floats of one length
are vectors. Lists of any length are bags, where `features` names them. The rest is passed over.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.preprocess import (
    Preprocessor,
    RowFault,
    take_rows,
    timestamp_names,
)
from tml.config import Config, ConfigError, build_config
from tml.data.example import VARIABLE, Decoded, ExampleDecoder, ExampleFeature, Lists
from tml.data.parquet import DataError
from tml.data.tfrecord import BAD_RECORD, Block, OnFault

CONTINUOUS, BINARY, DISCRETE = "continuous", "binary", "discrete"
REMEDY = "mend the record, or set ignore_data_errors to leave such records out"


class SchemaEntry(Config):
    """One feature of the records."""

    feature_name: str = Field(min_length=1)
    """Name in the records."""
    dtype: Literal["int64_list", "float_list", "bytes_list"]
    """Which of the three kinds of lists."""
    length: int = Field(ge=-1)
    """Values of each record; −1: any number."""
    default: float | int | list[float | int] | None = None
    """Value or values of a record that lacks the feature. Unset: that is an error."""
    num_values: PositiveInt | None = None
    """Of lists of any length: values are 0 to num_values − 1."""


class _Schema(Config):
    schema_: list[SchemaEntry] = Field(alias="schema", min_length=1)


def read_schema(path: str) -> dict[str, SchemaEntry]:
    """Name in the records → entry. Raises ConfigError."""
    try:
        tree = json.loads(Path(path).read_text())
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"seg_dense_schema.schema_path: {path} cannot be read: {reason}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"seg_dense_schema.schema_path: {path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f'{path}: wanted is {{"schema": [...]}}, not {type(tree).__name__}')
    entries = build_config(_Schema, tree, path).schema_
    schema = {entry.feature_name: entry for entry in entries}
    if len(schema) < len(entries):
        names = [entry.feature_name for entry in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: given twice: {', '.join(twice)}; leave each feature in once")
    return schema


@dataclass(frozen=True)
class _Source:
    """One feature that is read, under its name in the model."""

    name: str
    entry: SchemaEntry


class SegDenseLayout:
    """What the schema of `config` gives to the model. Raises ConfigError.

    needs_labels: else labels are 0 where the records have none.
    """

    def __init__(self, config: RecapDataConfig, *, needs_labels: bool = True) -> None:
        assert config.seg_dense_schema is not None
        self._config = config.seg_dense_schema
        self._path = self._config.schema_path
        self._schema = read_schema(self._path)
        self._record_names = dict(self._config.renamed_features)
        self._check_renames()
        self._model_names = {record: name for name, record in self._record_names.items()}
        self._needs_labels = needs_labels
        self._labels = {task: self._find_label(task) for task in config.tasks}
        self._sources = self._choose(config)
        self.preprocessor = Preprocessor(
            config.preprocess,
            self._describe(config),
            {
                self._model_names.get(name, name): bits
                for name, bits in (self._config.mask_mantissa_features or {}).items()
            },
        )
        self.features = self.preprocessor.features
        """What rows have after preprocessing."""
        self.decoder = ExampleDecoder(self._decoded())

    # Schema → features

    def _check_renames(self) -> None:
        for name, record in self._record_names.items():
            if record not in self._schema:
                raise ConfigError(
                    f"seg_dense_schema.renamed_features.{name}: {self._unknown(record)}"
                )
        records = list(self._record_names.values())
        for record in records:
            if records.count(record) > 1:
                names = [name for name, other in self._record_names.items() if other == record]
                raise ConfigError(
                    f"seg_dense_schema.renamed_features: {', '.join(names)} are all {record}; one "
                    "feature has one name"
                )

    def _unknown(self, name: str) -> str:
        known = [*self._schema, *self._record_names]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(known)}"
        return f"{self._path} has no feature {name!r}{hint}"

    def _find(self, name: str) -> SchemaEntry | None:
        """The entry of a feature, by its name in the model or in the records."""
        return self._schema.get(self._record_names.get(name, name))

    def _find_label(self, task: str) -> SchemaEntry | None:
        entry = self._find(task)
        if entry is None and self._needs_labels:
            raise ConfigError(f"tasks.{task}: {self._unknown(task)}")
        if entry is not None and (entry.length != 1 or entry.dtype == "bytes_list"):
            raise ConfigError(
                f"tasks.{task}: {self._path} says {entry.dtype} of length {entry.length}; a label "
                "is one number"
            )
        return entry

    def _choose(self, config: RecapDataConfig) -> list[_Source]:
        """The features that are read, beside labels."""
        asked: set[str] | None = None
        if self._config.features is not None:
            asked = set()
            for name in [*self._config.features, *_timestamps(config)]:
                entry = self._find(name)
                if entry is None:
                    raise ConfigError(f"seg_dense_schema.features: {self._unknown(name)}")
                asked.add(entry.feature_name)
        labels = {entry.feature_name for entry in self._labels.values() if entry is not None}
        sources = []
        for record, entry in self._schema.items():
            if record in labels or (asked is not None and record not in asked):
                continue
            source = _Source(self._model_names.get(record, record), entry)
            if self._is_read(source, asked is not None):
                sources.append(source)
        return sources

    def _is_read(self, source: _Source, asked: bool) -> bool:
        """Whether the entry becomes a feature; raises ConfigError where it should and cannot."""
        name, entry = source.name, source.entry
        kinds = {
            CONTINUOUS: ("float_list",),
            BINARY: ("int64_list", "float_list"),
            DISCRETE: ("int64_list",),
        }
        says = f"{self._path}: {entry.feature_name} is a {entry.dtype} of length {entry.length}"
        if name in kinds:
            if entry.dtype not in kinds[name] or entry.length < 1:
                raise ConfigError(
                    f"{says}; {name} must be a {' or '.join(kinds[name])} of one length"
                )
            return True
        if entry.dtype == "float_list" and entry.length > 0:
            return True
        if entry.dtype == "int64_list" and entry.length == 1:
            return True
        if not asked:
            return False
        if entry.dtype == "int64_list" and entry.length == VARIABLE:
            if entry.num_values is None:
                raise ConfigError(f"{says}; give it num_values there, or take it out of features")
            return True
        raise ConfigError(f"{says}; the model has no use for that, take it out of features")

    def _describe(self, config: RecapDataConfig) -> Features:
        """What the records have, before preprocessing."""
        widths = {source.name: source.entry.length for source in self._sources}
        return Features(
            tasks=tuple(config.tasks),
            num_continuous=widths.get(CONTINUOUS, 0),
            num_binary=widths.get(BINARY, 0),
            num_discrete=widths.get(DISCRETE, 0),
            vectors={source.name: source.entry.length for source in self._of("vector")},
            bags={source.name: source.entry.num_values or 0 for source in self._of("bag")},
            ids=tuple(source.name for source in self._of("id")),
        )

    def _of(self, kind: str) -> list[_Source]:
        return [source for source in self._sources if _kind(source) == kind]

    def _decoded(self) -> list[ExampleFeature]:
        features = []
        for source in self._sources:
            entry = source.entry
            keep = None
            if source.name in (CONTINUOUS, BINARY):
                keep = self.preprocessor.needed_columns(source.name)
            features.append(
                ExampleFeature(entry.feature_name, entry.dtype, entry.length, entry.default, keep)
            )
        for label in self._labels.values():
            if label is not None:
                default = label.default
                if default is None and not self._needs_labels:
                    default = 0
                features.append(ExampleFeature(label.feature_name, label.dtype, 1, default))
        return list({feature.name: feature for feature in features}.values())

    # Records → rows

    def to_rows(self, block: Block, on_fault: OnFault | None) -> RankingBatch:
        """The records of a block as rows, after all preprocessing that looks at single rows.

        Records that cannot be used are left out and told to `on_fault`, or, where that is None,
        raise DataError.
        """
        decoded = self.decoder.decode(block)
        for fault in decoded.faults:
            _tell(fault, on_fault)
        batch = self._to_batch(decoded)
        found: dict[int, str] = {}
        for bad, describe in (
            *self._label_faults(batch),
            *self._bag_faults(batch),
            *self.preprocessor.faults(batch),
        ):
            for row in np.flatnonzero(bad).tolist():
                found.setdefault(row, describe(row))
        if found:
            for row in sorted(found):
                record = int(decoded.numbers[row])
                _tell(f"{block.path}, record {record:,}: {found[row]}", on_fault)
            good = np.setdiff1d(np.arange(len(batch)), list(found))
            batch = take_rows(batch, torch.from_numpy(good))
        return self.preprocessor.rows(batch)

    def _label_faults(self, batch: RankingBatch) -> Iterator[RowFault]:
        labels = batch.labels.numpy()
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            names = list(self._labels)

            def describe(row: int) -> str:
                column = int(np.argmax(wrong[row]))
                return f"label {names[column]} is {labels[row, column]:g}; a label is 0 or 1"

            yield wrong.any(axis=1), describe

    def _bag_faults(self, batch: RankingBatch) -> Iterator[RowFault]:
        for source in self._of("bag"):
            bag = batch.bags[source.name]
            limit = source.entry.num_values or 0
            wrong = np.flatnonzero(((bag.values < 0) | (bag.values >= limit)).numpy())
            if len(wrong):
                rows = np.searchsorted(bag.offsets.numpy(), wrong, side="right") - 1
                bad = np.zeros(len(batch), dtype=bool)
                bad[rows] = True
                values = dict(
                    zip(rows[::-1].tolist(), bag.values[wrong[::-1].copy()].tolist(), strict=True)
                )
                yield (
                    bad,
                    lambda row, values=values, name=source.name, limit=limit: (  # type: ignore[misc]
                        f"{name} holds {values[row]}; its values are 0 to {limit - 1}"
                    ),
                )

    def _to_batch(self, decoded: Decoded) -> RankingBatch:
        count = len(decoded.numbers)
        columns = decoded.columns

        def table(name: str, dtype: Any) -> torch.Tensor:
            entry = next((s.entry for s in self._sources if s.name == name), None)
            if entry is None:
                return torch.from_numpy(np.empty((count, 0), dtype=dtype))
            return torch.from_numpy(_array(columns[entry.feature_name]).astype(dtype, copy=False))

        labels = np.zeros((count, len(self._labels)), dtype=np.float32)
        for index, entry in enumerate(self._labels.values()):
            if entry is not None:
                labels[:, index] = _array(columns[entry.feature_name])[:, 0]
        return RankingBatch(
            continuous=table(CONTINUOUS, np.float32),
            binary=table(BINARY, np.float32),
            discrete=table(DISCRETE, np.int64),
            labels=torch.from_numpy(labels),
            weights=torch.ones(labels.shape),
            vectors={source.name: table(source.name, np.float32) for source in self._of("vector")},
            bags={s.name: _bag(columns[s.entry.feature_name]) for s in self._of("bag")},
            ids={source.name: table(source.name, np.int64)[:, 0] for source in self._of("id")},
        )


def _tell(message: str, on_fault: OnFault | None) -> None:
    if on_fault is None:
        raise DataError(f"{message}; {REMEDY}")
    on_fault(BAD_RECORD, message)


def _kind(source: _Source) -> str:
    """What a feature becomes: a tensor of its own name, a vector, a bag or an id."""
    if source.name in (CONTINUOUS, BINARY, DISCRETE):
        return source.name
    if source.entry.dtype == "float_list":
        return "vector"
    return "bag" if source.entry.length == VARIABLE else "id"


def _timestamps(config: RecapDataConfig) -> list[str]:
    """Features that preprocessing needs, whether they are asked for or not."""
    rectify = config.preprocess.rectify_labels if config.preprocess else None
    return timestamp_names(rectify) if rectify else []


def _array(column: Any) -> NDArray[Any]:
    assert isinstance(column, np.ndarray)
    return column


def _bag(column: Any) -> Bag:
    assert isinstance(column, Lists)
    return Bag(torch.from_numpy(column.values), torch.from_numpy(column.offsets))
