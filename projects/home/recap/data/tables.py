"""Parquet files and a feature spec → batches: `describe` and `TableDataset`.

`to_batch` is a pure function from the columns of a batch to a `RankingBatch`. Rows come from
tml.data.parquet: in training in an order that depends on (seed, epoch) alone, in evaluation in that
of the files; each row is read by one process, and a position can be taken up by any number of them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.spec import (
    Block,
    CategoricalSpec,
    FeatureSpec,
    Vocabulary,
    blocks,
    hash_values,
    names_of,
    num_values,
    read_spec,
)
from tml.config import ConfigError
from tml.data import parquet
from tml.data.parquet import Columns, DataError, Field, Kind, Lists, Position
from tml.distributed import Job

logger = logging.getLogger(__name__)

MIN_TRAINING_ROWS = 2
"""Of one process in a step: batch normalisation has no variance of a single row."""
WINDOW_BYTES = 1 << 27
"""Of rows that are held and mixed, if examples_shuffle_buffer_size asks for no more rows."""
NUM_NAMED = 5
"""Bad rows that are named in warnings; the others are counted."""

Floats = NDArray[np.float32]
_NO_VALUES: Floats = np.empty(0, dtype=np.float32)


def describe(config: RecapDataConfig) -> Features:
    """Names and widths of what `config` reads, from its spec alone; raises ConfigError."""
    assert config.feature_spec is not None
    if config.preprocess is not None:
        raise ConfigError(
            "preprocess is for TFRecords; with feature_spec, name in the spec the columns that are "
            "read, and prepare the data anew for anything else"
        )
    path = Path(config.feature_spec)
    spec = read_spec(path)
    labels = spec.label_columns()
    if absent := [task for task in config.tasks if task not in labels]:
        raise ConfigError(
            f"tasks: {', '.join(absent)}: no such label in {path}; tasks wanted: "
            f"{', '.join(config.tasks)}; labels there: {', '.join(labels)}"
        )
    continuous, binary = names_of(spec.continuous), names_of(spec.binary)
    return Features(
        tasks=tuple(config.tasks),
        num_continuous=len(continuous),
        num_binary=len(binary),
        num_discrete=len(names_of(spec.discrete)),
        vectors={name: spec.vector(name).width for name in spec.vectors},
        categorical={name: num_values(one, path.parent) for name, one in spec.categorical.items()},
        bags={name: num_values(one, path.parent) for name, one in spec.bags.items()},
        ids=spec.all_ids(),
        continuous_names=continuous,
        binary_names=binary,
    )


class TableDataset:
    """The rows of parquet files, as batches of one process.

    num_epochs: None goes on without end. In training (shuffle) a step in which some process would
    have fewer than 2 rows is left out; otherwise all rows are read once, in file order.
    needs_labels: else labels are 0 where the files have none. Rows weigh what their own column
    says; `preprocess.weigh` applies the sampling rates.
    """

    def __init__(
        self,
        config: RecapDataConfig,
        paths: Sequence[str],
        job: Job,
        seed: int,
        batch_rows: int,
        *,
        num_epochs: int | None,
        shuffle: bool,
        needs_labels: bool = True,
    ) -> None:
        assert config.feature_spec is not None
        self.errors: Counter[str] = Counter()
        """What was wrong → rows left out for it, with ignore_data_errors."""
        self._config = config
        path = Path(config.feature_spec)
        self._spec = read_spec(path)
        self._features = describe(config)
        self._layout = layout(self._spec, config, path.parent)
        if not needs_labels:
            self._layout = without_absent_labels(self._layout, paths)
        self._needs_labels = needs_labels
        self._min_rows = MIN_TRAINING_ROWS if shuffle else 0
        rows = parquet.ParquetRows(paths, self._layout)
        window = max(config.examples_shuffle_buffer_size, WINDOW_BYTES // row_bytes(self._features))
        self._reader = parquet.ShuffledReader(
            rows,
            batch_rows,
            num_epochs if shuffle else 1,
            seed,
            job.rank,
            job.world_size,
            window if shuffle else 1,
            self._check,
            min_rows=self._min_rows,
            shuffle=shuffle,
        )
        self.num_rows: int | None = rows.num_rows

    def start(self) -> Position:
        """Before the first row."""
        return Position()

    def load_position(self, tree: dict[str, Any]) -> Position:
        """The position whose `to_json` is `tree`."""
        return Position.from_json(tree)

    def steps_from(self, position: Position) -> int | None:
        """Steps from `position` to the end of the last epoch; None: without end."""
        return None if self._reader.num_epochs is None else self._reader.steps_from(position)

    def batches(self, position: Position) -> Iterator[tuple[RankingBatch, Position]]:
        """This process's batches from `position`, each with the position behind it."""
        for read in self._reader.batches(position):
            columns = self._without_bad_rows(read.columns)
            yield to_batch(columns, self._features, self._spec), read.after

    def _check(self, columns: Columns, path: str, first_row: int) -> None:
        """Refuse bad rows, or mark them by NaN in their first label."""
        labels = [name for name in columns if name.startswith("label ")]
        if not self._needs_labels:  # to predict: those that are not known do no harm
            columns |= {name: np.nan_to_num(columns[name]) for name in labels}
        for name, at, message in list(faults(columns, self._features)):
            column = self._layout[name].column
            row = int(np.argmax(at))
            text = f"{path}, row {first_row + row}: column {column!r} is {message(row)}"
            if not self._config.ignore_data_errors or not labels:
                raise DataError(
                    f"{text}; mend it, or set ignore_data_errors to leave such rows out"
                )
            if sum(self.errors.values()) < NUM_NAMED:
                logger.warning("%s; %d such rows here are left out", text, int(at.sum()))
            columns[labels[0]] = np.where(at, np.float32(np.nan), columns[labels[0]])

    def _without_bad_rows(self, columns: Columns) -> Columns:
        if not self._config.ignore_data_errors:
            return columns
        label = next((v for name, v in columns.items() if name.startswith("label ")), None)
        if label is None:
            return columns
        good = np.flatnonzero(~np.isnan(label))
        if len(good) == len(label):
            return columns
        self.errors["bad value"] += len(label) - len(good)
        if len(good) < self._min_rows:
            raise DataError(
                f"{self._reader.rows.pattern}: of {len(label)} rows of a batch {len(good)} are "
                "good, too few for a step; mend the data"
            )
        return {name: values[good] for name, values in columns.items()}


