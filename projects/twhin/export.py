"""Vectors out: a step folder → `Vectors` in memory, and `Vectors` → one parquet file a type of
entity.

Files: `<folder>/<table>.parquet` with columns id (int64), entity (string; where the table has a
vocabulary), bias (float32; where the model has them), vector (list of D float32), and
`<folder>/relations.parquet` with columns id, relation, operator, vector (b_r, d_r or c_r of the
operator, 0 where it has none); for linear and affine operators `relation_matrices.parquet`, whose
vector is A_r row by row. With reciprocal relations those of the inverse directions follow, named
`<relation>:inverse`.

    python projects/twhin/export.py --run=RUN_FOLDER [--step=N|best] [--output=FOLDER]
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from projects.twhin.best import STEP_HELP, best_step, step_argument
from projects.twhin.config import ModelConfig, TableConfig, TwhinConfig
from projects.twhin.model import Vectors, saved_names
from projects.twhin.operators import PARAMETERS
from tml import checkpoint
from tml.config import ConfigError, load_config
from tml.data.parquet import DataError, ParquetRows

BLOCK_ROWS = 1 << 16


def load_vectors(folder: Path, config: ModelConfig) -> Vectors:
    """All vectors of a complete step folder as float32."""
    names = saved_names(config)
    saved = checkpoint.load_whole(folder, names)
    if missing := [name for name in names if name not in saved]:
        raise checkpoint.CheckpointError(
            f"checkpoint {folder} has no {', '.join(missing)}: it is of another model than its "
            "config; train again"
        )
    return Vectors.from_saved(config, saved)


def export_vectors(vectors: Vectors, config: ModelConfig, folder: Path) -> list[Path]:
    """Write the parquet files of all tables and relations into `folder`, which is replaced as a
    whole.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and all(map(_is_vectors, folder.iterdir()))):
        raise DataError(
            f"{folder} holds something else than exported vectors; choose another --output"
        )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for table in config.embeddings.tables:
            names = _read_vocabulary(table)
            path = temporary / f"{table.name}.parquet"
            columns: dict[str, Any] = {} if names is None else {"entity": names}
            if table.name in vectors.biases:
                columns["bias"] = vectors.biases[table.name].numpy()
            _write(path, vectors.tables[table.name], columns)
        _write_relations(vectors, config, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(folder.glob("*.parquet"))


def resolve_run(
    run: Path, step: int | str | None, overrides: Sequence[str] = ()
) -> tuple[Path, TwhinConfig]:
    """The step folder (the newest complete one where `step` is None, the one that best.json names
    where it is "best") of a run folder, and the config it was made with.
    """
    if step == "best":
        step = best_step(run)
    if step is None:
        steps = checkpoint.complete_steps(run)
        if not steps:
            raise checkpoint.CheckpointError(f"{run} holds no complete step folder; train first")
        step = steps[-1]
    folder = run / str(step)
    checkpoint.load_meta(folder)
    return folder, load_config(TwhinConfig, folder / checkpoint.CONFIG, overrides)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=step_argument, help=STEP_HELP)
    parser.add_argument("--output", type=Path, help="default: RUN/vectors")
    arguments = parser.parse_args(argv)
    try:
        folder, config = resolve_run(arguments.run, arguments.step)
        output = arguments.output or arguments.run / "vectors"
        for path in export_vectors(load_vectors(folder, config.model), config.model, output):
            print(path)
    except (ConfigError, DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_vocabularies(config: ModelConfig) -> None:
    """Refuse a vocabulary that export could not use, before time is spent on training."""
    for table in config.embeddings.tables:
        if table.vocab is not None:
            rows = ParquetRows(table.vocab, ["id"]).num_rows
            _check_length(table, rows)


def _check_length(table: TableConfig, num_names: int) -> None:
    if num_names != table.num_embeddings:
        raise DataError(
            f"vocabulary {table.vocab} has {num_names:,} entities, table {table.name!r} has "
            f"{table.num_embeddings:,} rows; set num_embeddings or use the vocabulary of this data"
        )


def _is_vectors(path: Path) -> bool:
    return path.suffix == ".parquet" and path.is_file()


def _read_vocabulary(table: TableConfig) -> list[str] | None:
    """Entity names in the order of their ids, or None where the table has no vocabulary."""
    if table.vocab is None:
        return None
    try:
        vocabulary = pq.read_table(table.vocab, columns=["id", "entity"]).sort_by("id")
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"vocabulary {table.vocab} of table {table.name!r} cannot be read: {error}"
        ) from error
    _check_length(table, vocabulary.num_rows)
    names = vocabulary.column("entity").cast(pa.string()).to_pylist()
    assert isinstance(names, list)
    return names


def _write_relations(vectors: Vectors, config: ModelConfig, folder: Path) -> None:
    """One row a relation, those of inverse relations behind."""
    names = [relation.name for relation in config.relations]
    if config.reciprocal:
        names += [f"{name}:inverse" for name in names]
    kinds = vectors.operators.kinds
    parameters = {name: p.detach() for name, p in vectors.operators.named_parameters()}
    rows = torch.zeros(len(kinds), vectors.operators.dim)
    for number, kind in enumerate(kinds):
        for name in PARAMETERS[kind]:
            if name != "matrices":
                rows[number] = parameters[name][number]
    columns = {"relation": names, "operator": list(kinds)}
    _write(folder / "relations.parquet", rows, columns)
    if "matrices" in parameters:
        _write(folder / "relation_matrices.parquet", parameters["matrices"].flatten(1), columns)


def _write(path: Path, rows: Tensor, columns: dict[str, Any]) -> None:
    """Rows (N, D) float32 with their numbers and other columns of N values; in blocks, so that
    memory stays flat.
    """
    dim = rows.shape[1]
    vector = pa.list_(pa.float32(), dim)
    fields = [pa.field("id", pa.int64())]
    for name in columns:
        fields.append(pa.field(name, pa.float32() if name == "bias" else pa.string()))
    schema = pa.schema([*fields, pa.field("vector", vector)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS].contiguous().cpu().numpy()
            stop = start + len(block)
            arrays = [pa.array(range(start, stop), pa.int64())]
            for field, values in zip(fields[1:], columns.values(), strict=True):
                arrays.append(pa.array(values[start:stop], field.type))
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


if __name__ == "__main__":
    sys.exit(main())
