"""The folder of exported vectors: its description and how it is read, without torch.

`vectors.json` says what the folder holds: the step, the comparator, tables, relations with their
operators, and in which formats the full vectors are there:

    format        vectors (N, D) float32     biases (N,) float32      relations (R, D)
    parquet       <table>.parquet: vector    <table>.parquet: bias    relations.parquet: vector
    npy           <table>.npy                <table>.bias.npy         relations.npy
    safetensors   vectors.safetensors:       vectors.safetensors:     vectors.safetensors:
                  <table>                    <table>.bias             relations

Matrices of linear and affine operators (R, D, D) are `relation_matrices` in the same place. Row i
is the entity with id i; entities' names are the column entity of `<table>.parquet`, or with the
other formats of `<table>.ids.parquet` (a name may hold line breaks, so text is no format for them).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tml.data.parquet import DataError

DESCRIPTION = "vectors.json"
TENSORS = "vectors.safetensors"
FORMATS = ("parquet", "npy", "safetensors")
RELATIONS, MATRICES = "relations", "relation_matrices"
BIAS, IDS = ".bias", ".ids"

Floats = NDArray[np.float32]


def refuse_table_names(names: Sequence[str]) -> None:
    """Raise ValueError for a table whose name is that of another file: names begin those of
    files.
    """
    for name in names:
        if name in (RELATIONS, MATRICES):
            raise ValueError(f"tables: {name!r} is the name of an exported file; rename the table")
        if name.startswith(".") or not {"/", "\0"}.isdisjoint(name):
            raise ValueError(f"tables: {name!r} cannot be the name of a file; rename the table")
        for other in names:
            if name.startswith(f"{other}."):
                raise ValueError(
                    f"tables: {name!r} may be the name of a file, or of the biases, of the table "
                    f"{other!r}; rename the table"
                )


@dataclass(frozen=True)
class Relation:
    """A relation as vectors.json has it; its place in the list is its row in `relations`."""

    name: str
    lhs: str
    rhs: str
    operator: str


class Exported:
    """A folder of exported vectors; nothing but its description is read before it is asked for."""

    def __init__(
        self, folder: Path, description: Mapping[str, Any], held: Mapping[str, Floats] | None = None
    ) -> None:
        """held: arrays by their names in npy that are in memory, and need not be read."""
        self.folder = folder
        self._held = held or {}
        self.step: int | None = description["step"]
        self.comparator: str = description["comparator"]
        self.reciprocal: bool = description["reciprocal"]
        self.has_biases: bool = description["biases"]
        self.formats: list[str] = description["formats"]
        self.rows: dict[str, int] = {t["name"]: t["rows"] for t in description["tables"]}
        self._named = {table["name"] for table in description["tables"] if table["named"]}
        self.relations = [Relation(**relation) for relation in description["relations"]]
        # Memory maps are kept: an array that is asked for twice is one.
        self.vectors = cache(self._vectors)
        self.names = cache(self._names)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises DataError where `folder` is no such folder."""
        path = folder / DESCRIPTION
        try:
            return cls(folder, json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no exported vectors ({DESCRIPTION} is missing): finish the run, "
                "or write them with export.py --run=RUN_FOLDER"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error!r}; export again") from error

    def _vectors(self, table: str) -> Floats:
        """(N, D); not in memory as a whole where the format allows it."""
        rows = self._array(table, table, "vector")
        if len(rows) != self.rows[table]:
            raise DataError(
                f"{self.folder}: table {table!r} has {len(rows):,} vectors, {DESCRIPTION} says "
                f"{self.rows[table]:,}; export again"
            )
        return rows

    def refuse_cut_short(self) -> None:
        """Raise DataError where a file of full vectors is missing or cut short; reads no
        vectors.
        """
        for name, rows in (self.rows | {RELATIONS: None}).items():
            for kind in self.formats:
                path = self.folder / (TENSORS if kind == "safetensors" else f"{name}.{kind}")
                try:
                    found = _count_rows(path, kind, name)
                except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                    raise DataError(f"{path} cannot be read: {error}; export again") from error
                if rows is not None and found != rows:
                    raise DataError(f"{path} has {found:,} rows, not {rows:,}; export again")

    def biases(self, table: str) -> Floats | None:
        """(N,), where the model has biases."""
        return self._array(table + BIAS, table, "bias") if self.has_biases else None

    def relation_vector(self, number: int) -> Floats:
        """b_r, d_r or c_r of the operator (D,), 0 where it has none."""
        return np.asarray(self._array(RELATIONS, RELATIONS, "vector")[number])

    def relation_matrix(self, number: int) -> Floats:
        """A_r of a linear or affine operator (D, D)."""
        rows = np.asarray(self._array(MATRICES, MATRICES, "vector")[number])
        dim = round(rows.size**0.5)
        return rows.reshape(dim, dim)

    def _names(self, table: str) -> pa.ChunkedArray | None:
        """Names of the entities in the order of their ids; None where there is no vocabulary."""
        if table not in self._named:
            return None
        is_parquet = "parquet" in self.formats
        path = self.folder / f"{table}{'' if is_parquet else IDS}.parquet"
        try:
            return pq.read_table(path, columns=["entity"]).column("entity")
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}; export again") from error

    def _array(self, name: str, file: str, column: str) -> Floats:
        """An array by its name in npy and safetensors, and its file and column in parquet."""
        if name in self._held:
            return self._held[name]
        try:
            if "npy" in self.formats:
                found: Floats = np.load(self.folder / f"{name}.npy", mmap_mode="r")
                return found
            if "safetensors" in self.formats:
                return _read_tensor(self.folder / TENSORS, name)
            return _read_column(self.folder / f"{file}.parquet", column)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{self.folder}: {name} cannot be read: {error}; export again"
            ) from error


def _count_rows(path: Path, kind: str, name: str) -> int:
    """Of an array in a file of a format."""
    if kind == "parquet":  # whose end says it
        rows: int = pq.read_metadata(path).num_rows
        return rows
    return len(_read_tensor(path, name) if kind == "safetensors" else np.load(path, mmap_mode="r"))


def _read_tensor(path: Path, name: str) -> Floats:
    """A tensor of a safetensors file as a memory map: 8 bytes with the length of the header, the
    header (JSON), the tensors' bytes.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    start = 8 + length + entry["data_offsets"][0]
    return np.memmap(path, np.dtype("<f4"), "r", start, tuple(entry["shape"]))


def _read_column(path: Path, column: str) -> Floats:
    """A column of float32, or of lists of them, as an array (N,) or (N, D)."""
    file = pq.ParquetFile(path)
    field = file.schema_arrow.field(column).type
    width = () if pa.types.is_floating(field) else (field.list_size,)
    whole = np.empty((file.metadata.num_rows, *width), np.float32)
    start = 0
    for batch in file.iter_batches(columns=[column]):
        values = batch.column(0)
        values = values.flatten() if width else values
        stop = start + batch.num_rows
        whole[start:stop] = values.to_numpy(zero_copy_only=False).reshape(-1, *width)
        start = stop
    return whole
