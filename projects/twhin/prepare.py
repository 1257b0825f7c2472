"""Edge lists → training data: ids in place of names, split into train, valid and test, with a
vocabulary for each type.

Input: text (TSV or CSV, gzipped or not) or parquet with a left-hand entity, a relation and a
right-hand entity a row, ids of any kind; or adjacency lines `user item item …`. All of it is held
in memory, about 100 bytes an edge.

    python projects/twhin/prepare.py --train edges.tsv.gz --test later.tsv.gz --output DIR \\
        --relation long_view=user:video --relation like=user:video --drop-other-relations
    python projects/twhin/prepare.py --train facts.tsv --split 0.9,0.05,0.05 --entity-type entity
    --output DIR python projects/twhin/prepare.py --train lines.txt --format adjacency --relation
    interact=user:item --output DIR

Output, a folder that appears whole or not at all:

    train/part-*.parquet  valid/ test/   columns lhs, rel, rhs (int64), in a random order given by
    --seed vocab/<type>.parquet                 columns id (int64), entity (string); the row of its
    table is the id graph.yaml                           what a config needs to know of the data:
    `run.py --graph=DIR` counts.json                          edges, entities, what was dropped

Ids go by descending number of training edges, then by name, so that the rows that are read most lie
side by side. Entities that only valid or test know come last; they are kept and counted. An edge
given twice in a split is written once, unless --keep-duplicates. An edge of valid or test that is a
training edge too is kept and counted.
"""

import argparse
import csv
import gzip
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tml import layout
from tml.config import ConfigError, read_yaml
from tml.data.folders import new_folder
from tml.machines import container

SPLITS = ("train", "valid", "test")
CONFIG_KEYS = {"train": "train_data", "valid": "validation_data", "test": "test_data"}
FORMATS = ("auto", "tsv", "csv", "parquet", "adjacency")
ROW_GROUP_ROWS = 1 << 16
PART_ROWS = 1 << 22
MAX_ROWS_SHOWN = 12
MAX_NAME_SHOWN = 40
COUNTS = "counts.json"
"""The file by which an output folder is known as one."""

Ints = NDArray[np.int64]
Columns = dict[str, Ints]
"""lhs, rel, rhs of the edges of a split."""


class PrepareError(ConfigError):
    """Input or a flag that the caller has to mend; the message says what, where and how."""


@dataclass(frozen=True)
class Relation:
    """A type of edge and the types of its two ends."""

    name: str
    lhs: str
    rhs: str


@dataclass(frozen=True)
class Options:
    """What `prepare` is asked for; the fields are the flags of the command line."""

    output: Path
    train: Sequence[Path]
    valid: Sequence[Path] = ()
    test: Sequence[Path] = ()
    format: str = "auto"
    header: bool = False
    columns: Sequence[str] | None = None
    time_column: str | None = None
    relations: Sequence[Relation] = ()
    entity_type: str | None = None
    only: Sequence[str] = ()
    drop_other_relations: bool = False
    split: Sequence[float] | None = None
    time_cuts: Sequence[str] | None = None
    keep_duplicates: bool = False
    seed: int = 1
    overwrite: bool = False


@dataclass
class Graph:
    """Edges by split, numbered; vocabularies[type][id] is the entity's name."""

    relations: list[Relation]
    vocabularies: dict[str, pl.Series]
    splits: dict[str, Columns]
    dropped: dict[str, Any] = field(default_factory=dict)


def prepare(options: Options) -> dict[str, Any]:
    """Read, number, split and write; returns the counts. Raises PrepareError for what the caller
    can mend.
    """
    _check_options(options)
    with new_folder(options.output, COUNTS, options.overwrite) as folder:
        frames = {
            split: read_edges(paths, options)
            for split in SPLITS
            if (paths := getattr(options, split))
        }
        relations, dropped = choose_relations(frames, options)
        if options.time_column is not None:
            frames = split_by_time(frames["train"], options)
        graph = number_edges(frames, relations)
        graph.dropped["other_relations"] = dropped
        if not options.keep_duplicates:
            drop_doubles(graph, across_splits=options.time_column is not None)
        if options.split is not None and options.time_column is None:
            graph.splits = split_at_random(graph.splits["train"], options.split, options.seed)
        order_by_frequency(graph)
        return write_graph(folder, graph, options.seed)


