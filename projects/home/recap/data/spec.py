"""The feature spec: what the columns of parquet files are, as YAML (`FeatureSpec`), and how raw
values become row numbers (`hash_values`, `Vocabulary`).

    continuous: [age, {column: history, width: 8}]   # numbers; null → NaN
    binary: [is_author]                              # 0/1 numbers or booleans
    vectors: {user_embedding: 200}                   # lists of one width
    categorical:
      video: {num_values: 7584}                      # row numbers, 0 = unknown
      author: {column: author_id, hash_rows: 100000} # any whole number or text
      country: {vocabulary: vocabularies/country.parquet}
    bags:
      tags: {num_values: 64}                         # lists of the same
    ids: [user_id]                                   # passed on
    labels: [is_click, is_like]

projects/home/recap/prepare.py writes one beside the files; one written by hand describes others.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from pydantic import model_validator as validator

from tml.config import Config, ConfigError, load_config

VALUE = "value"
"""Column of a vocabulary file; its row i, counted from 0, is row i + 1 of the feature."""

Ints = NDArray[np.int64]


class Block(Config):
    """Several features in one column: lists of one width."""

    column: str
    """Column of the files."""
    width: PositiveInt
    """Length of every list."""


class VectorSpec(Config):
    """A vector made elsewhere."""

    column: str | None = None
    """Column of the files, lists of numbers. Unset: the feature's name."""
    width: PositiveInt
    """Length of every list."""


class CategoricalSpec(Config):
    """A feature with one of many values, or a list of them; row 0 is the unknown value."""

    exactly_one_of: ClassVar = (("num_values", "hash_rows", "vocabulary"),)

    column: str | None = None
    """Column of the files. Unset: the feature's name."""
    num_values: PositiveInt | None = None
    """The column holds row numbers from 0 to num_values − 1."""
    hash_rows: int | None = Field(default=None, ge=2)
    """The column holds any whole number or text; it is hashed into rows 1 to hash_rows − 1."""
    vocabulary: str | None = None
    """Parquet file with a column `value`, relative to the spec's folder: what is not in it is
    unknown.
    """


class FeatureSpec(Config):
    """What the columns of the files are; columns that are not named are not read."""

    continuous: list[str | Block] = Field(default=[])
    """Numbers, not normalised."""
    binary: list[str | Block] = Field(default=[])
    """Numbers that are concatenated as they are: 0 and 1, or booleans."""
    discrete: list[str | Block] = Field(default=[])
    """Hashed values: any whole numbers, not row numbers."""
    vectors: dict[str, PositiveInt | VectorSpec] = Field(default={})
    """Name → width."""
    categorical: dict[str, CategoricalSpec] = Field(default={})
    """Name → how its values become rows of an embedding table."""
    bags: dict[str, CategoricalSpec] = Field(default={})
    """Name → the same for lists."""
    ids: list[str] = Field(default=[])
    """Whole numbers that are passed on: ids of users and items, positions."""
    timestamp: str | None = None
    """Whole number that is passed on too."""
    labels: list[str] | dict[str, str] = Field(min_length=1)
    """Columns of 0 and 1, or task → column."""
    weight: str | None = None
    """Column with the weight of each row. Unset: 1."""

    @validator(mode="after")
    def _check(self) -> Self:
        for kind in ("continuous", "binary", "discrete"):
            names = [column for column, _ in blocks(getattr(self, kind))]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind}: {', '.join(twice)}: named twice")
        # An id is an input too, once a table of the model hashes it.
        inputs = {column for column, _ in self.input_columns()} | set(self.all_ids())
        if leaked := sorted(inputs & set(self.label_columns().values())):
            raise ValueError(
                f"{', '.join(leaked)}: a label cannot be a feature too; remove it from the features"
            )
        return self

    def label_columns(self) -> dict[str, str]:
        """Task → column."""
        return self.labels if isinstance(self.labels, dict) else {one: one for one in self.labels}

    def all_ids(self) -> tuple[str, ...]:
        """Columns that are passed on."""
        more = [self.timestamp] if self.timestamp else []
        return tuple(dict.fromkeys([*self.ids, *more]))

    def input_columns(self) -> Iterator[tuple[str, str]]:
        """(column, what it is) of everything that the model sees."""
        for kind in ("continuous", "binary", "discrete"):
            yield from ((column, kind) for column, _ in blocks(getattr(self, kind)))
        for name, vector in self.vectors.items():
            yield (vector.column if isinstance(vector, VectorSpec) else None) or name, "vectors"
        for kind in ("categorical", "bags"):
            for name, one in getattr(self, kind).items():
                yield one.column or name, kind

    def vector(self, name: str) -> VectorSpec:
        """Column and width of one vector."""
        given = self.vectors[name]
        return given if isinstance(given, VectorSpec) else VectorSpec(width=given)


def read_spec(path: str | Path) -> FeatureSpec:
    """The spec in the file `path`; raises ConfigError."""
    return load_config(FeatureSpec, path)


def blocks(columns: list[str | Block]) -> list[tuple[str, int | None]]:
    """(column, width) of each; None for a column of single values."""
    return [(c.column, c.width) if isinstance(c, Block) else (c, None) for c in columns]


def names_of(columns: list[str | Block]) -> tuple[str, ...]:
    """A name for each feature; those of a block are numbered: `history.0`."""
    names: list[str] = []
    for column, width in blocks(columns):
        names += [column] if width is None else [f"{column}.{i}" for i in range(width)]
    return tuple(names)


class Vocabulary:
    """Known values of one feature; row 0 is for all others and for null."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values.cast(pa.string())

    def __len__(self) -> int:
        """Rows, that of the unknown value included."""
        return len(self._values) + 1

    def rows(self, values: pa.Array) -> Ints:
        """Row of each value; numbers are compared as text."""
        found = pc.index_in(values.cast(pa.string()), value_set=self._values, skip_nulls=True)
        return np.asarray(pc.add(found, 1).fill_null(0), dtype=np.int64)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The vocabulary in the parquet file `path`; raises ConfigError."""
        try:
            table = pq.read_table(path, columns=[VALUE])
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"vocabulary {path} cannot be read; it must be a parquet file with a column "
                f"{VALUE!r}: {reason}"
            ) from error
        return cls(table.column(VALUE).combine_chunks())


def num_values(spec: CategoricalSpec, folder: Path) -> int:
    """Rows of the feature; a vocabulary's file is looked into but not read."""
    if spec.vocabulary is None:
        return spec.num_values or spec.hash_rows or 0
    path = folder / spec.vocabulary
    try:
        return int(pq.read_metadata(path).num_rows) + 1
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"vocabulary {path} cannot be read: {reason}") from error


def hash_values(values: pa.Array, num_rows: int) -> Ints:
    """Row, from 1 to num_rows − 1, of each whole number or text, the same on every machine; null
    → 0.
    """
    if pa.types.is_dictionary(values.type):  # how a file stores a value does not change its row
        values = values.dictionary_decode()
    present = values.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_integer(values.type):
        hashed = _mix(values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))
    else:
        encoded = values.cast(pa.string()).dictionary_encode()
        words = [_digest(word) for word in encoded.dictionary.to_pylist()] or [0]
        codes = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
        hashed = np.array(words, dtype=np.uint64)[codes]
    rows = (hashed % np.uint64(num_rows - 1)).astype(np.int64) + 1
    return np.where(present, rows, 0)


def _digest(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mix(values: Ints) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): neighbouring numbers land far apart."""
    mixed = values.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
