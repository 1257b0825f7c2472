"""Columns → features: numbers, row numbers, lists of row numbers.

All that is learned, vocabularies and statistics, is learned from the training rows.
"""

from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from projects.home.recap.data.spec import hash_values
from projects.home.recap.preparation.config import CategoricalConfig, ContinuousConfig
from tml.data.parquet import DataError

QUANTILES = 1000
NORMAL_LIMIT = 3.0

Floats = NDArray[np.float64]


def to_number(column: pl.Series, what: str) -> pl.Series:
    """Float64; raises DataError for text."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise DataError(
            f"{what}: column {column.name!r} holds {column.dtype}, not numbers; make it a "
            "categorical feature, or name in null_values the text that means null"
        )
    return column.cast(pl.Float64)


def continuous(
    column: pl.Series, config: ContinuousConfig, train: pl.Series
) -> tuple[pl.Series, dict[str, Any] | None]:
    """Float32 values, null as NaN, and what was learned."""
    numbers = to_number(column, f"continuous {config.name or config.column}")
    values = numbers.fill_null(float("nan")).to_numpy()
    learned: dict[str, Any] | None = None
    if config.transform == "log":
        values = signed_log(values)
    elif config.transform == "standardise":
        mean, std = mean_and_deviation(values[train.to_numpy()])
        learned = {"mean": mean, "std": std}
        values = (values - mean) / std
    elif config.transform == "quantile":
        known = values[train.to_numpy()]
        known = known[np.isfinite(known)]
        grid = np.linspace(0, 1, QUANTILES + 1)
        quantiles = np.quantile(known, grid) if len(known) else np.zeros(1)
        learned = {"quantiles": quantiles.tolist()}
        values = normal_scores(values, quantiles)
    return pl.Series(values.astype(np.float32)), learned


def signed_log(values: Floats) -> Floats:
    """sign(x)·log1p(|x|)."""
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def mean_and_deviation(values: Floats) -> tuple[float, float]:
    """Of the finite values; a constant has deviation 1."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    return float(finite.mean()), float(finite.std()) or 1.0


def normal_scores(values: Floats, quantiles: Floats) -> Floats:
    """Share of the quantiles below each value, as a normal deviate from −3 to 3; NaN stays."""
    below = np.searchsorted(quantiles, values, side="left")
    upto = np.searchsorted(quantiles, values, side="right")
    share = (below + upto) / 2 / len(quantiles)  # equal quantiles share their middle
    grid = np.linspace(0, 1, 1001)[1:-1]
    deviates = np.array([NormalDist().inv_cdf(p) for p in grid])
    scores = np.clip(np.interp(share, grid, deviates), -NORMAL_LIMIT, NORMAL_LIMIT)
    return np.where(np.isnan(values), np.nan, scores)


def as_text(column: pl.Series) -> pl.Series:
    """Values by which a vocabulary knows them."""
    return column.cast(pl.String)


def learn_vocabulary(values: pl.Series, config: CategoricalConfig) -> pl.DataFrame:
    """Columns value, count: those known, the most frequent first, then by name."""
    counts = values.drop_nulls().alias("value").value_counts(name="count")
    counts = counts.filter(pl.col("count") >= config.min_count)
    counts = counts.sort("count", "value", descending=[True, False])
    return counts.head(config.max_values) if config.max_values is not None else counts


def number(values: pl.Series, vocabulary: pl.DataFrame) -> pl.Series:
    """Row of each value: its place in the vocabulary, from 1; 0 for null and the unknown."""
    rows = vocabulary.select("value", pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("row"))
    found = (
        values.alias("value").to_frame().join(rows, on="value", how="left", maintain_order="left")
    )
    return found["row"].fill_null(0)


def categorical(
    column: pl.Series, config: CategoricalConfig, train: pl.Series
) -> tuple[pl.Series, pl.DataFrame | None]:
    """Row numbers, and the vocabulary that was learned; None for hashed values."""
    if config.hash_rows is not None:
        hashed = hash_values(column.to_arrow(), config.hash_rows)
        return pl.Series(hashed.astype(np.int32)), None
    values = as_text(column)
    vocabulary = learn_vocabulary(values.filter(train), config)
    return number(values, vocabulary), vocabulary


def bag(
    column: pl.Series, config: CategoricalConfig, train: pl.Series
) -> tuple[pl.Series, pl.DataFrame | None]:
    """Lists of row numbers; null is the empty list."""
    lists = split_lists(column, config.separator)
    row = pl.int_range(pl.len()).alias("row")
    items = lists.alias("value").to_frame().with_columns(row).explode("value").drop_nulls("value")
    in_training = train.gather(items["row"])
    values, vocabulary = categorical(items["value"], config, in_training)
    rows = items.with_columns(values.alias("value")).group_by("row", maintain_order=True)
    numbered = rows.agg(pl.col("value"))
    every = pl.DataFrame({"row": np.arange(len(lists))})
    found = every.join(numbered, on="row", how="left", maintain_order="left")["value"]
    return found.fill_null([]), vocabulary


def split_lists(column: pl.Series, separator: str) -> pl.Series:
    """Lists of text; delimited text is cut."""
    if column.dtype.base_type() == pl.List:
        return column.cast(pl.List(pl.String))
    return (
        column.cast(pl.String)
        .str.split(separator)
        .list.eval(pl.element().filter(pl.element() != ""))
    )