# Reading


def read_edges(paths: Sequence[Path], options: Options) -> pl.DataFrame:
    """Rows of all files: lhs, rel, rhs as strings, and time where options.time_column names it."""
    frames = [_read_file(path, options) for path in paths]
    if len({frame.schema.get("time") for frame in frames}) > 1:
        listed = ", ".join(map(str, paths))
        raise PrepareError(f"time column: some of {listed} hold numbers there, others text")
    return pl.concat(frames)


def _read_file(path: Path, options: Options) -> pl.DataFrame:
    if not path.is_file():
        raise PrepareError(
            f"input {path}: there is no such file; check the path{container.outside(path)}"
        )
    kind = _format_of(path, options.format)
    try:
        if kind == "adjacency":
            frame = _read_adjacency(path, options)
        elif kind == "parquet":
            frame = _read_parquet(path, options)
        else:
            frame = _read_text(path, "," if kind == "csv" else "\t", options)
    except pl.exceptions.NoDataError as error:
        raise PrepareError(f"input {path} is empty; leave it out or make it again") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PrepareError(
            f"input {path} cannot be read as {kind}: {reason}; fetch or make it again, "
            "or name its --format"
        ) from error
    if frame.is_empty():
        raise PrepareError(f"input {path} holds no edge; leave it out or make it again")
    if "time" in frame.columns:
        frame = frame.with_columns(_to_time(frame["time"], path))
    return frame


def _format_of(path: Path, given: str) -> str:
    if given != "auto":
        return given
    suffix = Path(path.name.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in ("tsv", "csv", "parquet"):
        raise PrepareError(
            f"input {path}: its name does not tell its format; give --format tsv, csv, parquet "
            "or adjacency"
        )
    return suffix


def _read_text(path: Path, separator: str, options: Options) -> pl.DataFrame:
    quote = '"' if separator == "," else None
    try:
        frame = pl.read_csv(
            path,
            has_header=options.header,
            separator=separator,
            quote_char=quote,
            infer_schema=False,  # all columns are strings: 007 is not 7
        )
    except pl.exceptions.NoDataError:
        raise
    except pl.exceptions.ComputeError as error:
        _explain_bad_line(path, separator, options.header)
        raise error
    frame = _select(frame, path, options, by_name=options.header)
    if any(frame.null_count().row(0)):
        # Blank lines carry nothing; anything else that is missing is an error.
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
        if any(frame.null_count().row(0)):
            _explain_bad_line(path, separator, options.header)
            _refuse_nulls(frame, path)
    return frame


def _read_parquet(path: Path, options: Options) -> pl.DataFrame:
    frame = _select(pl.scan_parquet(path), path, options, by_name=True)
    for name, dtype in frame.schema.items():
        if name == "time":
            continue
        if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum)):
            raise PrepareError(
                f"input {path}: the column for {name} holds {dtype}; ids must be integers or "
                "strings"
            )
    frame = frame.with_columns(pl.all().cast(pl.String))
    _refuse_nulls(frame, path)
    return frame


def _read_adjacency(path: Path, options: Options) -> pl.DataFrame:
    """`user item item …`, separated by blanks or tabs → one edge an item; a user alone is no
    edge.
    """
    lines = pl.read_csv(
        path,
        has_header=False,
        separator="\x1f",  # in no line: each is one field
        quote_char=None,
        infer_schema=False,
        new_columns=["line"],
    )
    words = lines.drop_nulls().select(words=pl.col("line").str.extract_all(r"\S+"))
    return (
        words.select(lhs=pl.col("words").list.first(), rhs=pl.col("words").list.slice(1))
        .filter(pl.col("rhs").list.len() > 0)
        .explode("rhs")
        .select("lhs", pl.lit(options.relations[0].name).alias("rel"), "rhs")
    )


def _select(
    frame: pl.DataFrame | pl.LazyFrame, path: Path, options: Options, by_name: bool
) -> pl.DataFrame:
    """The columns that --columns and --time-column ask for, under the names lhs, rel, rhs, time."""
    names = frame.collect_schema().names()
    wanted = options.columns or (("lhs", "rel", "rhs") if by_name else ("1", "2", "3"))
    roles = ("lhs", "rel", "rhs") if len(wanted) == 3 else ("lhs", "rhs")
    expressions = [
        pl.col(_find(column, names, path, by_name)).alias(role)
        for role, column in zip(roles, wanted, strict=True)
    ]
    if options.time_column is not None:
        found = _find(options.time_column, names, path, by_name)
        expressions.append(pl.col(found).alias("time"))
    selected = frame.lazy().select(expressions).collect()
    if len(roles) == 2:
        name = options.relations[0].name
        selected = selected.insert_column(
            1, pl.repeat(name, len(selected), eager=True).alias("rel")
        )
    return selected


