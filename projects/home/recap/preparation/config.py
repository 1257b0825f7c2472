"""What `prepare` makes of which tables: `PrepareConfig`, the shape of config/prepare/*.yaml."""

from datetime import date
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic import model_validator as validator

from tml.config import Config


class DeriveConfig(Config):
    """A column made of others; exactly one way of making it is set."""

    exactly_one_of: ClassVar = (
        ("hour_of", "weekday_of", "buckets_of", "cross", "equals", "is_null", "item_of"),
    )

    name: str
    """Name of the new column."""
    hour_of: str | None = None
    """Column with a time; gives the hour of the day, 0 to 23."""
    weekday_of: str | None = None
    """Column with a time; gives the day of the week, 1 (Monday) to 7."""
    format: str = "epoch_ms"
    """How hour_of and weekday_of are read: epoch_ms, epoch_s, hourmin (1305 is five past one), or
    strptime's %Y%m%d and the like.
    """
    buckets_of: str | None = None
    """Column of numbers; gives the number of the bucket, from 0."""
    num_buckets: PositiveInt = 20
    """Buckets with as many training rows each, where edges is unset."""
    edges: list[float] | None = None
    """Bucket i holds edges[i − 1] < x ≤ edges[i]. Unset: quantiles of the training rows."""
    cross: list[str] | None = Field(default=None, min_length=2)
    """Columns; gives their values joined as one."""
    equals: dict[str, Any] | None = Field(default=None, min_length=1, max_length=1)
    """Column: value; gives 1 where the column has it, else 0."""
    is_null: str | None = None
    """Column; gives 1 where it is null, else 0."""
    item_of: str | None = None
    """Column of delimited text; gives the item number `index`."""
    index: NonNegativeInt = 0
    separator: str = ","

    def sources(self) -> list[str]:
        """Columns that it is made of."""
        single = (self.hour_of, self.weekday_of, self.buckets_of, self.is_null, self.item_of)
        return [*filter(None, single), *(self.cross or ()), *(self.equals or ())]


class InputConfig(Config):
    """How one input is read: CSV or TSV (gzip or plain) or parquet, told by the file's name."""

    separator: str | None = None
    """Between the columns of text. Unset: a tab in .tsv, else a comma."""
    columns: list[str] | None = None
    """Names of the columns of text that has no header."""
    null_values: list[str] = Field(default=[])
    """Texts that mean null, beside the empty one: nothing else is taken for null, NA least."""
    text: list[str] = Field(default=[])
    """Columns kept as text whatever they look like."""
    strip_prefix: dict[str, str] = Field(default={})
    """Column → beginning that is taken off its values: u12 → 12."""
    rename: dict[str, str] = Field(default={})
    """Column → new name."""
    derive: list[DeriveConfig] = Field(default=[])
    """Columns made of this table's alone; buckets need edges."""


class JoinConfig(Config):
    """A table whose columns are added to each row by a key; a row without a partner gets nulls."""

    table: str
    """Name of the input."""
    key: str
    """Column of both; a value is there once in the table that is joined."""
    prefix: str = ""
    """Put before the names of the added columns."""
    columns: list[str] | None = None
    """Columns that are added. Unset: all."""


class TimeConfig(Config):
    """When a row happened."""

    column: str
    """Column of the main table."""
    format: str = "%Y%m%d"
    """epoch_ms, epoch_s, or strptime's format of the column as text."""
    utc_offset_hours: float = 0.0
    """Added to epochs before the day is taken."""


class TimeSplit(Config):
    """Spans of days, first and last included."""

    train_from: date | None = None
    """Unset: from the first day."""
    train_until: date
    """Last day of the training span."""
    validation: tuple[date, date | None]
    """First and last day; last null: all that follow."""
    test: tuple[date, date | None] | None = None
    """First and last day; last null: all that follow."""

    @validator(mode="after")
    def _check(self) -> Self:
        for name in ("validation", "test"):
            span = getattr(self, name)
            if span and span[0] <= self.train_until:
                raise ValueError(
                    f"{name} begins on {span[0]}, not after train_until {self.train_until}"
                )
            if span and span[1] is not None and span[1] < span[0]:
                raise ValueError(f"{name}: the last day {span[1]} is before the first {span[0]}")
        return self


class TableSplit(Config):
    """Splits that are inputs of their own."""

    train: str
    """Name of the input."""
    validation: str
    """Name of the input."""
    test: str | None = None
    """Name of the input."""


class HoldOut(Config):
    """Training rows that are set apart, to choose settings or to calibrate on."""

    exactly_one_of: ClassVar = (("share", "last_days"),)

    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the rows, by a hash of `key`."""
    key: str | None = None
    """Column; rows with the same value stay together. Unset: the row's number."""
    last_days: PositiveInt | None = None
    """The last so many days of the training span."""


