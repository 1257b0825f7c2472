"""Full vectors → files: parquet, npy and safetensors, and `vectors.json` (see `exported`).

All are written in blocks or straight from memory, so that no second copy of a table is made.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from projects.twhin.exported import BIAS, DESCRIPTION, IDS, MATRICES, RELATIONS, TENSORS, Floats

BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class TableRows:
    """What is written of a table. names: of its entities in the order of their ids."""

    vectors: Floats  # (N, D)
    biases: Floats | None = None  # (N,)
    names: pa.LargeStringArray | None = None


@dataclass(frozen=True)
class RelationRows:
    """What is written of the relations, those of inverse directions behind."""

    names: list[str]
    operators: list[str]
    vectors: Floats  # (R, D)
    matrices: Floats | None = None  # (R, D, D)

    def columns(self) -> dict[str, Any]:
        return {"relation": self.names, "operator": self.operators}


def write_parquet(folder: Path, tables: Mapping[str, TableRows], relations: RelationRows) -> None:
    """`<table>.parquet` of each table, relations.parquet, relation_matrices.parquet."""
    for name, table in tables.items():
        columns: dict[str, Any] = {} if table.names is None else {"entity": table.names}
        if table.biases is not None:
            columns["bias"] = table.biases
        _write_rows(folder / f"{name}.parquet", table.vectors, columns)
    _write_rows(folder / f"{RELATIONS}.parquet", relations.vectors, relations.columns())
    if (matrices := relations.matrices) is not None:
        flat = matrices.reshape(len(matrices), -1)
        _write_rows(folder / f"{MATRICES}.parquet", flat, relations.columns())


def write_npy(folder: Path, tables: Mapping[str, TableRows], relations: RelationRows) -> None:
    """One .npy file an array."""
    for name, array in arrays_of(tables, relations).items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def write_safetensors(
    folder: Path, tables: Mapping[str, TableRows], relations: RelationRows
) -> None:
    """All arrays in one file."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    metadata = {"relations": json.dumps(relations.columns())}
    path = folder / TENSORS
    try:
        path.touch()
        mode = path.stat().st_mode  # the library's file is for its owner alone
        save_file(arrays_of(tables, relations), path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


WRITERS = {"parquet": write_parquet, "npy": write_npy, "safetensors": write_safetensors}


def write_ids(folder: Path, tables: Mapping[str, TableRows]) -> None:
    """`<table>.ids.parquet` with columns id and entity, of the tables that have names."""
    for name, table in tables.items():
        if table.names is not None:
            ids = pa.array(np.arange(len(table.names), dtype=np.int64))
            columns = {"id": ids, "entity": table.names}
            pq.write_table(pa.table(columns), folder / f"{name}{IDS}.parquet", compression="zstd")


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """vectors.json."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def arrays_of(tables: Mapping[str, TableRows], relations: RelationRows) -> dict[str, Floats]:
    """Name in npy and safetensors → array."""
    found = {name: table.vectors for name, table in tables.items()}
    for name, table in tables.items():
        if table.biases is not None:
            found[name + BIAS] = table.biases
    found[RELATIONS] = relations.vectors
    if relations.matrices is not None:
        found[MATRICES] = relations.matrices
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _write_rows(path: Path, rows: Floats, columns: dict[str, Any]) -> None:
    """Rows (N, D) with their numbers and other columns of N values."""
    dim = rows.shape[1]
    vector = pa.list_(pa.float32(), dim)
    fields = [pa.field("id", pa.int64())]
    for name in columns:
        fields.append(pa.field(name, pa.float32() if name == "bias" else pa.string()))
    schema = pa.schema([*fields, pa.field("vector", vector)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(rows), BLOCK_ROWS):
            block = np.ascontiguousarray(rows[start : start + BLOCK_ROWS])
            stop = start + len(block)
            arrays = [pa.array(range(start, stop), pa.int64())]
            for field, values in zip(fields[1:], columns.values(), strict=True):
                part = values[start:stop]
                is_arrow = isinstance(part, pa.Array)
                arrays.append(part.cast(field.type) if is_arrow else pa.array(part, field.type))
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