# Columns of the files


def layout(spec: FeatureSpec, config: RecapDataConfig, folder: Path) -> dict[str, Field]:
    """Part of the batch → column of the files and what it holds."""
    fields: dict[str, Field] = {}
    for part in ("continuous", "binary", "discrete"):
        for column, width in blocks(getattr(spec, part)):
            fields[f"{part} {column}"] = Field(column, _numbers(part, width))
    for name in spec.vectors:
        vector = spec.vector(name)
        fields[f"vector {name}"] = Field(vector.column or name, parquet.vectors(vector.width))
    for name, one in spec.categorical.items():
        fields[f"categorical {name}"] = Field(one.column or name, _categorical(one, folder))
    for name, one in spec.bags.items():
        fields[f"bag {name}"] = Field(one.column or name, _bag(one, folder))
    for name in spec.all_ids():
        fields[f"id {name}"] = Field(name, _IDS)
    labels = spec.label_columns()
    for task in config.tasks:
        fields[f"label {task}"] = Field(labels[task], parquet.NUMBERS)
    if weight := config.weight_column or spec.weight:
        fields["weight"] = Field(weight, parquet.NUMBERS)
    return fields


def without_absent_labels(fields: dict[str, Field], paths: Sequence[str]) -> dict[str, Field]:
    """`fields` without those labels, and the weight, that the first file does not have."""
    there = parquet.column_names(paths[0])
    return {
        name: field
        for name, field in fields.items()
        if not name.startswith(("label ", "weight")) or field.column in there
    }


