"""Tables → the files that the ranker trains on.

    python projects/home/recap/prepare.py --config projects/home/recap/config/prepare/X.yaml \\
        --input exposures=exposures.csv.gz --input users=users.csv.gz … --output DIR

The config (preparation/config.py) says which tables are joined, how rows are split, and what
becomes of which column. Vocabularies and statistics are learned from the training rows alone; rates
of labels never look ahead. DIR gets

    train/ validation/ [test/] [held_out/]   parquet files
    spec.yaml                                what their columns are (data/spec.py)
    vocabularies/<feature>.parquet           value i is row i + 1
    statistics.json                          {"names", "mean", "std"} of the continuous features
                                             after sign(x)·log1p(|x|), for z_score_log_config
    learned.json                             edges and quantiles of derived and transformed columns
    summary.json config.yaml                 counts; the config that made all this

whole or not at all.
"""

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from rich.console import Console, Group, RenderableType

from projects.home.recap.preparation import encode
from projects.home.recap.preparation.config import CategoricalConfig, LabelConfig, PrepareConfig
from projects.home.recap.preparation.derive import derive, equals
from projects.home.recap.preparation.rates import all_rates
from projects.home.recap.preparation.tables import (
    SPLIT,
    SPLITS,
    Tables,
    main_rows,
    need,
    read_tables,
)
from tml import layout
from tml.config import ConfigError, load_config, to_yaml
from tml.data.folders import new_folder
from tml.data.parquet import DataError
from tml.machines import container

SUMMARY = "summary.json"
SPEC = "spec.yaml"
STATISTICS = "statistics.json"
ROW_GROUP_ROWS = 1 << 16


@dataclass
class Prepared:
    """The features of all rows, and what was learned."""

    columns: dict[str, pl.Series] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    vocabularies: dict[str, pl.DataFrame] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, values: pl.Series, part: str) -> None:
        """One more column of the files; refuses a name that is taken."""
        if name in self.columns:
            raise ConfigError(f"{part}: the name {name!r} is taken by another column; rename it")
        self.columns[name] = values.alias(name)


def prepare(
    config: PrepareConfig, inputs: Mapping[str, Path], output: Path, overwrite: bool = False
) -> dict[str, Any]:
    """Read, join, split, encode and write; returns what summary.json holds. Raises ConfigError,
    DataError.
    """
    with new_folder(output, SUMMARY, overwrite) as folder:
        tables = read_tables(config, inputs)
        rows = main_rows(config, tables)
        for name in config.outcomes:  # a name that nothing has would guard nothing
            need(rows, name, "outcomes")
        train = rows[SPLIT] == "train"
        prepared = Prepared()
        for one in config.derive:
            for column in one.sources():
                need(rows, column, f"derive.{one.name}")
            rows, learned = derive(rows, one, train)
            if learned is not None:
                prepared.learned[one.name] = learned
        labels = make_labels(rows, config)
        make_features(rows, labels, tables, config, prepared)
        summary = summarise(prepared, rows[SPLIT], labels)
        write(folder, prepared, rows[SPLIT], summary)
        (folder / "config.yaml").write_text(to_yaml(config))
    return summary


def make_labels(rows: pl.DataFrame, config: PrepareConfig) -> pl.DataFrame:
    """A column of 0 and 1 for each task; raises DataError for anything else."""
    made = {}
    for task in config.labels:
        label, column = config.label(task), config.label_column(task)
        need(rows, column, f"labels.{task}")
        made[task] = _label(rows[column], label, task)
    return pl.DataFrame(made)


def _label(column: pl.Series, label: LabelConfig, task: str) -> pl.Series:
    if label.equals is not None:
        return column.to_frame().select(equals(column, label.equals)).to_series()
    values = encode.to_number(column, f"labels.{task}")
    odd = ~values.is_in([0.0, 1.0]).fill_null(False)
    if odd.any():
        row = int(odd.arg_true()[0])
        raise DataError(
            f"labels.{task}: row {row} has {column[row]!r} in {column.name!r}; a label is 0 or 1; "
            "say with equals which value counts as 1, or mend the row"
        )
    return values.cast(pl.Int8)