def _find(column: str, names: Sequence[str], path: Path, by_name: bool) -> str:
    if by_name and column in names:
        return column
    if column.isdigit() and 1 <= int(column) <= len(names):
        return names[int(column) - 1]
    if by_name:
        raise PrepareError(
            f"input {path} has no column {column!r}; it has {', '.join(names)}: name the columns "
            "of lhs, rel and rhs with --columns (and --time-column)"
        )
    raise PrepareError(
        f"input {path}: its lines have {len(names)} columns, there is no column {column!r}; "
        "without --header, --columns and --time-column take numbers from 1 on, as in 1,2,3"
    )


def _explain_bad_line(path: Path, separator: str, header: bool) -> None:
    """Raise PrepareError for the first line that has another number of columns, an empty id or no
    valid UTF-8.
    """
    expected = 0
    with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"input {path}, line {number}"
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise PrepareError(
                    f"{where}: {line[:80]!r} is not UTF-8; convert the file"
                ) from error
            if not text:
                continue
            fields = next(csv.reader([text])) if separator == "," else text.split(separator)
            expected = expected or len(fields)
            if len(fields) != expected:
                raise PrepareError(
                    f"{where}: {len(fields)} columns in place of {expected}: {text[:200]!r}; "
                    "mend the line, or name the file's --format"
                )
            if "" in fields and not (header and number == 1):
                raise PrepareError(
                    f"{where}: column {fields.index('') + 1} is empty: {text[:200]!r}; every "
                    "edge needs two ids and a relation: mend or remove the line"
                )


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _refuse_nulls(frame: pl.DataFrame, path: Path) -> None:
    for name in frame.columns:
        column = frame[name]
        missing = column.is_null()
        if column.dtype == pl.String:
            missing = missing | (column == "")
        if missing.any():
            row = int(missing.fill_null(True).arg_max() or 0)
            raise PrepareError(
                f"input {path}, row {row} (from 0): {name} is empty; every edge needs two ids and "
                "a relation" + (", and a time" if name == "time" else "")
            )


def _to_time(column: pl.Series, path: Path) -> pl.Series:
    """Numbers where all values are numbers; text, such as ISO dates, where none is."""
    numbers = column.cast(pl.Float64, strict=False)
    num_words = numbers.null_count()
    if not num_words:
        return numbers
    if num_words == len(column):
        return column
    word = column.filter(numbers.is_null())[0]
    raise PrepareError(f"time column of {path}: {word!r} is not a number while other values are")


# Relations and ids


def choose_relations(
    frames: dict[str, pl.DataFrame], options: Options
) -> tuple[list[Relation], dict[str, int]]:
    """The relations that are kept, in the order of their numbers; rows of others are taken out of
    `frames` in place.

    Returns also how many rows of each other relation were dropped. Declared relations keep their
    order; relations found in the data go by descending number of training rows.
    """
    counts = pl.concat(frames.values(), how="diagonal").group_by("rel").len()
    rows: dict[str, int] = dict(counts.sort("len", "rel", descending=[True, False]).iter_rows())
    if options.entity_type is not None:
        in_train = dict(frames["train"].group_by("rel").len().iter_rows())
        found = sorted(rows, key=lambda name: (-in_train.get(name, 0), name))
        relations = [Relation(name, options.entity_type, options.entity_type) for name in found]
    else:
        relations = list(options.relations)
    declared = [relation.name for relation in relations]
    if absent := [name for name in (*declared, *options.only) if name not in rows]:
        raise PrepareError(
            f"relation {absent[0]!r} is asked for, but no input has an edge of it; there are "
            f"{_list(list(rows))}"
        )
    if undeclared := [name for name in options.only if name not in declared]:
        raise PrepareError(f"--only {undeclared[0]}: the relation is not declared; add --relation")
    others = {name: count for name, count in rows.items() if name not in declared}
    if others and not (options.drop_other_relations or options.only):
        listed = _list([f"{name} ({count:,} rows)" for name, count in others.items()])
        raise PrepareError(
            f"the data has relations that are not declared: {listed}; declare each with "
            f"--relation {next(iter(others))}=LHS_TYPE:RHS_TYPE, or leave them out with "
            "--drop-other-relations"
        )
    kept = [relation for relation in relations if not options.only or relation.name in options.only]
    names = [relation.name for relation in kept]
    dropped = {name: count for name, count in rows.items() if name not in names}
    if dropped:
        for split, frame in frames.items():
            frames[split] = frame.filter(pl.col("rel").is_in(names))
    for split, frame in frames.items():
        if frame.is_empty():
            raise PrepareError(
                f"the files of --{split} hold no edge of {_list(names)}; leave them out"
            )
    return kept, dropped


