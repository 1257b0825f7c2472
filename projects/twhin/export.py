"""Vectors out: a step folder → `Vectors` in memory, and `Vectors` → files.

    python projects/twhin/export.py --run=RUN_FOLDER [--step=N|best|newest] [--output=FOLDER]
        [--format parquet npy safetensors] [--quantize fp16 int8 pq] [--index auto|none|KIND]

Parquet is the default: `<folder>/<table>.parquet` with columns id (int64), entity (string; where
the table has a vocabulary), bias (float32; where the model has them), vector (list of D float32),
and `<folder>/relations.parquet` with columns id, relation, operator, vector (b_r, d_r or c_r of the
operator, 0 where it has none); for linear and affine operators `relation_matrices.parquet`, whose
vector is A_r row by row. With reciprocal relations those of the inverse directions follow, named
`<relation>:inverse`. The run's own folder, RUN/vectors, has parquet in any case: warm starts and
the ranker read it. The other formats are described in `exported`, quantised vectors and
quantization.json in `quantize`, FAISS indexes in `index`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from projects.twhin import quantize
from projects.twhin.best import STEP_HELP, choose_step, step_argument
from projects.twhin.config import ModelConfig, TwhinConfig
from projects.twhin.exported import DESCRIPTION, FORMATS, RELATIONS, Exported
from projects.twhin.model import Vectors, saved_names
from projects.twhin.operators import PARAMETERS
from projects.twhin.output_folder import refuse_others, replaced
from projects.twhin.quantize import Quantised
from projects.twhin.vector_files import (
    WRITERS,
    RelationRows,
    TableRows,
    arrays_of,
    write_description,
    write_ids,
)
from projects.twhin.vocabulary import names_of, refuse_replaced
from tml import checkpoint, program
from tml.config import ConfigError, load_config
from tml.layout import fold
from tml.machines import environment

COST = "quantization.json"
OURS = frozenset([".parquet", ".npy", ".safetensors", ".faiss"])
"""Endings of exported files; the JSON files beside them are known by name."""

Costs = dict[str, Any]
Measure = Callable[[Mapping[str, Mapping[str, Quantised]]], Costs]


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    formats: Sequence[str] = ("parquet",)
    quantize: Sequence[str] = ()
    pq_bytes: int | None = None
    index: str = "small"
    """none; small: of tables that are searched whole; auto: of all; or FAISS's name of a kind.
    small and auto go without where faiss is not installed.
    """


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


def export_vectors(
    vectors: Vectors,
    config: ModelConfig,
    folder: Path,
    options: ExportOptions = ExportOptions(),
    step: int | None = None,
    measure: Measure | None = None,
) -> list[Path]:
    """Write all tables and relations into `folder`, which is replaced as a whole, and return its
    files.

    step: whose vectors they are. measure: what says what quantising costs, for quantization.json.
    """
    with replaced(folder, _is_ours(folder), "exported vectors") as temporary:
        _write(vectors, config, temporary, options, step, measure)
    return sorted(folder.iterdir())


def _write(
    vectors: Vectors,
    config: ModelConfig,
    folder: Path,
    options: ExportOptions,
    step: int | None,
    measure: Measure | None,
) -> None:
    tables = {
        table.name: TableRows(
            vectors.tables[table.name].contiguous().numpy(),
            vectors.biases[table.name].contiguous().numpy() if config.biases else None,
            names_of(table),
        )
        for table in config.embeddings.tables
    }
    relations = _relation_rows(vectors, config)
    for name in options.formats:
        WRITERS[name](folder, tables, relations)
    if set(options.formats) != {"parquet"}:
        write_ids(folder, tables)
    quantised: dict[str, dict[str, Quantised]] = {}
    for kind in options.quantize:
        quantised[kind] = {}
        for name, table in tables.items():
            program.announce(f"quantising {name} by {kind}")
            rows = quantize.quantise(kind, name, table.vectors, options.pq_bytes)
            quantised[kind][name] = rows
    for kinds in quantised.values():
        for name, rows in kinds.items():
            rows.write(folder, name)
    if quantised and measure is not None:
        (folder / COST).write_text(json.dumps(measure(quantised), indent=2) + "\n")
    description = _describe(config, tables, options, step)
    write_description(folder, description)
    if options.index == "none" or (
        options.index in ("small", "auto") and find_spec("faiss") is None
    ):
        return
    from projects.twhin.index import write_indexes

    exported = Exported(folder, description, arrays_of(tables, relations))
    is_small = options.index == "small"
    write_indexes(exported, "auto" if is_small else options.index, small_only=is_small)


def _describe(
    config: ModelConfig, tables: Mapping[str, TableRows], options: ExportOptions, step: int | None
) -> dict[str, Any]:
    """What vectors.json holds."""
    return {
        "step": step,
        "dim": config.embeddings.tables[0].embedding_dim,
        "comparator": config.comparator,
        "reciprocal": config.reciprocal,
        "biases": config.biases,
        "formats": list(options.formats),
        "quantized": list(options.quantize),
        "tables": [
            {"name": name, "rows": len(table.vectors), "named": table.names is not None}
            for name, table in tables.items()
        ],
        "relations": [
            {"name": r.name, "lhs": r.lhs, "rhs": r.rhs, "operator": r.operator}
            for r in config.relations
        ],
    }


def _relation_rows(vectors: Vectors, config: ModelConfig) -> RelationRows:
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
    matrices = parameters["matrices"].numpy() if "matrices" in parameters else None
    return RelationRows(names, list(kinds), rows.numpy(), matrices)


def resolve_run(
    run: Path, step: int | str | None, overrides: Sequence[str] = ()
) -> tuple[Path, TwhinConfig]:
    """The step folder of a run folder, as `best.choose_step` chooses it, and the config it was made
    with; where the best and the newest differ, a line on stderr says which it is. Raises
    CheckpointError where there is none, or where the vocabularies of the config are other ones by
    now.
    """
    chosen, why = choose_step(run, step)
    if why is not None and environment.rank() == 0:
        print(why, file=sys.stderr)
    folder = run / str(chosen)
    meta = checkpoint.load_meta(folder)
    config = load_config(TwhinConfig, folder / checkpoint.CONFIG, overrides)
    refuse_replaced(folder, meta, config.model)
    return folder, config


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parse(argv)
    return program.exit_code(lambda: _export(arguments), arguments.output or arguments.run)


def _export(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    formats = list(arguments.formats or ["parquet"])
    if arguments.output is None and "parquet" not in formats:
        formats.insert(0, "parquet")  # the run's own vectors: warm starts and the ranker read it
    options = ExportOptions(
        list(dict.fromkeys(formats)),
        list(dict.fromkeys(arguments.quantize or ())),
        arguments.pq_bytes,
        arguments.index,
    )
    if arguments.max_edges is not None and arguments.max_edges < 1:
        raise ConfigError(f"--max-edges: {arguments.max_edges} edges tell nothing; give 1 or more")
    folder, config = resolve_run(arguments.run, arguments.step)
    if "pq" in options.quantize:
        dim = config.model.embeddings.tables[0].embedding_dim
        quantize.check_pq_bytes(dim, arguments.pq_bytes)
    output = arguments.output or arguments.run / "vectors"
    refuse_others(output, _is_ours(output), "exported vectors")  # now, not after the work
    vectors = load_vectors(folder, config.model)
    measure = None
    if options.quantize:
        from projects.twhin import quantization_cost

        measure = partial(
            quantization_cost.measure,
            config,
            vectors,
            split=arguments.split,
            max_edges=arguments.max_edges,
        )
    paths = export_vectors(vectors, config.model, output, options, int(folder.name), measure)
    _show(paths, as_json=arguments.json)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the vectors of a run as files.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=step_argument, help=STEP_HELP)
    parser.add_argument("--output", type=Path, help="default: RUN/vectors")
    parser.add_argument(
        "--format",
        dest="formats",
        nargs="+",
        action="extend",
        choices=FORMATS,
        help="of the full vectors, several allowed; RUN/vectors has parquet in any case",
    )
    parser.add_argument(
        "--quantize",
        nargs="+",
        action="extend",
        choices=quantize.KINDS,
        help="write them in fewer bytes too, several allowed, and measure what that costs",
    )
    parser.add_argument(
        "--pq-bytes", type=int, metavar="M", help="bytes of a row with pq; default: D/4"
    )
    parser.add_argument(
        "--index",
        default="auto",
        metavar="KIND",
        help="FAISS indexes: auto, none, or FAISS's name of a kind such as IVF256,Flat",
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        help="what the cost is measured on; default: validation, where there is none test",
    )
    parser.add_argument(
        "--max-edges", type=int, help="edges ranked for it; default: what takes some seconds"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    return parser.parse_args(argv)


def _show(paths: Sequence[Path], *, as_json: bool) -> None:
    """The files, the indexes that are not exact, and the cost of quantising."""
    costs, indexes = None, []
    for path in paths:
        if path.name == COST:
            costs = json.loads(path.read_text())
        elif path.name.endswith(".index.json"):
            indexes.append(json.loads(path.read_text()))
    if as_json:
        files = {path.name: path.stat().st_size for path in paths}
        found = {"folder": str(paths[0].parent), "files": files, "indexes": indexes}
        print(json.dumps(found | {"quantization": costs}, indent=2))
        return
    print(listed(paths))
    for index in indexes:
        if index["factory"] != "Flat":
            cells = "" if index["nprobe"] is None else f", {index['nprobe']} cells a query"
            print(
                f"index of {index['table']} for {index['answers']}: {index['factory']}{cells}: "
                f"{index['recall']:.1%} of the 10 exactly nearest are found"
            )
    if costs is not None:
        from rich.console import Console

        from projects.twhin import quantization_cost

        Console().print(quantization_cost.render(costs))


def listed(paths: Sequence[Path]) -> str:
    """Their folder, and below it their names, in lines for a terminal."""
    return fold(f"{paths[0].parent}:\n  {', '.join(path.name for path in paths)}")


def _is_ours(folder: Path) -> Callable[[Path], bool]:
    """Whether a file of `folder` is one of an export; none is where nothing says that it is one."""
    names = {DESCRIPTION, f"{RELATIONS}.parquet"}
    is_export = any((folder / name).is_file() for name in names)

    def known(path: Path) -> bool:
        named = path.name in (DESCRIPTION, COST) or path.name.endswith(".index.json")
        return is_export and (named or path.suffix in OURS)

    return known


if __name__ == "__main__":
    sys.exit(main())