def make_features(
    rows: pl.DataFrame,
    labels: pl.DataFrame,
    tables: Tables,
    config: PrepareConfig,
    prepared: Prepared,
) -> None:
    """Fill `prepared` with all columns of the files, in the order of the spec."""
    train, spec = rows[SPLIT] == "train", prepared.spec
    for number in config.continuous_columns():
        need(rows, number.column, "continuous")
        values, learned = encode.continuous(rows[number.column], number, train)
        name = number.name or number.column
        prepared.add(name, values, "continuous")
        if learned is not None:
            prepared.learned[name] = learned
    for name, numbers in all_rates(rows, labels, tables, config):
        prepared.add(name, pl.Series(numbers.astype(np.float32)), "rates")
    spec["continuous"] = list(prepared.columns)
    for name in config.binary:
        need(rows, name, "binary")
        prepared.add(name, _binary(rows[name]), "binary")
    spec["binary"] = config.binary
    for part, make in (("categorical", encode.categorical), ("bags", encode.bag)):
        spec[part] = {}
        for name, given in getattr(config, part).items():
            one = given or CategoricalConfig()
            need(rows, one.column or name, f"{part}.{name}")
            values, vocabulary = make(rows[one.column or name], one, train)
            column = f"{part}.{name}"  # the raw column may be passed on as an id
            prepared.add(column, values, part)
            num_values = one.hash_rows or 0
            if vocabulary is not None:
                prepared.vocabularies[name] = vocabulary
                num_values = len(vocabulary) + 1
            spec[part][name] = {"column": column, "num_values": num_values}
    spec["ids"] = config.ids
    spec["timestamp"] = config.timestamp
    for name in dict.fromkeys([*config.ids, *filter(None, [config.timestamp])]):
        need(rows, name, "ids")
        prepared.add(name, _whole(rows[name]), "ids")
    for task in labels.columns:
        prepared.add(f"label.{task}", labels[task], "labels")
    spec["labels"] = {task: f"label.{task}" for task in labels.columns}
    if config.weight is not None:
        need(rows, config.weight, "weight")
        weight = encode.to_number(rows[config.weight], "weight").cast(pl.Float32)
        prepared.add("weight", weight, "weight")
        spec["weight"] = "weight"


def _binary(column: pl.Series) -> pl.Series:
    values = encode.to_number(column, "binary").fill_null(0.0)
    odd = ~values.is_in([0.0, 1.0])
    if odd.any():
        raise DataError(
            f"binary: column {column.name!r} holds {values.filter(odd)[0]:g}; a binary feature is "
            "0 or 1; make it continuous or categorical, or derive one with equals"
        )
    return values.cast(pl.Int8)


def _whole(column: pl.Series) -> pl.Series:
    if not column.dtype.is_integer() or column.null_count():
        what = "nulls" if column.null_count() else str(column.dtype)
        raise DataError(f"ids: column {column.name!r} holds {what}; ids are whole numbers")
    return column.cast(pl.Int64)


def write(folder: Path, prepared: Prepared, split: pl.Series, summary: Mapping[str, Any]) -> None:
    """Fill `folder` with all that the docstring above lists, but config.yaml."""
    frame = pl.DataFrame(list(prepared.columns.values()))
    for name in summary["rows"]:
        (folder / name).mkdir()
        part = frame.filter(split == name)
        part.write_parquet(folder / name / "part-0.parquet", row_group_size=ROW_GROUP_ROWS)
    (folder / "vocabularies").mkdir()
    for name, vocabulary in prepared.vocabularies.items():
        vocabulary.write_parquet(folder / "vocabularies" / f"{name}.parquet")
    (folder / SPEC).write_text(yaml.safe_dump(prepared.spec, sort_keys=False, width=100))
    statistics = statistics_of(prepared, split)
    for name, tree in ((STATISTICS, statistics), ("learned.json", prepared.learned)):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def statistics_of(prepared: Prepared, split: pl.Series) -> dict[str, Any]:
    """Mean and deviation over the training rows of each continuous feature as ZScoreLog sees it:
    non-finite → 0, then sign(x)·log1p(|x|).
    """
    train = (split == "train").to_numpy()
    found = []
    for name in prepared.spec["continuous"]:
        values = prepared.columns[name].to_numpy()[train].astype(np.float64)
        values = encode.signed_log(np.where(np.isfinite(values), values, 0.0))
        found.append(encode.mean_and_deviation(values))
    return {
        "names": prepared.spec["continuous"],
        "mean": [mean for mean, _ in found],
        "std": [std for _, std in found],
    }


