"""What happened before: smoothed rates of labels and counts, by keys, without looking ahead.

A training row sees the training rows of earlier days (or of other folds), and so does a row that is
held out of the training span; rows of validation and test see all training rows. All see the events
of a history, which all happened before them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from projects.home.recap.preparation.config import (
    HistoryConfig,
    PrepareConfig,
    TargetEncodingConfig,
)
from projects.home.recap.preparation.derive import unit_hash
from projects.home.recap.preparation.tables import (
    DAY,
    SPLIT,
    Tables,
    join,
    need,
    same_type,
)
from tml.config import ConfigError

COUNT = "number of rows"
FOLD = "fold of the row"
MIN_MEAN = 1e-6

Floats = NDArray[np.float64]


def log_odds_of_rate(positives: Floats, shown: Floats, mean: Floats, prior: float) -> Floats:
    """log-odds of (positives + prior · mean) / (shown + prior), less those of the mean; 0 where
    nothing was shown.

    positives, shown: (n,); mean: (n,) or a number. The rate stays within MIN_MEAN of 0 and 1.
    """
    middle = np.clip(np.nan_to_num(mean, nan=0.5), MIN_MEAN, 1 - MIN_MEAN)
    with np.errstate(invalid="ignore"):
        rate = (positives + prior * middle) / (shown + prior)
    rate = np.clip(np.where(shown > 0, rate, middle), MIN_MEAN, 1 - MIN_MEAN)
    return np.asarray(np.log(rate / (1 - rate)) - np.log(middle / (1 - middle)))


# Target encodings


def target_encodings(
    rows: pl.DataFrame, labels: pl.DataFrame, encoding: TargetEncodingConfig, seed: int
) -> Iterator[tuple[str, Floats]]:
    """(name, (n,) values) of the features of one set of keys."""
    for key in encoding.keys:
        need(rows, key, "target_encodings.keys")
    tasks = encoding.labels or labels.columns
    table = rows.select(encoding.keys)
    table = table.with_columns(labels.select(pl.col(tasks).cast(pl.Float64).name.prefix("label ")))
    table = table.with_columns(rows[SPLIT])
    sums = [f"label {task}" for task in tasks]
    if encoding.fold == "days":
        seen, mean = _earlier_days(table.with_columns(rows[DAY]), encoding.keys, sums)
    else:
        fold = unit_hash(pl.Series(np.arange(len(rows))), seed) * encoding.folds
        table = table.with_columns(fold.cast(pl.Int32).alias(FOLD))
        seen, mean = _other_folds(table, encoding.keys, sums)
    name, shown = "+".join(encoding.keys), seen[COUNT].to_numpy()
    for task, column in zip(tasks, sums, strict=True):
        positives = seen[column].to_numpy()
        values = log_odds_of_rate(
            positives, shown, mean[column].to_numpy(), encoding.prior_of(task)
        )
        yield f"{name}:{task}", values
    if encoding.count:
        yield f"{name}:count", np.log1p(shown)


def _totals(train: pl.DataFrame, keys: Sequence[str], sums: Sequence[str]) -> pl.DataFrame:
    known = train.drop_nulls(list(keys))
    return known.group_by(keys).agg(pl.col(sums).sum(), pl.len().cast(pl.Float64).alias(COUNT))


def _look_up(rows: pl.DataFrame, found: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """`found` for each row, 0 where there is nothing."""
    values = [name for name in found.columns if name not in keys]
    looked_up = rows.select(keys).join(found, on=list(keys), how="left", maintain_order="left")
    return looked_up.select(pl.col(values).fill_null(0.0))


def _choose(train: pl.Series, inside: pl.DataFrame, outside: pl.DataFrame) -> pl.DataFrame:
    """Row by row: from `inside` where train, else from `outside`."""
    return pl.DataFrame(
        {
            name: np.where(train.to_numpy(), inside[name].to_numpy(), outside[name].to_numpy())
            for name in outside.columns
        }
    )


def _earlier_days(
    table: pl.DataFrame, keys: Sequence[str], sums: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Sums and counts that each row sees, and the mean label that it sees."""
    train = table[SPLIT] == "train"
    trained = table.filter(train)
    outside = _look_up(table, _totals(trained, keys, sums), keys)
    # Rows held out of the training span see no more than the training rows of their day; they tell
    # nothing themselves, but their days must be found.
    within = table[SPLIT].is_in(["train", "held_out"])
    counted = table.with_columns(train.cast(pl.Float64).alias(COUNT)).with_columns(
        pl.col(sums) * pl.col(COUNT)
    )

    def before(by: list[str]) -> pl.DataFrame:
        known = counted.filter(within).drop_nulls(by)
        daily = known.group_by([*by, DAY]).agg(pl.col([*sums, COUNT]).sum()).sort(DAY)
        running = pl.col([*sums, COUNT]).cum_sum()
        running = running.over(by, order_by=DAY) if by else running
        return daily.with_columns(running - pl.col([*sums, COUNT]))

    seen = _choose(within, _look_up(table, before(list(keys)), [*keys, DAY]), outside)
    # The mean is looked up in the same way, so that it does not look ahead either.
    earlier = _look_up(table, before([]), [DAY])
    means = _choose(
        within, earlier.select(pl.col(sums) / pl.col(COUNT)), _constant(trained, sums, len(table))
    )
    return seen, means