class SplitConfig(Config):
    """Which rows are trained on, and which are measured on."""

    exactly_one_of: ClassVar = (("by_time", "by_table"),)

    by_time: TimeSplit | None = None
    by_table: TableSplit | None = None
    hold_out: HoldOut | None = None
    """Taken from the training rows, into the folder held_out."""


class LabelConfig(Config):
    """A task's label."""

    column: str | None = None
    """Column of 0 and 1, or of booleans. Unset: the task's name."""
    equals: Any = None
    """The label is whether the column has this value. Unset: the column itself."""


class ContinuousConfig(Config):
    """A number."""

    name: str | None = None
    """Unset: the column's name."""
    column: str
    transform: Literal["none", "log", "standardise", "quantile"] = "none"
    """log: sign(x)·log1p(|x|); standardise: mean 0, deviation 1; quantile: normal scores, −3 to 3;
    by the training rows. The model's featurisation follows on any of them.
    """


class CategoricalConfig(Config):
    """One of many values, or a list of them; row 0 is for those that training does not know."""

    at_most_one_of: ClassVar = (("hash_rows", "max_values"),)

    column: str | None = None
    """Unset: the feature's name."""
    min_count: PositiveInt = 1
    """Training rows that a value needs to be known."""
    max_values: PositiveInt | None = None
    """Known values at most, the most frequent. Unset: all."""
    hash_rows: int | None = Field(default=None, ge=2)
    """Values are hashed into so many rows, no vocabulary is learned."""
    separator: str = ","
    """Bags: between the values of a text; columns of lists need none."""


class TargetEncodingConfig(Config):
    """Rates of labels among earlier rows with the same keys, and how many those are.

    The rate is smoothed, (positives + prior · mean) / (rows + prior), and written as the difference
    of its log-odds from those of the mean: 0 where nothing is known.
    """

    keys: list[str] = Field(min_length=1)
    """Columns; a null in one of them knows nothing."""
    labels: list[str] | None = None
    """Tasks. Unset: all."""
    prior: NonNegativeFloat | dict[str, NonNegativeFloat] = 20.0
    """Rows that the mean counts for, of all labels or by task; rare labels need more."""
    fold: Literal["days", "kfold"] = "days"
    """What a training row sees. days: the training rows of earlier days, and so do rows that are
    held out; kfold: those of other folds, later ones too. Other rows see all training rows.
    """
    folds: int = Field(default=5, ge=2)
    """Number of folds, drawn at random."""
    count: bool = True
    """Whether log1p of the number of rows is a feature too."""

    def prior_of(self, task: str) -> float:
        """The prior of one task."""
        return self.prior[task] if isinstance(self.prior, dict) else self.prior


class HistoryConfig(Config):
    """The same from events that all happened before the first row: their time is not looked at."""

    table: str
    """Name of the input: one event a row."""
    relation: str | None = None
    """Column that says what happened. Unset: all events are alike."""
    shown: str | None = None
    """Relation that says that the item was shown; the others get a rate of it."""
    joins: list[JoinConfig] = Field(default=[])
    """Tables joined to the events."""
    keys: list[list[str]] = Field(min_length=1)
    """Sets of columns, of the events and of the rows; a set makes features of its own."""
    prior: NonNegativeFloat = 20.0
    """Shown events that the mean rate counts for."""