def number_edges(frames: dict[str, pl.DataFrame], relations: Sequence[Relation]) -> Graph:
    """Names → numbers; `frames` is emptied on the way, to hold the strings no longer than
    needed.
    """
    rel_of = pl.Enum([relation.name for relation in relations])
    splits: dict[str, Columns] = {}
    for split, frame in frames.items():
        splits[split] = {"rel": _codes(frame["rel"], rel_of)}
        frames[split] = frame.select("lhs", "rhs")
    types = list(dict.fromkeys(kind for r in relations for kind in (r.lhs, r.rhs)))
    vocabularies: dict[str, pl.Series] = {}
    for kind in types:
        parts = []
        for split, frame in frames.items():
            for side in ("lhs", "rhs"):
                chosen = _rows_of(kind, side, relations, splits[split]["rel"])
                if chosen is not None:
                    parts.append(_take(frame[side], chosen).unique().rename("entity"))
        vocabularies[kind] = pl.concat(parts).unique().sort()
    for side in ("lhs", "rhs"):
        for split in list(frames):
            rel = splits[split]["rel"]
            ids = np.empty(len(rel), dtype=np.int64)
            for kind in types:
                chosen = _rows_of(kind, side, relations, rel)
                if chosen is not None:
                    of_kind = pl.Enum(vocabularies[kind])
                    ids[chosen] = _codes(_take(frames[split][side], chosen), of_kind)
            splits[split][side] = ids
            frames[split] = frames[split].drop(side)
    return Graph(list(relations), vocabularies, splits)


def _rows_of(
    kind: str, side: str, relations: Sequence[Relation], rel: Ints
) -> slice | NDArray[np.bool_] | None:
    """Which rows have an entity of type `kind` on `side`: all of them, a mask, or none of them."""
    has = np.array([getattr(relation, side) == kind for relation in relations])
    if has.all():
        return slice(None)
    return has[rel] if has.any() else None


def _take(column: pl.Series, chosen: slice | NDArray[np.bool_]) -> pl.Series:
    return column if isinstance(chosen, slice) else column.filter(pl.Series(chosen))


def _codes(column: pl.Series, names: pl.Enum) -> Ints:
    codes: Ints = column.cast(names).to_physical().cast(pl.Int64).to_numpy()
    return codes


def order_by_frequency(graph: Graph) -> None:
    """Renumber each type's entities by descending number of training edges; equal ones keep the
    order of their names.
    """
    degrees = {kind: np.zeros(len(names), np.int64) for kind, names in graph.vocabularies.items()}
    for kind, side, chosen in _sides(graph, graph.splits["train"]["rel"]):
        ids = graph.splits["train"][side][chosen]
        degrees[kind] += np.bincount(ids, minlength=len(degrees[kind]))
    new_ids = {}
    for kind, degree in degrees.items():
        order = np.argsort(-degree, kind="stable")
        graph.vocabularies[kind] = graph.vocabularies[kind].gather(order)
        new_ids[kind] = np.empty_like(order)
        new_ids[kind][order] = np.arange(len(order))
    for columns in graph.splits.values():
        renumbered = {side: np.empty_like(columns[side]) for side in ("lhs", "rhs")}
        for kind, side, chosen in _sides(graph, columns["rel"]):
            renumbered[side][chosen] = new_ids[kind][columns[side][chosen]]
        columns.update(renumbered)