_IDS = Kind(
    "integers",
    parquet.INTEGERS.accepts,
    parquet.INTEGERS.decode,
    "ids are whole numbers; a text can be a categorical feature with hash_rows or a vocabulary",
)


def _numbers(part: str, width: int | None) -> Kind:
    if part == "discrete":
        return _IDS if width is None else integer_vectors(width)
    return parquet.NUMBERS if width is None else parquet.vectors(width)


def integer_vectors(width: int) -> Kind:
    """Lists of integers that all have `width`: (n, width) int64."""

    def decode(column: pa.ChunkedArray) -> NDArray[np.int64]:
        lists: Lists = parquet.INTEGER_LISTS.decode(column)
        if (wrong := np.diff(lists.offsets) != width).any():
            row = int(np.argmax(wrong))
            length = int(lists.offsets[row + 1] - lists.offsets[row])
            raise parquet.RowError(row, f"is a list of {length}; lists of {width} are needed")
        return lists.values.reshape(-1, width)

    return Kind(f"lists of {width} integers", parquet.INTEGER_LISTS.accepts, decode)


def _encoder(spec: CategoricalSpec, folder: Path) -> Callable[[pa.Array], NDArray[np.int64]]:
    """Values → rows; those of num_values are taken as they are, `faults` looks at their range."""
    if spec.vocabulary is not None:
        return Vocabulary.read(folder / spec.vocabulary).rows
    if spec.hash_rows is not None:
        return partial(hash_values, num_rows=spec.hash_rows)
    return _row_numbers


