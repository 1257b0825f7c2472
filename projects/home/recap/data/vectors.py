"""Vectors of an exported table, looked up by an id of the row: `VectorLookup`."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.home.recap.data.config import VectorTable
from tml.data.parquet import DataError

ENTITY, VECTOR = "entity", "vector"
_DECIMAL = r"^(0|-?[1-9][0-9]{0,17}|[1-9][0-9]{18})$"
_LARGEST = str(np.iinfo(np.int64).max)


def read_width(config: VectorTable) -> int:
    """Length of the vectors, from the file's first row. Raises DataError."""
    with _open(config) as file:
        kind = file.schema_arrow.field(VECTOR).type
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        for batch in file.iter_batches(batch_size=1, columns=[VECTOR]):
            if batch.num_rows and batch.column(0)[0].is_valid:
                return len(batch.column(0)[0])
    raise DataError(f"vector_tables: {config.path} holds no vector in its first row")


class VectorLookup:
    """One table in memory. Entities that are no whole numbers can be no row's id and are left
    out.
    """

    def __init__(self, config: VectorTable) -> None:
        self.name, self.by = config.name, config.by
        self.width = read_width(config)
        self.num_missing = 0
        """Rows so far whose id was not in the table; they got zeros."""
        self.num_found = 0
        with _open(config) as file:
            table = file.read(columns=[ENTITY, VECTOR]).combine_chunks()
        ids, rows = _whole_numbers(table.column(ENTITY).combine_chunks(), config)
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        if (twice := np.flatnonzero(self._ids[1:] == self._ids[:-1])).size:
            raise DataError(
                f"vector_tables: {config.path} holds entity {self._ids[twice[0]]} twice; export "
                "the table anew"
            )
        self._vectors = _matrix(table.column(VECTOR).combine_chunks(), self.width, config)
        self._vectors = self._vectors[rows[order]]

    def __call__(self, ids: Tensor) -> Tensor:
        """(B,) int64 ids → (B, width) float32 vectors."""
        wanted = ids.numpy()
        vectors = np.zeros((len(wanted), self.width), dtype=np.float32)
        if len(self._ids):
            place = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
            known = self._ids[place] == wanted
            vectors[known] = self._vectors[place[known]]
            self.num_found += int(known.sum())
        self.num_missing = self.num_missing + len(wanted) - int(len(self._ids) and known.sum())
        return torch.from_numpy(vectors)


def _open(config: VectorTable) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(config.path)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"vector_tables: {config.path} cannot be read as parquet: {reason}"
        ) from error
    for column in (ENTITY, VECTOR):
        if column not in file.schema_arrow.names:
            raise DataError(
                f"vector_tables: {config.path} has no column {column!r}; it has "
                f"{', '.join(file.schema_arrow.names)}"
            )
    return file


def _whole_numbers(
    entities: pa.Array, config: VectorTable
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The entities that are whole numbers, and their rows."""
    if pa.types.is_integer(entities.type):
        valid = entities.is_valid()
    else:
        if not (pa.types.is_string(entities.type) or pa.types.is_large_string(entities.type)):
            raise DataError(
                f"vector_tables: {config.path}: entity is {entities.type}; text or whole numbers "
                "are wanted"
            )
        valid = pc.match_substring_regex(entities, _DECIMAL)
        # Texts of equal length compare as their numbers do.
        fits = pc.or_(
            pc.less(pc.utf8_length(entities), len(_LARGEST)),
            pc.or_(pc.starts_with(entities, "-"), pc.less_equal(entities, _LARGEST)),
        )
        valid = pc.fill_null(pc.and_(valid, fits), False)
    rows = np.flatnonzero(valid.to_numpy(zero_copy_only=False))
    chosen = entities.take(pa.array(rows)).cast(pa.int64())
    return chosen.to_numpy(zero_copy_only=False), rows


def _matrix(vectors: pa.Array, width: int, config: VectorTable) -> NDArray[np.float32]:
    """(n, width)."""
    lengths = pc.fill_null(pc.list_value_length(vectors), -1).to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero(lengths != width)).size:
        found = "null" if lengths[wrong[0]] < 0 else f"of length {lengths[wrong[0]]}"
        raise DataError(
            f"vector_tables: {config.path}, row {wrong[0]}: the vector is {found}, that of the "
            f"first row has length {width}"
        )
    flat = vectors.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(-1, width)
