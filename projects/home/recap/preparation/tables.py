"""Inputs → one table of rows: reading, joining, splitting.

Every row of the table has the columns SPLIT (train, held_out, validation, test or null: left out)
and DAY (days since 1970, where there is a time).
"""

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import polars as pl

from projects.home.recap.preparation.config import (
    HoldOut,
    InputConfig,
    JoinConfig,
    PrepareConfig,
    TimeConfig,
    TimeSplit,
)
from projects.home.recap.preparation.derive import derive, unit_hash
from tml.config import ConfigError
from tml.data.parquet import DataError

SPLIT = "split of the row"
DAY = "day of the row"
SPLITS = ("train", "held_out", "validation", "test")

Tables = dict[str, pl.DataFrame]


def read_tables(config: PrepareConfig, paths: Mapping[str, Path]) -> Tables:
    """Each input that the config names; raises ConfigError, DataError."""
    wanted = config.table_names()
    if wanted != set(paths):
        missing = ", ".join(sorted(wanted - set(paths))) or "none"
        unknown = ", ".join(sorted(set(paths) - wanted)) or "none"
        raise ConfigError(
            f"--input: the config reads {', '.join(sorted(wanted))}; missing: {missing}; "
            f"not known: {unknown}; give each as --input NAME=PATH"
        )
    if unread := sorted(set(config.inputs) - wanted):
        raise ConfigError(f"inputs.{unread[0]}: no table of that name is used")
    return {
        name: read_table(paths[name], name, config.inputs.get(name, InputConfig()))
        for name in sorted(wanted)
    }


def read_table(path: Path, name: str, options: InputConfig) -> pl.DataFrame:
    """One file, or all parquet files of a folder."""
    try:
        frame = _read(path, options)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"input {name}: {path} cannot be read: {_one_line(error)}") from error
    for column, prefix in options.strip_prefix.items():
        need(frame, column, f"inputs.{name}.strip_prefix")
        frame = frame.with_columns(_strip(frame[column], prefix, path))
    frame = frame.rename(options.rename)
    for one in options.derive:
        if one.buckets_of is not None and one.edges is None:
            raise ConfigError(
                f"inputs.{name}.derive.{one.name}: the buckets of an input need edges; quantiles "
                "are learned on training rows, after the join"
            )
        for column in one.sources():
            need(frame, column, f"inputs.{name}.derive.{one.name}")
        frame, _ = derive(frame, one, pl.Series([True] * len(frame), dtype=pl.Boolean))
    if not len(frame):
        raise DataError(f"input {name}: {path} has no rows")
    return frame


def _read(path: Path, options: InputConfig) -> pl.DataFrame:
    if path.is_dir():
        return pl.read_parquet(path / "**/*.parquet")
    stem = path.name.removesuffix(".gz")
    if stem.endswith(".parquet"):
        return pl.read_parquet(path)
    frame = pl.read_csv(
        path,
        separator=options.separator or ("\t" if stem.endswith(".tsv") else ","),
        has_header=options.columns is None,
        new_columns=options.columns,
        null_values=options.null_values or None,
        infer_schema_length=None,  # all rows: a late text in a column of numbers is no surprise
        quote_char=None if stem.endswith(".tsv") else '"',
    )
    if text := [name for name in options.text if frame.schema.get(name) != pl.String]:
        return pl.read_csv(
            path,
            separator=options.separator or ("\t" if stem.endswith(".tsv") else ","),
            has_header=options.columns is None,
            new_columns=options.columns,
            null_values=options.null_values or None,
            infer_schema_length=None,
            schema_overrides=dict.fromkeys(text, pl.String),
        )
    return frame


def _strip(values: pl.Series, prefix: str, path: Path) -> pl.Series:
    odd = values.filter(~values.str.starts_with(prefix))
    if len(odd):
        raise DataError(
            f"{path}: column {values.name!r} holds {odd[0]!r}, which does not begin with {prefix!r}"
        )
    rest = values.str.strip_prefix(prefix)
    numbers = rest.cast(pl.Int64, strict=False)
    return rest if numbers.null_count() > rest.null_count() else numbers


def join(rows: pl.DataFrame, tables: Tables, options: JoinConfig) -> pl.DataFrame:
    """`rows` with the columns of a table, found by its key; order and number of rows stay."""
    table, where = tables[options.table], f"joins.{options.table}"
    need(rows, options.key, where)
    need(table, options.key, where)
    for column in options.columns or ():
        need(table, column, where)
    if options.columns is not None:
        table = table.select(options.key, *options.columns)
    # In the type of the rows: keys that differ as text or as fractions may be one number there.
    key = same_type(table[options.key], rows[options.key], where)
    if (doubled := key.is_duplicated() & key.is_not_null()).any():
        raise DataError(
            f"{where}: {options.key} {key.filter(doubled)[0]!r} is there more than once; the rows "
            "would be doubled; give each key once"
        )
    added = {name: options.prefix + name for name in table.columns if name != options.key}
    if clash := sorted(set(added.values()) & set(rows.columns)):
        raise ConfigError(
            f"{where}: the rows have {', '.join(clash)} already; set another prefix, or columns"
        )
    table = table.rename(added).with_columns(key)
    return rows.join(table, on=options.key, how="left", maintain_order="left")