def _sides(graph: Graph, rel: Ints) -> Iterator[tuple[str, str, slice | NDArray[np.bool_]]]:
    for kind in graph.vocabularies:
        for side in ("lhs", "rhs"):
            chosen = _rows_of(kind, side, graph.relations, rel)
            if chosen is not None:
                yield kind, side, chosen


# Splits and doubles


def split_by_time(frame: pl.DataFrame, options: Options) -> dict[str, pl.DataFrame]:
    """Rows → train, valid, test by their time: at --time-cuts, or where --split's fractions of the
    rows have passed.

    Rows of one time stay together. A cut is the first time of the later split.
    """
    times = frame["time"]
    if options.time_cuts is not None:
        names = list(SPLITS) if len(options.time_cuts) == 2 else ["train", "test"]
        cuts = [_parse_cut(cut, times) for cut in options.time_cuts]
    else:
        assert options.split is not None
        shares = {name: share for name, share in zip(SPLITS, options.split, strict=True) if share}
        names = list(shares)
        ordered = times.sort()
        positions = np.cumsum(list(shares.values()))[:-1] * len(ordered)
        cuts = [ordered[min(round(position), len(ordered) - 1)] for position in positions]
    number = pl.repeat(0, len(times), eager=True)
    for cut in cuts:
        number += (times >= cut).cast(pl.Int32)
    frame = frame.drop("time")
    parts = {name: frame.filter(number == i) for i, name in enumerate(names)}
    if empty := [name for name, part in parts.items() if part.is_empty()]:
        raise PrepareError(
            f"split by time: no edge falls into {empty[0]}; times go from {times.min()!r} to "
            f"{times.max()!r}, the cuts are {', '.join(map(str, cuts))}"
        )
    return parts


def _parse_cut(cut: str, times: pl.Series) -> Any:
    if times.dtype == pl.String:
        return cut
    try:
        return float(cut)
    except ValueError as error:
        raise PrepareError(
            f"--time-cuts {cut}: the time column holds numbers; give a number"
        ) from error


def split_at_random(edges: Columns, fractions: Sequence[float], seed: int) -> dict[str, Columns]:
    """Edges → train, valid, test in these shares; a part of share 0 is left out."""
    order = np.random.default_rng([seed, 1]).permutation(len(edges["rel"]))
    cuts = [0, *(round(position) for position in np.cumsum(fractions) * len(order))]
    parts = {
        name: {column: values[order[cuts[i] : cuts[i + 1]]] for column, values in edges.items()}
        for i, name in enumerate(SPLITS)
    }
    parts = {name: part for name, part in parts.items() if fractions[SPLITS.index(name)]}
    if empty := [name for name, part in parts.items() if not len(part["rel"])]:
        raise PrepareError(
            f"--split: {len(order)} edges are too few to leave one for {empty[0]}; "
            f"the fractions are {', '.join(map(str, fractions))}"
        )
    return parts


def drop_doubles(graph: Graph, across_splits: bool) -> None:
    """Keep one of equal edges of a split; `across_splits`: only in the first split that has it."""
    earlier: list[Ints] = []
    graph.dropped["duplicates"] = {}
    for split, columns in graph.splits.items():
        keys = _sorted_once(_to_keys(graph, columns))
        if across_splits:
            for others in earlier:
                keys = keys[~_is_among(keys, others)]
            earlier.append(keys)
        graph.dropped["duplicates"][split] = len(columns["rel"]) - len(keys)
        if not len(keys):
            raise PrepareError(
                f"no edge is left for {split}: each of them is in an earlier split too"
            )
        graph.splits[split] = _from_keys(graph, keys)


def _sorted_once(keys: Ints) -> Ints:
    """The different ones among `keys`, sorted. np.unique of numpy 2.4 takes ten times as long."""
    keys = np.sort(keys)
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    once: Ints = keys[is_first]
    return once


def _is_among(keys: Ints, others: Ints) -> NDArray[np.bool_]:
    """Which of `keys` are among `others`, which are sorted and not empty."""
    places = np.searchsorted(others, keys)
    found: NDArray[np.bool_] = others[np.minimum(places, len(others) - 1)] == keys
    return found


def _to_keys(graph: Graph, columns: Columns) -> Ints:
    """One integer for each edge, equal where the edges are."""
    width = _width(graph)
    return (columns["rel"] * width + columns["lhs"]) * width + columns["rhs"]