def _row_numbers(values: pa.Array) -> NDArray[np.int64]:
    """Values as they are; those beyond int64 become negative, which is no row either."""
    if pa.types.is_uint64(values.type):
        return np.asarray(values.fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
    return np.asarray(values.cast(pa.int64()).fill_null(0), dtype=np.int64)


def _accepts(spec: CategoricalSpec) -> Callable[[pa.DataType], bool]:
    def accepts(kind: pa.DataType) -> bool:
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        text = text or pa.types.is_string_view(kind) or pa.types.is_dictionary(kind)
        whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        return bool(whole or (text and spec.num_values is None))

    return accepts


def _categorical(spec: CategoricalSpec, folder: Path) -> Kind:
    encode = _encoder(spec, folder)
    return Kind(
        _WANTED[spec.num_values is None],
        _accepts(spec),
        lambda column: encode(column.combine_chunks()),
        _REMEDY[spec.num_values is None],
    )


def _bag(spec: CategoricalSpec, folder: Path) -> Kind:
    encode, accepts_value = _encoder(spec, folder), _accepts(spec)

    def accepts(kind: pa.DataType) -> bool:
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        lists = lists or pa.types.is_fixed_size_list(kind)
        return bool(lists and accepts_value(kind.value_type))

    def decode(column: pa.ChunkedArray) -> Lists:
        array = column.combine_chunks()
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Lists(encode(array.flatten()), offsets)

    unmapped = spec.num_values is None
    return Kind(f"lists of {_WANTED[unmapped]}", accepts, decode, _REMEDY[unmapped])


_WANTED = {False: "row numbers (integers)", True: "integers or text"}
_REMEDY = {
    False: "give the feature hash_rows or a vocabulary in place of num_values",
    True: "mend the column",
}


def row_bytes(features: Features) -> int:
    """Memory of one row, about: lists are counted as 8 values."""
    numbers = features.num_continuous + features.num_binary + sum(features.vectors.values())
    whole = features.num_discrete + len(features.categorical) + len(features.ids)
    return 4 * (numbers + 2 * len(features.tasks)) + 8 * (whole + 9 * len(features.bags))


def faults(
    columns: Columns, features: Features
) -> Iterator[tuple[str, NDArray[np.bool_], Callable[[int], str]]]:
    """What is wrong with rows: (part, rows, what row i has)."""
    for task in features.tasks:
        label = columns.get(f"label {task}", _NO_VALUES)
        if (bad := (label != 0) & (label != 1)).any():
            yield f"label {task}", bad, partial(_label_fault, label)
    for name, limit in features.categorical.items():
        rows = columns[f"categorical {name}"]
        if (bad := (rows < 0) | (rows >= limit)).any():
            yield f"categorical {name}", bad, partial(_range_fault, rows, limit)
    for name, limit in features.bags.items():
        lists = columns[f"bag {name}"]
        wrong = np.flatnonzero((lists.values < 0) | (lists.values >= limit))
        if len(wrong):
            bad = np.zeros(len(lists), dtype=bool)
            bad[np.searchsorted(lists.offsets, wrong, side="right") - 1] = True
            yield (
                f"bag {name}",
                bad,
                partial(_range_fault, [lists.values[wrong[0]]] * len(bad), limit),
            )
    if "weight" in columns:
        weight = columns["weight"]
        if (bad := ~(np.isfinite(weight) & (weight >= 0))).any():
            yield "weight", bad, lambda row: f"{weight[row]:g}; a weight is a number from 0 on"


def _label_fault(label: Floats, row: int) -> str:
    found = "null" if np.isnan(label[row]) else f"{label[row]:g}"
    return f"{found}; a label is 0 or 1"


def _range_fault(rows: Sequence[Any], limit: int, row: int) -> str:
    return f"{rows[row]}, out of range 0 to {limit - 1}"


# Batches


def to_batch(columns: Columns, features: Features, spec: FeatureSpec) -> RankingBatch:
    """Columns of `layout`, B rows each → the rows of one step."""
    num_rows = len(next(iter(columns.values())))
    labels = np.zeros((num_rows, len(features.tasks)), dtype=np.float32)
    for number, task in enumerate(features.tasks):
        if f"label {task}" in columns:
            labels[:, number] = columns[f"label {task}"]
    weights = np.ones_like(labels)
    if "weight" in columns:
        weights *= columns["weight"][:, None]
    return RankingBatch(
        continuous=_stack(columns, "continuous", spec.continuous, np.float32, len(labels)),
        binary=_stack(columns, "binary", spec.binary, np.float32, len(labels)),
        discrete=_stack(columns, "discrete", spec.discrete, np.int64, len(labels)),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        vectors={name: _tensor(columns[f"vector {name}"]) for name in features.vectors},
        categorical={
            name: _tensor(columns[f"categorical {name}"]) for name in features.categorical
        },
        bags={
            name: Bag(_tensor(lists.values), _tensor(lists.offsets))
            for name in features.bags
            for lists in [columns[f"bag {name}"]]
        },
        ids={name: _tensor(columns[f"id {name}"]) for name in features.ids},
    )


def _stack(
    columns: Columns, part: str, parts: list[str | Block], dtype: type, num_rows: int
) -> Tensor:
    """The columns of one part side by side: (B, width)."""
    found = [columns[f"{part} {column}"] for column, _ in blocks(parts)]
    if len(found) == 1 and found[0].ndim == 2:
        return _tensor(found[0])  # no copy
    widths = [1 if one.ndim == 1 else one.shape[1] for one in found]
    whole = np.empty((num_rows, sum(widths)), dtype=dtype)
    start = 0
    for one, width in zip(found, widths, strict=True):
        whole[:, start : start + width] = one.reshape(-1, width)
        start += width
    return torch.from_numpy(whole)


def _tensor(values: NDArray[Any]) -> Tensor:
    # Arrays that share Arrow's memory cannot be written to, which torch warns of.
    return torch.from_numpy(values if values.flags.writeable else values.copy())