def summarise(prepared: Prepared, split: pl.Series, labels: pl.DataFrame) -> dict[str, Any]:
    """Rows and positives of each split, and the share of unknown values of each feature there."""
    present = [name for name in SPLITS if (split == name).any()]
    chosen = {name: split == name for name in present}
    unknown: dict[str, dict[str, float]] = {}
    for name in prepared.spec["continuous"]:
        is_unknown = prepared.columns[name].is_nan()
        if is_unknown.any():
            unknown[name] = _shares(is_unknown, chosen)
    for name, one in prepared.spec["categorical"].items():
        unknown[name] = _shares(prepared.columns[one["column"]] == 0, chosen)
    for name, one in prepared.spec["bags"].items():
        only = prepared.columns[one["column"]].list.max().fill_null(0) == 0
        unknown[name] = _shares(only, chosen)
    return {
        "rows": {name: int(at.sum()) for name, at in chosen.items()},
        "positives": {
            task: {name: int(labels[task].filter(at).sum()) for name, at in chosen.items()}
            for task in labels.columns
        },
        "features": {
            "continuous": len(prepared.spec["continuous"]),
            "binary": len(prepared.spec["binary"]),
            "categorical": {n: c["num_values"] for n, c in prepared.spec["categorical"].items()},
            "bags": {n: c["num_values"] for n, c in prepared.spec["bags"].items()},
        },
        "unknown": unknown,
    }


def _shares(values: pl.Series, chosen: Mapping[str, pl.Series]) -> dict[str, float]:
    return {
        name: round(int(values.filter(at).sum()) / int(at.sum()), 4) for name, at in chosen.items()
    }


def render(summary: Mapping[str, Any]) -> RenderableType:
    """The summary for people."""
    splits = list(summary["rows"])
    rows = layout.table([""], splits)
    rows.add_row("rows", *(f"{summary['rows'][split]:,}" for split in splits))
    for task, counts in summary["positives"].items():
        shares = [
            f"{counts[split]:,} ({counts[split] / summary['rows'][split]:.2%})" for split in splits
        ]
        rows.add_row(task, *shares)
    unknown = layout.table(["feature"], ["values", *splits])
    sizes = {**summary["features"]["categorical"], **summary["features"]["bags"]}
    for name, shares_of in summary["unknown"].items():
        size = f"{sizes[name]:,}" if name in sizes else ""
        unknown.add_row(name, size, *(f"{shares_of[split]:.2%}" for split in splits))
    numbers = summary["features"]
    text = (
        f"{numbers['continuous']} continuous, {numbers['binary']} binary, "
        f"{len(numbers['categorical'])} categorical features, {len(numbers['bags'])} bags"
    )
    tables = (
        layout.titled("rows and positives", rows),
        layout.titled("share of unknown values", unknown),
    )
    return Group(*tables, text)


def _parse_input(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ConfigError(f"--input {text}: write it as NAME=PATH")
    if not Path(path).exists():
        raise ConfigError(f"--input {text}: there is no {path}")
    return name, Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make the files that the ranker trains on from CSV, TSV or parquet."
    )
    parser.add_argument("--config", required=True, help="YAML file; see config/prepare/")
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=PATH", help="a table of the config"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value: a.b=v"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for what the caller can mend."""
    flags = _parser().parse_args(argv)
    # A polite kill unwinds like an error, so that nothing is left behind.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        config = load_config(PrepareConfig, flags.config, flags.set)
        inputs = dict(_parse_input(text) for text in flags.input)
        summary = prepare(config, inputs, flags.output, flags.overwrite)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    console = Console()
    if flags.json:
        print(json.dumps(summary))
        return 0
    console.print(render(summary))
    console.print(f"written: {flags.output}", soft_wrap=True)
    if container.vanishes(flags.output):
        console.print(f"warning: {container.advice('--output', flags.output)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
