"""Columns made of other columns."""

from typing import Any

import polars as pl

from projects.home.recap.data.spec import hash_values
from projects.home.recap.preparation.config import DeriveConfig
from tml.config import ConfigError


def derive(
    frame: pl.DataFrame, config: DeriveConfig, train: pl.Series
) -> tuple[pl.DataFrame, dict[str, Any] | None]:
    """`frame` with one column more, and what was learned for it.

    train: which rows are trained on (booleans); only they are learned from.
    """
    if config.name in frame.columns:
        raise ConfigError(f"derive.{config.name}: there is a column of that name already")
    learned = None
    if config.buckets_of is not None:
        values = frame[config.buckets_of].cast(pl.Float64)
        edges = config.edges
        if edges is None:
            edges = quantile_edges(values.filter(train), config.num_buckets)
            learned = {"edges": edges}
        made = bucketise(values, edges)
    else:
        made = frame.select(_expression(config, frame)).to_series()
    return frame.with_columns(made.alias(config.name)), learned


def _expression(config: DeriveConfig, frame: pl.DataFrame) -> pl.Expr:
    if config.hour_of is not None:
        return _time(config.hour_of, config.format, "hour")
    if config.weekday_of is not None:
        return _time(config.weekday_of, config.format, "weekday")
    if config.cross is not None:
        # ␟ (unit separator) does not occur in values; a null in one is a null of the cross.
        return pl.concat_str([pl.col(name).cast(pl.String) for name in config.cross], separator="␟")
    if config.equals is not None:
        ((column, value),) = config.equals.items()
        return equals(frame[column], value)
    if config.is_null is not None:
        return pl.col(config.is_null).is_null().cast(pl.Int8)
    assert config.item_of is not None
    parts = pl.col(config.item_of).cast(pl.String).str.split(config.separator)
    return parts.list.get(config.index, null_on_oob=True)


def _time(column: str, form: str, part: str) -> pl.Expr:
    value = pl.col(column)
    if form == "hourmin":
        if part != "hour":
            raise ConfigError(f"derive: hourmin of {column!r} has no {part}")
        return value.cast(pl.Int64) // 100
    if form in ("epoch_ms", "epoch_s"):
        time = pl.from_epoch(value.cast(pl.Int64), time_unit="ms" if form == "epoch_ms" else "s")
    else:
        time = value.cast(pl.String).str.to_datetime(form, strict=False)
    return time.dt.hour() if part == "hour" else time.dt.weekday()


def equals(column: pl.Series, value: Any) -> pl.Expr:
    """1 where the column has the value, else 0; values are compared as text, but numbers as
    numbers.
    """
    if column.dtype.is_numeric() and not isinstance(value, str):
        same: pl.Expr = pl.col(column.name) == value
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        same = pl.col(column.name).cast(pl.String) == text
    return same.fill_null(False).cast(pl.Int8)


def quantile_edges(values: pl.Series, num_buckets: int) -> list[float]:
    """Upper edges of buckets with as many of the values each; fewer where values are many times
    the same.
    """
    values = values.drop_nulls().drop_nans()
    found = [values.quantile(i / num_buckets, "lower") for i in range(1, num_buckets)]
    return sorted({float(edge) for edge in found if edge is not None})


def bucketise(values: pl.Series, edges: list[float]) -> pl.Series:
    """Bucket i holds edges[i − 1] < x ≤ edges[i]; null and NaN stay null."""
    rows = pl.Series(edges, dtype=pl.Float64).search_sorted(values.fill_null(0), side="left")
    known = values.is_not_null() & values.fill_null(0).is_not_nan()
    return pl.select(pl.when(known).then(rows.cast(pl.Int32))).to_series()


def unit_hash(values: pl.Series, seed: int) -> pl.Series:
    """A number in [0, 1) for each value, always the same for the same value and seed."""
    text = pl.select(pl.lit(f"{seed}:") + values.cast(pl.String).fill_null("")).to_series()
    return pl.Series(hash_values(text.to_arrow(), (1 << 32) + 1) - 1) / (1 << 32)
