"""The vocabulary of a table, known again by a fingerprint: which entity each row stands for.

A step folder's meta.json holds `vocabularies`: table → {"rows": N, "entities": hash or null}. Rows
of a checkpoint mean nothing under another vocabulary, so a run is not taken up with one.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from projects.twhin.config import ModelConfig, TableConfig
from tml.checkpoint import CheckpointError
from tml.data.parquet import DataError, ParquetRows

META_KEY = "vocabularies"
Fingerprints = dict[str, dict[str, Any]]
Ints = NDArray[np.int64]


def read_names(path: Path | str, what: str) -> pa.LargeStringArray:
    """The column entity of a parquet file in the order of its column id. `what` names the file in
    errors: "vocabulary" or "vectors".
    """
    return _read(path, what)[1]


def names_of(table: TableConfig) -> pa.LargeStringArray | None:
    """The entities of a table in the order of its rows; None where it has no vocabulary. Raises
    DataError where the vocabulary does not name each row once.
    """
    if table.vocab is None:
        return None
    ids, names = _read(table.vocab, "vocabulary")
    _check_length(table, len(names))
    if len(wrong := np.flatnonzero(ids != np.arange(len(ids)))):
        raise DataError(
            f"vocabulary {table.vocab}: in place of the id {wrong[0]} there is "
            f"{ids[wrong[0]]}; the ids of table {table.name!r} must be 0 to "
            f"{table.num_embeddings - 1:,}, each once"
        )
    return names


def check_lengths(config: ModelConfig) -> None:
    """Refuse a vocabulary of another number of rows, without reading its names."""
    for table in config.embeddings.tables:
        if table.vocab is not None:
            _check_length(table, ParquetRows(table.vocab, ["id"]).num_rows)


def match(names: pa.LargeStringArray, previous: pa.LargeStringArray, table: str) -> Ints:
    """Place of each of `names` in `previous`, −1 where it is new; (rows,)."""
    for which, found in (("this run's", names), ("the previous", previous)):
        if len(found.unique()) < len(found):
            counts = found.value_counts()
            double = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
            raise DataError(
                f"warm_start: table {table!r}: {which} vocabulary has the entity "
                f"{double.as_py()!r} twice; its row cannot be told"
            )
    places: Ints = pc.index_in(names, value_set=previous).fill_null(-1).to_numpy().astype(np.int64)
    return places


def fingerprint(names: pa.LargeStringArray) -> str:
    """A hash of the names in their order."""
    found = hashlib.blake2b(digest_size=16)
    found.update(pc.binary_length(names).fill_null(-1).to_numpy().tobytes())
    # Arrow keeps the letters of all strings one behind the other, and where each begins.
    _, offsets, letters = names.buffers()
    bounds = np.frombuffer(offsets, np.int64)[names.offset : names.offset + len(names) + 1]
    if letters is not None and len(names):
        found.update(memoryview(letters)[int(bounds[0]) : int(bounds[-1])])
    return found.hexdigest()


def fingerprints(config: ModelConfig) -> Fingerprints:
    """Of each table: its rows, and the hash of its vocabulary, None where it has none."""
    return {
        table.name: {
            "rows": table.num_embeddings,
            "entities": None if (names := names_of(table)) is None else fingerprint(names),
        }
        for table in config.embeddings.tables
    }


def refuse_another(folder: Path, meta: dict[str, Any], now: Fingerprints) -> None:
    """Raise CheckpointError where a step folder was made with another vocabulary than `now`; what a
    folder does not say (an older one, a table without a vocabulary) is not compared.
    """
    for name, before in meta.get(META_KEY, {}).items():
        table = now.get(name)
        if table is None:
            continue
        remedy = (
            "its rows stand for other entities; to start from its vectors, matched by entity, use "
            "another --save_dir and --warm_start RUN, or prepare the data as before"
        )
        if before["rows"] != table["rows"]:
            raise CheckpointError(
                f"checkpoint {folder} is of another vocabulary: table {name!r} has "
                f"{before['rows']:,} rows there, {table['rows']:,} in the config; {remedy}"
            )
        known = before["entities"] is not None and table["entities"] is not None
        if known and before["entities"] != table["entities"]:
            raise CheckpointError(
                f"checkpoint {folder} is of another vocabulary: table {name!r} has as many rows, "
                f"but other entities or another order of them; {remedy}"
            )


def refuse_replaced(folder: Path, meta: dict[str, Any], config: ModelConfig) -> None:
    """As `refuse_another`, for the vocabularies of the run's own config: a file may have been
    written anew since. One that is not there is not compared.
    """
    if META_KEY not in meta:
        return
    tables = [
        table if table.vocab and Path(table.vocab).is_file() else _nameless(table)
        for table in config.embeddings.tables
    ]
    embeddings = config.embeddings.model_copy(update={"tables": tables})
    now = fingerprints(config.model_copy(update={"embeddings": embeddings}))
    refuse_another(folder, meta, now)


def _nameless(table: TableConfig) -> TableConfig:
    return table.model_copy(update={"vocab": None})


def _read(path: Path | str, what: str) -> tuple[Ints, pa.LargeStringArray]:
    """The columns id, ascending, and entity."""
    try:
        table = pq.read_table(path, columns=["id", "entity"])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]  # below it Arrow lists its own columns
        raise DataError(f"{what} {path} cannot be read: {reason}") from error
    ids = table.column("id").to_numpy()
    if len(ids) and not (ids[:-1] < ids[1:]).all():
        order = np.argsort(ids, kind="stable")
        ids, table = ids[order], table.take(order)
    names = table.column("entity").cast(pa.large_string()).combine_chunks()
    if isinstance(names, pa.ChunkedArray):
        names = pa.concat_arrays(names.chunks)
    return ids, names


def _check_length(table: TableConfig, num_names: int) -> None:
    if num_names != table.num_embeddings:
        raise DataError(
            f"vocabulary {table.vocab} has {num_names:,} entities, table {table.name!r} has "
            f"{table.num_embeddings:,} rows; set num_embeddings or use the vocabulary of this data"
        )
