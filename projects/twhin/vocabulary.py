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

from projects.twhin.config import ModelConfig
from tml.checkpoint import CheckpointError
from tml.data.parquet import DataError

META_KEY = "vocabularies"
Fingerprints = dict[str, dict[str, Any]]


def read_names(path: Path | str, what: str) -> pa.LargeStringArray:
    """The column entity of a parquet file in the order of its column id. `what` names the file in
    errors: "vocabulary" or "vectors".
    """
    try:
        table = pq.read_table(path, columns=["id", "entity"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{what} {path} cannot be read: {error}") from error
    ids = table.column("id").to_numpy()
    if len(ids) and not (ids[:-1] < ids[1:]).all():
        table = table.take(np.argsort(ids, kind="stable"))
    names = table.column("entity").cast(pa.large_string()).combine_chunks()
    return pa.concat_arrays(names.chunks) if isinstance(names, pa.ChunkedArray) else names


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
            "entities": None
            if table.vocab is None
            else fingerprint(read_names(table.vocab, "vocabulary")),
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