def _from_keys(graph: Graph, keys: Ints) -> Columns:
    width = _width(graph)
    rest, rhs = np.divmod(keys, width)
    rel, lhs = np.divmod(rest, width)
    return {"lhs": lhs, "rel": rel, "rhs": rhs}


def _width(graph: Graph) -> int:
    width = max(len(names) for names in graph.vocabularies.values())
    assert len(graph.relations) * width**2 < 2**63, "too many entities for one integer an edge"
    return width


# Writing


def write_graph(folder: Path, graph: Graph, seed: int) -> dict[str, Any]:
    """Fill `folder` with all that the docstring above lists; returns the counts."""
    counts = count(graph)
    for number, (split, columns) in enumerate(graph.splits.items()):
        order = np.random.default_rng([seed, 2, number]).permutation(len(columns["rel"]))
        _write_edges(folder / split, columns, order)
    (folder / "vocab").mkdir()
    for kind, names in graph.vocabularies.items():
        table = pa.table(
            {"id": np.arange(len(names)), "entity": names.to_arrow().cast(pa.string())}
        )
        pq.write_table(table, folder / "vocab" / f"{kind}.parquet")
    (folder / "graph.yaml").write_text(_config_fragment(graph))
    (folder / COUNTS).write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
    return counts


def _write_edges(folder: Path, columns: Columns, order: Ints) -> None:
    folder.mkdir()
    for part, start in enumerate(range(0, len(order), PART_ROWS)):
        rows = order[start : start + PART_ROWS]
        table = pa.table({name: columns[name][rows] for name in ("lhs", "rel", "rhs")})
        pq.write_table(
            table,
            folder / f"part-{part:05d}.parquet",
            row_group_size=ROW_GROUP_ROWS,
            compression="lz4",  # read faster than zstd, for a few more bytes
            use_dictionary=["rel"],
        )


def _config_fragment(graph: Graph) -> str:
    tables = [
        {
            "name": kind,
            "num_embeddings": len(names),
            "vocab": f"${{HERE}}/vocab/{_escape(kind)}.parquet",
        }
        for kind, names in graph.vocabularies.items()
    ]
    relations = [
        {"name": r.name, "lhs": r.lhs, "rhs": r.rhs, "operator": "translation"}
        for r in graph.relations
    ]
    tree: dict[str, Any] = {
        "model": {
            "embeddings": {
                "tables": [{**table, "name": _escape(table["name"])} for table in tables]
            },
            "relations": [
                {key: _escape(value) for key, value in relation.items()} for relation in relations
            ],
        }
    }
    for split in graph.splits:
        tree[CONFIG_KEYS[split]] = {"data_root": f"${{HERE}}/{split}/*.parquet"}
    head = "# What a config needs to know of these edges; ${HERE} is the folder of this file.\n"
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _escape(text: Any) -> str:
    """A name as the loader of configs reads it back: `$` begins a variable there."""
    return str(text).replace("$", "$$")


# Counts


def count(graph: Graph) -> dict[str, Any]:
    """Edges by relation and split, entities by type, what is unseen in training, what was dropped;
    JSON-able.
    """
    num_relations = len(graph.relations)
    edges = {
        split: np.bincount(columns["rel"], minlength=num_relations)
        for split, columns in graph.splits.items()
    }
    seen = {kind: np.zeros(len(names), bool) for kind, names in graph.vocabularies.items()}
    train = graph.splits["train"]
    for kind, side, chosen in _sides(graph, train["rel"]):
        seen[kind][train[side][chosen]] = True
    others = {split: columns for split, columns in graph.splits.items() if split != "train"}
    train_keys = np.sort(_to_keys(graph, train)) if others else np.empty(0, np.int64)
    return {
        "edges": {split: int(numbers.sum()) for split, numbers in edges.items()},
        "relations": {
            relation.name: {split: int(numbers[number]) for split, numbers in edges.items()}
            for number, relation in enumerate(graph.relations)
        },
        "entities": {
            kind: {"all": len(names), "unseen_in_train": int((~seen[kind]).sum())}
            for kind, names in graph.vocabularies.items()
        },
        "edges_with_unseen_entity": {
            split: _count_unseen(graph, columns, seen) for split, columns in others.items()
        },
        "edges_also_in_train": {
            split: int(_is_among(_to_keys(graph, columns), train_keys).sum())
            for split, columns in others.items()
        },
        "dropped": graph.dropped,
    }