def same_type(key: pl.Series, like: pl.Series, where: str) -> pl.Series:
    """`key` in the type of `like`, so that equal values meet; raises DataError if it cannot be."""
    try:
        cast = key.cast(like.dtype)
        if key.dtype.is_float() and like.dtype.is_integer() and (cut := cast != key).any():
            raise DataError(
                f"{where}: column {key.name!r} holds {key.filter(cut)[0]}, that of the rows whole "
                "numbers; mend the column"
            )
        return cast
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{where}: column {key.name!r} ({key.dtype}) cannot be compared with that of the rows "
            f"({like.dtype}): {_one_line(error)}"
        ) from error


def main_rows(config: PrepareConfig, tables: Tables) -> pl.DataFrame:
    """The rows of the main input, joined, with SPLIT and DAY; those of no split are left out."""
    parts = []
    for split, name in config.main_tables().items():
        part = tables[name]
        parts.append(part.with_columns(pl.lit(split or None, dtype=pl.String).alias(SPLIT)))
        if parts[0].columns != part.columns + [SPLIT]:
            raise DataError(
                f"input {name} has other columns than the first main input: "
                f"{', '.join(part.columns)}; the first has {', '.join(parts[0].columns[:-1])}"
            )
    try:
        rows = pl.concat(parts, how="vertical_relaxed", rechunk=True)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"the main inputs {', '.join(config.main_tables().values())} have columns of other "
            f"types: {_one_line(error)}; name such columns in inputs.<name>.text"
        ) from error
    if config.time is not None:
        need(rows, config.time.column, "time")
        rows = rows.with_columns(_days(rows, config.time).alias(DAY))
    if config.split.by_time is not None:
        rows = rows.with_columns(_split_by_time(rows[DAY], config.split.by_time))
    if config.split.hold_out is not None:
        rows = _hold_out(rows, config.split.hold_out, config.seed)
    rows = rows.filter(pl.col(SPLIT).is_not_null())
    _refuse_empty_splits(rows, config)
    for one in config.joins:
        rows = join(rows, tables, one)
    return rows


def _days(rows: pl.DataFrame, time: TimeConfig) -> pl.Series:
    """Days since 1970 of each row."""
    column = rows[time.column]
    if column.dtype == pl.Date or column.dtype.base_type() == pl.Datetime:
        days = column.cast(pl.Date).cast(pl.Int32)
    elif time.format in ("epoch_ms", "epoch_s"):
        day = 86_400_000 if time.format == "epoch_ms" else 86_400
        shift = int(time.utc_offset_hours * day / 24)
        days = ((column.cast(pl.Int64) + shift) // day).cast(pl.Int32)
    else:
        text = column.cast(pl.String)
        days = text.str.to_date(time.format, strict=False).cast(pl.Int32)
    if days.null_count():
        row = int(days.is_null().arg_true()[0])
        raise DataError(
            f"time: row {row} has {column[row]!r} in {time.column!r}, which {time.format!r} does "
            "not describe; set time.format, or mend the row"
        )
    return days


def _split_by_time(days: pl.Series, spans: TimeSplit) -> pl.Series:
    def between(first: date | None, last: date | None) -> pl.Expr:
        chosen = pl.lit(True)
        if first is not None:
            chosen = chosen & (pl.col(DAY) >= day_number(first))
        if last is not None:
            chosen = chosen & (pl.col(DAY) <= day_number(last))
        return chosen

    split = pl.lit(None, dtype=pl.String)
    if spans.test is not None:
        split = pl.when(between(*spans.test)).then(pl.lit("test")).otherwise(split)
    split = pl.when(between(*spans.validation)).then(pl.lit("validation")).otherwise(split)
    train = between(spans.train_from, spans.train_until)
    split = pl.when(train).then(pl.lit("train")).otherwise(split)
    return pl.DataFrame({DAY: days}).select(split.alias(SPLIT))[SPLIT]


def day_number(day: date) -> int:
    """Days since 1970."""
    return (day - date(1970, 1, 1)).days


def _hold_out(rows: pl.DataFrame, options: HoldOut, seed: int) -> pl.DataFrame:
    train = pl.col(SPLIT) == "train"
    if options.last_days is not None:
        last = rows.filter(train)[DAY].max()
        assert isinstance(last, int)
        chosen = pl.col(DAY) > last - options.last_days
    else:
        assert options.share is not None
        key = pl.int_range(pl.len())
        if options.key is not None:
            need(rows, options.key, "split.hold_out")
            key = pl.col(options.key)
        chosen = pl.lit(unit_hash(rows.select(key).to_series(), seed) < options.share)
    held = pl.when(train & chosen).then(pl.lit("held_out")).otherwise(pl.col(SPLIT))
    return rows.with_columns(held.alias(SPLIT))


def _refuse_empty_splits(rows: pl.DataFrame, config: PrepareConfig) -> None:
    found = set(rows[SPLIT].unique())
    by_time = config.split.by_time
    wanted = ["train", "validation"] + ["test"] * bool(by_time is not None and by_time.test)
    for split in wanted:
        if split not in found:
            days = ""
            if DAY in rows.columns and len(rows):
                first, last = rows[DAY].cast(pl.Date).min(), rows[DAY].cast(pl.Date).max()
                days = f"; the other rows are of {first!s} to {last!s}"
            raise DataError(f"split: no row falls into {split}{days}; change the spans")


def need(frame: pl.DataFrame, column: str, where: str) -> None:
    """Raise ConfigError if there is no such column."""
    if column not in frame.columns:
        raise ConfigError(
            f"{where}: there is no column {column!r}; there are {', '.join(frame.columns)}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