def _constant(trained: pl.DataFrame, sums: list[str], num_rows: int) -> pl.DataFrame:
    """The mean of each label over the training rows, for each row."""
    means = trained.select(pl.col(sums).mean())
    return pl.DataFrame({one: np.full(num_rows, means[one][0], dtype=float) for one in sums})


def _other_folds(
    table: pl.DataFrame, keys: Sequence[str], sums: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The same for folds: a training row sees all training rows less those of its own fold."""
    train = table[SPLIT] == "train"
    trained = table.filter(train)
    outside = _look_up(table, _totals(trained, keys, sums), keys)
    own = _look_up(table, _totals(trained, [*keys, FOLD], sums), [*keys, FOLD])
    inside = pl.DataFrame({name: outside[name] - own[name] for name in outside.columns})
    return _choose(train, inside, outside), _constant(trained, sums, len(table))


# Histories


def history_features(
    rows: pl.DataFrame, tables: Tables, history: HistoryConfig
) -> Iterator[tuple[str, Floats]]:
    """(name, (n,) values): log1p of the number of events of each relation, and the log-odds of
    each relation among those shown, for each set of keys.
    """
    events = tables[history.table]
    for one in history.joins:
        events = join(events, tables, one)
    relations = [""]
    if history.relation is not None:
        need(events, history.relation, f"histories.{history.table}")
        relations = events[history.relation].unique().sort().to_list()
        if history.shown is not None and history.shown not in relations:
            raise ConfigError(
                f"histories.{history.table}.shown: {history.shown!r} is no relation; there are "
                f"{', '.join(relations)}"
            )
    for keys in history.keys:
        where = f"histories.{history.table}.keys"
        for key in keys:
            need(rows, key, where)
            need(events, key, where)
        yield from _history(rows, events, keys, history, relations)


def _history(
    rows: pl.DataFrame,
    events: pl.DataFrame,
    keys: list[str],
    history: HistoryConfig,
    relations: list[str],
) -> Iterator[tuple[str, Floats]]:
    known = events.select(
        [same_type(events[key], rows[key], f"histories.{history.table}") for key in keys]
    )
    name = f"{history.table}:{'+'.join(keys)}"
    if history.relation is None:
        counts = _look_up(rows, _totals(known, keys, []), keys)
        yield f"{name}:count", np.log1p(counts[COUNT].to_numpy())
        return
    relation = events[history.relation]
    known = known.with_columns(
        [(relation == one).cast(pl.Float64).alias(f"label {one}") for one in relations]
    )
    columns = [f"label {one}" for one in relations]
    counts = _look_up(rows, _totals(known, keys, columns), keys)
    totals = {one: float((relation == one).sum()) for one in relations}
    for one in relations:
        number = counts[f"label {one}"].to_numpy()
        yield f"{name}:{one}", np.log1p(number)
        if history.shown not in (None, one):
            shown = counts[f"label {history.shown}"].to_numpy()
            mean = np.asarray(totals[one] / totals[str(history.shown)])
            yield (
                f"{name}:{one}/{history.shown}",
                log_odds_of_rate(number, shown, mean, history.prior),
            )


def all_rates(
    rows: pl.DataFrame, labels: pl.DataFrame, tables: Tables, config: PrepareConfig
) -> Iterator[tuple[str, Floats]]:
    """All target encodings, then all histories."""
    for encoding in config.target_encodings:
        yield from target_encodings(rows, labels, encoding, config.seed)
    for history in config.histories:
        yield from history_features(rows, tables, history)