def _count_unseen(graph: Graph, columns: Columns, seen: Mapping[str, NDArray[np.bool_]]) -> int:
    has_unseen = np.zeros(len(columns["rel"]), bool)
    for kind, side, chosen in _sides(graph, columns["rel"]):
        has_unseen[chosen] |= ~seen[kind][columns[side][chosen]]
    return int(has_unseen.sum())


def render(counts: dict[str, Any]) -> RenderableType:
    """Tables of the counts."""
    splits = list(counts["edges"])
    edges = layout.table(["relation"], splits)
    edges.add_row("all", *(f"{counts['edges'][split]:,}" for split in splits), end_section=True)
    for name, row in list(counts["relations"].items())[:MAX_ROWS_SHOWN]:
        shown = name if len(name) <= MAX_NAME_SHOWN else "…" + name[1 - MAX_NAME_SHOWN :]
        edges.add_row(Text(shown), *(f"{row[split]:,}" for split in splits))
    hidden = len(counts["relations"]) - MAX_ROWS_SHOWN
    note = f"… {hidden} more relations in counts.json" if hidden > 0 else ""
    entities = layout.table(["type"], ["entities", "unseen in train"])
    for kind, row in counts["entities"].items():
        entities.add_row(Text(kind), f"{row['all']:,}", f"{row['unseen_in_train']:,}")
    notes = [
        *_notes(counts["dropped"].get("other_relations", {}), "rows of relation {} dropped"),
        *_notes(counts["dropped"].get("duplicates", {}), "duplicates of {} dropped"),
        *_notes(counts["edges_with_unseen_entity"], "edges of {} have an entity unseen in train"),
        *_notes(counts["edges_also_in_train"], "edges of {} are in train too"),
    ]
    tables = (layout.titled("edges", edges, note), layout.titled("entities", entities))
    return Group(*tables, *map(Text, notes))


def _notes(numbers: Mapping[str, int], text: str) -> list[str]:
    return [f"{number:,} {text.format(name)}" for name, number in numbers.items() if number]


# Command line


def _check_options(options: Options) -> None:
    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise PrepareError(message)

    refuse(not options.train, "--train: name at least one file")
    refuse(
        bool(options.relations) == (options.entity_type is not None),
        "give --relation NAME=LHS_TYPE:RHS_TYPE (or --relations FILE) for each relation, or "
        "--entity-type where all entities are of one type",
    )
    names = [relation.name for relation in options.relations]
    for name in names:
        refuse(names.count(name) > 1, f"--relation {name}: the relation is declared twice")
    for kind in [options.entity_type, *(k for r in options.relations for k in (r.lhs, r.rhs))]:
        refuse(
            kind is not None and (not kind or "/" in kind or kind.startswith(".")),
            f"entity type {kind!r}: it names a file and a table; use letters, digits and _",
        )
    columns = options.columns
    refuse(
        columns is not None and len(columns) not in (2, 3),
        f"--columns {','.join(columns or ())}: name the columns of lhs, rel and rhs, or of lhs "
        "and rhs",
    )
    refuse(
        ((columns is not None and len(columns) == 2) or options.format == "adjacency")
        and len(options.relations) != 1,
        "data without a column of relations: declare exactly one --relation NAME=LHS_TYPE:RHS_TYPE",
    )
    splits = options.split is not None or options.time_cuts is not None
    refuse(
        splits and bool(options.valid or options.test),
        "--split and --time-cuts split the --train files; leave out --valid and --test",
    )
    refuse(
        options.split is not None and options.time_cuts is not None,
        "give --split or --time-cuts, not both",
    )
    refuse(
        options.time_cuts is not None and len(options.time_cuts) not in (1, 2),
        "--time-cuts: give the first time of test, or the first times of valid and of test: T "
        "or T1,T2",
    )
    refuse(
        (options.time_column is None) and options.time_cuts is not None,
        "--time-cuts needs --time-column",
    )
    refuse(
        options.time_column is not None and not splits,
        "--time-column is for splitting by time: add --split or --time-cuts",
    )
    refuse(
        options.time_column is not None and options.format == "adjacency",
        "--time-column: adjacency lines have no time",
    )
    fractions = options.split
    refuse(
        fractions is not None
        and (
            len(fractions) != 3
            or min(fractions) < 0
            or not fractions[0] > 0
            or abs(sum(fractions) - 1) > 1e-6
        ),
        f"--split {','.join(map(str, fractions or ()))}: give the fractions of train, valid and "
        "test; they add up to 1, such as 0.9,0.05,0.05",
    )