class PrepareConfig(Config):
    """From tables to files."""

    table: str | None = None
    """Name of the main input: a row of it is a row of the output. Unset with split.by_table."""
    inputs: dict[str, InputConfig] = Field(default={})
    """Name → how it is read, where the default does not do."""
    joins: list[JoinConfig] = Field(default=[])
    """Tables joined to the rows, in this order."""
    time: TimeConfig | None = None
    split: SplitConfig
    labels: dict[str, LabelConfig | None] = Field(min_length=1)
    """Task → label."""
    outcomes: list[str] = Field(default=[])
    """Columns known only after the event, as labels are: no feature may be made of them."""
    derive: list[DeriveConfig] = Field(default=[])
    """Columns made of others, in this order."""
    continuous: list[str | ContinuousConfig] = Field(default=[])
    """Numbers; null stays NaN."""
    binary: list[str] = Field(default=[])
    """0 and 1, or booleans; null → 0."""
    categorical: dict[str, CategoricalConfig | None] = Field(default={})
    """Name → how it is numbered."""
    bags: dict[str, CategoricalConfig | None] = Field(default={})
    """Name → the same for lists or delimited text."""
    target_encodings: list[TargetEncodingConfig] = Field(default=[])
    histories: list[HistoryConfig] = Field(default=[])
    ids: list[str] = Field(default=[])
    """Whole numbers passed on."""
    timestamp: str | None = None
    """Whole number passed on."""
    weight: str | None = None
    """Column with the weight of each row."""
    seed: NonNegativeInt = 1
    """Decides folds and what is held out."""

    @validator(mode="after")
    def _check(self) -> Self:
        by_time = self.split.by_time is not None
        if by_time and (self.table is None or self.time is None):
            raise ValueError("split.by_time needs table (the main input) and time (its day)")
        if not by_time and self.table is not None:
            raise ValueError(
                f"table {self.table!r}: with split.by_table the inputs named there are the main "
                "ones; remove table"
            )
        last_days = self.split.hold_out is not None and self.split.hold_out.last_days is not None
        days = any(one.fold == "days" for one in self.target_encodings)
        if (last_days or days) and self.time is None:
            raise ValueError(
                "time is unset: target_encodings with fold days and split.hold_out.last_days need "
                "the day of each row; set time, or fold: kfold"
            )
        for encoding in self.target_encodings:
            priors = encoding.prior if isinstance(encoding.prior, dict) else {}
            for task in [*(encoding.labels or ()), *priors]:
                if task not in self.labels:
                    raise ValueError(f"target_encodings: {task!r} is not among the labels")
            for task in encoding.labels or self.labels:
                if priors and task not in priors:
                    raise ValueError(f"target_encodings: prior gives no number for {task!r}")
        return self

    def label(self, task: str) -> LabelConfig:
        """The label of one task."""
        return self.labels[task] or LabelConfig()

    def label_column(self, task: str) -> str:
        """The column that it is taken from."""
        return self.label(task).column or task

    def continuous_columns(self) -> list[ContinuousConfig]:
        """Each with its column."""
        given = self.continuous
        return [ContinuousConfig(column=c) if isinstance(c, str) else c for c in given]

    def main_tables(self) -> dict[str, str]:
        """Split → input, or {"": the main input} where rows are split later."""
        tables = self.split.by_table
        if tables is None:
            assert self.table is not None
            return {"": self.table}
        found = {"train": tables.train, "validation": tables.validation, "test": tables.test}
        return {split: name for split, name in found.items() if name is not None}

    def table_names(self) -> set[str]:
        """All inputs that are needed."""
        joined = {join.table for join in self.joins}
        joined |= {join.table for one in self.histories for join in one.joins}
        return set(self.main_tables().values()) | joined | {one.table for one in self.histories}

    def feature_sources(self) -> dict[str, list[str]]:
        """Feature or key → columns that it is made of, before `derive` is looked through."""
        found = {one.name or one.column: [one.column] for one in self.continuous_columns()}
        found |= {name: [name] for name in self.binary}
        for part in (self.categorical, self.bags):
            found |= {name: [one.column or name if one else name] for name, one in part.items()}
        found |= {f"target_encodings {one.keys}": one.keys for one in self.target_encodings}
        for history in self.histories:
            found |= {f"histories {keys}": keys for keys in history.keys}
        return found

    def _made_of(self) -> dict[str, list[str]]:
        """Derived column → its sources, all by their names in the rows."""
        tables = [(name, "") for name in self.main_tables().values()]
        tables += [(join.table, join.prefix) for join in self.joins]
        found = {
            prefix + one.name: [prefix + source for source in one.sources()]
            for name, prefix in tables
            for one in self.inputs.get(name, InputConfig()).derive
        }
        return found | {one.name: one.sources() for one in self.derive}

    @validator(mode="after")
    def _refuse_outcomes(self) -> Self:
        made_of = self._made_of()
        outcomes = {*self.outcomes, *(self.label_column(task) for task in self.labels)}

        def leaf_outcomes(column: str, seen: frozenset[str] = frozenset()) -> set[str]:
            found = {column} & outcomes
            for source in made_of.get(column, ()):
                if source not in seen:
                    found |= leaf_outcomes(source, seen | {column})
            return found

        labels = {self.label_column(task) for task in self.labels}
        for name in filter(None, [*self.ids, self.timestamp]):
            if name in labels:
                raise ValueError(
                    f"ids: {name!r} is a label; an id can be hashed into a table and so becomes a "
                    "feature; remove it"
                )
        for feature, columns in self.feature_sources().items():
            leaked = sorted(set().union(*(leaf_outcomes(column) for column in columns)))
            if leaked:
                raise ValueError(
                    f"the feature {feature!r} is made of {', '.join(leaked)}: labels and outcomes "
                    "are not known when the prediction is made; remove the feature"
                )
        return self