def _parse_relation(text: str) -> Relation:
    name, _, types = text.rpartition("=")
    lhs, _, rhs = types.partition(":")
    if not (name and lhs and rhs) or ":" in rhs:
        raise PrepareError(
            f"--relation {text}: write it as NAME=LHS_TYPE:RHS_TYPE, such as like=user:video"
        )
    return Relation(name, lhs, rhs)


def _read_relations(path: Path) -> list[Relation]:
    relations = []
    for name, types in read_yaml(path).items():
        if not isinstance(types, str) or types.count(":") != 1:
            raise PrepareError(
                f"{path}: {name}: {types!r} is not LHS_TYPE:RHS_TYPE, such as user:video"
            )
        relations.append(_parse_relation(f"{name}={types}"))
    if not relations:
        raise PrepareError(f"{path} declares no relation; write lines such as  like: user:video")
    return relations


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_ROWS_SHOWN])
    return shown + (
        f" and {len(names) - MAX_ROWS_SHOWN} more" if len(names) > MAX_ROWS_SHOWN else ""
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them") from error


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Edge lists → training data for projects/twhin/run.py.",
        epilog="The head of projects/twhin/prepare.py describes the output and has examples.",
    )

    def add(flag: str, help: str, **settings: Any) -> None:
        parser.add_argument(flag, help=help, **settings)

    def repeatable(flag: str, metavar: str, help: str) -> None:
        add(flag, help + "; repeatable", action="append", default=[], metavar=metavar)

    files: dict[str, Any] = {"type": Path, "nargs": "+", "metavar": "FILE"}
    switch: dict[str, Any] = {"action": "store_true"}
    add("--train", "edges to train on, or to split", required=True, **files)
    add("--valid", "edges to validate on", default=[], **files)
    add("--test", "edges to test on", default=[], **files)
    add("--output", "folder to make", type=Path, required=True, metavar="DIR")
    add("--overwrite", "replace the output folder if it is there", **switch)
    repeatable("--relation", "NAME=LHS:RHS", "a relation and its types, numbered in this order")
    add("--relations", "the same as YAML, `name: LHS:RHS` a line", type=Path, metavar="FILE")
    add("--entity-type", "the one type of all entities; relations are as found", metavar="TYPE")
    repeatable("--only", "NAME", "keep this relation, drop the others")
    add("--drop-other-relations", "drop rows of relations that are not declared", **switch)
    add(
        "--format",
        "adjacency: `user item item …` a line; auto: by the file's name",
        choices=FORMATS,
        default="auto",
    )
    add("--header", "the first line of text files names the columns", **switch)
    add(
        "--columns",
        "columns of lhs, rel, rhs: numbers from 1 on, or names (parquet, --header); two columns: "
        "lhs and rhs of the one relation that is declared",
        type=_words,
        metavar="A,B,C",
    )
    add(
        "--split",
        "fractions of train, valid and test, cut from the --train files at random, or by "
        "--time-column, earliest first",
        type=_numbers,
        metavar="F,F,F",
    )
    add("--time-column", "numbers, or text that sorts by time (ISO dates)", metavar="C")
    add(
        "--time-cuts",
        "in place of --split: the first time of test, or of valid and of test",
        type=_words,
        metavar="T[,T]",
    )
    add("--keep-duplicates", "keep edges that are given more than once", **switch)
    add("--seed", "of the random order and split (default 1)", type=int, default=1)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for what the caller can mend."""
    arguments = vars(_parser().parse_args(argv))
    # A polite kill unwinds like an error, so that nothing is left behind.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        relations = [_parse_relation(text) for text in arguments.pop("relation")]
        if (file := arguments.pop("relations")) is not None:
            relations += _read_relations(file)
        options = Options(relations=relations, **arguments)
        counts = prepare(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    console = Console()
    console.print(render(counts))
    console.print(f"written: {options.output}", soft_wrap=True)
    if container.vanishes(options.output):
        console.print(f"warning: {container.advice('--output', options.output)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
