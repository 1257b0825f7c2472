"""What happens to rows between the file and the batch: `Preprocessor`.

In this order: labels are rectified; negatives are dropped and the others re-weighted (on rectified
labels: a label that does not count makes no positive); columns are extracted as features of their
own; continuous and binary columns are cut to the first ones and to masks; values are rounded to
smaller types, and low bits of the mantissa are cleared. `weigh` undoes the sampling of rows before
they were written.

All steps but the dropping of rows look at one row at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.data.config import (
    DownsampleNegatives,
    ExtractFeaturesRow,
    Preprocess,
    RecapDataConfig,
    RectifyLabels,
)
from tml.config import ConfigError
from tml.data.parquet import DataError

RowFault = tuple[NDArray[np.bool_], Callable[[int], str]]
"""Which rows cannot be used, and what is wrong with one of them."""

MANTISSA_BITS = 23
MAX_WHOLE = 2**53
MS_PER_HOUR = 3_600_000
_INTEGER_RANGES = {"uint8": (0, 255), "int8": (-128, 127)}
_FLOAT_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Preprocessor:
    """The steps of one `Preprocess` config on rows of `raw` features.

    mask_mantissa: feature → number of low bits of the mantissa that are cleared. Raises ConfigError
    where the config names what the data does not have.
    """

    def __init__(
        self,
        config: Preprocess | None,
        raw: Features,
        mask_mantissa: Mapping[str, int] | None = None,
    ) -> None:
        config = config or Preprocess()
        self._rectify, self._sample = config.rectify_labels, config.downsample_negatives
        self._extract = (
            config.extract_features.extract_feature_table if config.extract_features else []
        )
        self._downcast = dict(config.downcast.features) if config.downcast else {}
        self._mantissa = dict(mask_mantissa or {})
        cut = config.truncate_and_slice
        self._continuous = _columns(
            raw.num_continuous,
            cut.continuous_feature_truncation if cut else None,
            cut.continuous_feature_mask_path if cut else None,
            "continuous",
        )
        self._binary = _columns(
            raw.num_binary,
            cut.binary_feature_truncation if cut else None,
            cut.binary_feature_mask_path if cut else None,
            "binary",
        )
        self._check_names(raw)
        self.features = self._describe(raw)
        """What rows have afterwards."""

    @property
    def batch_multiplier(self) -> int:
        """Rows read for each row kept."""
        return self._sample.batch_multiplier if self._sample else 1

    def needed_columns(self, part: str) -> int:
        """Columns of continuous or binary, from the first, that are looked at before they are
        cut.
        """
        columns = self._continuous if part == "continuous" else self._binary
        extracted = [row.index for row in self._extract if row.source_tensor == part]
        return max([int(index) + 1 for index in (*columns[-1:], *extracted)], default=0)

    def faults(self, batch: RankingBatch) -> Iterator[RowFault]:
        """Rows that `rows` cannot take."""
        for row in self._extract:
            values = _source(batch, row)
            if values.dtype == torch.int64:
                continue
            bad = (values != values.round()) | ~(values.abs() < MAX_WHOLE)
            if bad.any():
                yield bad.numpy(), partial(_extraction_fault, values, row)

    def rows(self, batch: RankingBatch) -> RankingBatch:
        """Everything that looks at one row at a time. The batch holds at least `needed_columns`.
        Raises DataError for rows that `faults` tells of.
        """
        for bad, describe in self.faults(batch):
            raise DataError(describe(int(np.argmax(bad))))
        changes: dict[str, object] = {}
        if self._rectify is not None:
            changes["labels"] = rectify_labels(batch, self.features.tasks, self._rectify)
        if self._extract:
            extracted = {row.name: _source(batch, row).to(torch.int64) for row in self._extract}
            changes["ids"] = batch.ids | extracted
        parts = {
            "continuous": _select(batch.continuous, self._continuous),
            "binary": _select(batch.binary, self._binary),
            **batch.vectors,
        }
        for name, kind in self._downcast.items():
            parts[name] = round_to(parts[name], kind)
        for name, bits in self._mantissa.items():
            parts[name] = mask_mantissa(parts[name], bits)
        changes["continuous"], changes["binary"] = parts.pop("continuous"), parts.pop("binary")
        return dataclasses.replace(batch, **changes, vectors=parts)  # type: ignore[arg-type]

    def sample(self, batch: RankingBatch, rng: np.random.Generator) -> RankingBatch:
        """One row of `batch_multiplier`: all with an engagement, and as many others, drawn by
        `rng`, as fill the batch. Weights of those others grow by as much as their number shrank.

        Where the batch has no room for others beside those with an engagement, rows are drawn from
        all alike, and all weights grow.
        """
        if self._sample is None or not len(batch):
            return batch
        chosen, factors = draw_rows(self._engaged(batch, self._sample), self._sample, rng)
        return reweigh(take_rows(batch, torch.from_numpy(chosen)), torch.from_numpy(factors))

    def _engaged(self, batch: RankingBatch, config: DownsampleNegatives) -> NDArray[np.bool_]:
        columns = [self.features.tasks.index(task) for task in config.engagements_list]
        return (batch.labels[:, columns] > 0).any(dim=1).numpy()

    def _check_names(self, raw: Features) -> None:
        """Refuse names that the data does not have."""
        floats = {"continuous": raw.num_continuous, "binary": raw.num_binary, **raw.vectors}
        for key, named in (
            ("preprocess.downcast.features", self._downcast),
            ("seg_dense_schema.mask_mantissa_features", self._mantissa),
        ):
            for name in named:
                if name not in floats:
                    raise ConfigError(f"{key}: {name!r} is none of {', '.join(floats)}")
        for name, bits in self._mantissa.items():
            if bits > MANTISSA_BITS:
                raise ConfigError(
                    f"seg_dense_schema.mask_mantissa_features.{name}: {bits} bits; the mantissa of "
                    f"a float has {MANTISSA_BITS}"
                )
        widths = {**floats, "discrete": raw.num_discrete}
        for row in self._extract:
            where = f"preprocess.extract_features: {row.name!r}"
            if row.source_tensor not in widths:
                raise ConfigError(
                    f"{where}: source_tensor {row.source_tensor!r} is none of {', '.join(widths)}"
                )
            if row.index >= widths[row.source_tensor]:
                raise ConfigError(
                    f"{where}: index {row.index}; {row.source_tensor} has "
                    f"{widths[row.source_tensor]} columns"
                )
        self._check_labels(raw)

    def _check_labels(self, raw: Features) -> None:
        rectified = self._rectify.label_to_engaged_timestamp_field if self._rectify else {}
        for name in timestamp_names(self._rectify) if self._rectify else ():
            if name not in raw.ids:
                raise ConfigError(
                    f"preprocess.rectify_labels: the data has no timestamp {name!r}; whole numbers "
                    f"there: {', '.join(raw.ids) or 'none'}"
                )
        for key, names in (
            ("rectify_labels.label_to_engaged_timestamp_field", rectified),
            (
                "downsample_negatives.engagements_list",
                self._sample.engagements_list if self._sample else (),
            ),
        ):
            for name in names:
                if name not in raw.tasks:
                    raise ConfigError(
                        f"preprocess.{key}: {name!r} is none of the tasks: {', '.join(raw.tasks)}"
                    )

    def _describe(self, raw: Features) -> Features:
        taken = {*raw.ids, *raw.vectors, *raw.categorical, *raw.bags}
        for row in self._extract:
            if row.name in taken:
                raise ConfigError(f"preprocess.extract_features: {row.name!r} is there already")
            taken.add(row.name)
        return dataclasses.replace(
            raw,
            num_continuous=len(self._continuous),
            num_binary=len(self._binary),
            ids=(*raw.ids, *(row.name for row in self._extract)),
            continuous_names=tuple(raw.continuous_names[i] for i in self._continuous)
            if raw.continuous_names
            else (),
            binary_names=tuple(raw.binary_names[i] for i in self._binary)
            if raw.binary_names
            else (),
        )


def timestamp_names(config: RectifyLabels) -> list[str]:
    """Ids that labels are rectified by."""
    own = [config.served_timestamp_field, config.impressed_timestamp_field]
    return list(dict.fromkeys(own + list(config.label_to_engaged_timestamp_field.values())))


def _extraction_fault(values: Tensor, what: ExtractFeaturesRow, row: int) -> str:
    return (
        f"column {what.index} of {what.source_tensor}, extracted as {what.name}, is "
        f"{float(values[row]):g}; only whole numbers can be extracted"
    )


def _columns(
    width: int, truncation: int | None, mask_path: str | None, part: str
) -> NDArray[np.int64]:
    """Which of `width` columns are kept."""
    key = f"preprocess.truncate_and_slice.{part}_feature"
    if truncation is not None and truncation > width:
        raise ConfigError(f"{key}_truncation: {truncation} columns are wanted, {part} has {width}")
    kept = np.arange(width if truncation is None else truncation)
    if mask_path is None:
        return kept
    try:
        mask = np.load(Path(mask_path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}_mask_path: {mask_path} cannot be read: {error}") from error
    if mask.dtype != np.bool_ or mask.shape != kept.shape:
        raise ConfigError(
            f"{key}_mask_path: {mask_path} holds {mask.dtype} of shape {mask.shape}; wanted are "
            f"{len(kept)} booleans, one a column"
        )
    chosen: NDArray[np.int64] = kept[mask]
    return chosen


def _select(values: Tensor, columns: NDArray[np.int64]) -> Tensor:
    """The given columns; a view where they are the first ones."""
    if len(columns) == 0 or columns[-1] == len(columns) - 1:
        return values[:, : len(columns)]
    return values.index_select(1, torch.from_numpy(columns))


def _source(batch: RankingBatch, row: ExtractFeaturesRow) -> Tensor:
    named = {
        "continuous": batch.continuous,
        "binary": batch.binary,
        "discrete": batch.discrete,
    }
    source = (
        named[row.source_tensor] if row.source_tensor in named else batch.vectors[row.source_tensor]
    )
    return source[:, row.index]


def rectify_labels(batch: RankingBatch, tasks: tuple[str, ...], config: RectifyLabels) -> Tensor:
    """(B, T) labels, of which those with a timestamp count only if the engagement came between the
    impression (serving, where there was none) and the end of the window after it.
    """
    impressed = batch.ids[config.impressed_timestamp_field]
    shown = torch.where(impressed > 0, impressed, batch.ids[config.served_timestamp_field])
    window = round(config.label_rectification_window_in_hours * MS_PER_HOUR)
    labels = batch.labels.clone()
    for task, name in config.label_to_engaged_timestamp_field.items():
        since = batch.ids[name] - shown
        labels[:, tasks.index(task)] *= (since >= 0) & (since <= window)
    return labels


def draw_rows(
    engaged: NDArray[np.bool_], config: DownsampleNegatives, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which rows are kept, in order, and the factor of each one's weight."""
    room = -(-len(engaged) // config.batch_multiplier)
    num_engaged = int(engaged.sum())
    if room <= num_engaged < len(engaged) or num_engaged > room:
        chosen = np.sort(rng.choice(len(engaged), room, replace=False))
        return chosen, np.full(room, len(engaged) / room, dtype=np.float32)
    others = np.flatnonzero(~engaged)
    num_kept = room - num_engaged
    kept = rng.choice(others, num_kept, replace=False)
    chosen = np.sort(np.concatenate([np.flatnonzero(engaged), kept]))
    growth = len(others) / max(num_kept, 1)
    return chosen, np.where(engaged[chosen], 1, growth).astype(np.float32)


def round_to(values: Tensor, kind: str) -> Tensor:
    """float32 values as they would be when stored as `kind`. Integer types hold the whole part
    within their range, and 0 for NaN.
    """
    if kind in _FLOAT_TYPES:
        return values.to(_FLOAT_TYPES[kind]).to(torch.float32)
    if kind == "bool":
        return (values != 0).to(torch.float32)
    low, high = _INTEGER_RANGES[kind]
    return values.nan_to_num(0.0, high, low).clamp(low, high).trunc()


def mask_mantissa(values: Tensor, bits: int) -> Tensor:
    """float32 values with the low `bits` bits of the mantissa at 0; infinities and NaN stay."""
    masked = (values.contiguous().view(torch.int32) & ~((1 << bits) - 1)).view(torch.float32)
    # A NaN whose high mantissa bits are 0 would become an infinity.
    return torch.where(values.isnan(), values, masked)


def weigh(batch: RankingBatch, tasks: tuple[str, ...], config: RecapDataConfig) -> RankingBatch:
    """Weights times y / pos_rate + (1 − y) / neg_rate of each task."""
    rates = [config.task_data(task) for task in tasks]
    if all(one.pos_downsampling_rate == one.neg_downsampling_rate == 1 for one in rates):
        return batch
    positive = torch.tensor([1 / one.pos_downsampling_rate for one in rates])
    negative = torch.tensor([1 / one.neg_downsampling_rate for one in rates])
    factors = torch.where(batch.labels > 0, positive, negative)
    return dataclasses.replace(batch, weights=batch.weights * factors)


def reweigh(batch: RankingBatch, factors: Tensor) -> RankingBatch:
    """Weights of all tasks times one factor a row (B,)."""
    return dataclasses.replace(batch, weights=batch.weights * factors[:, None])


def take_rows(batch: RankingBatch, rows: Tensor) -> RankingBatch:
    """The given rows (n,) int64, in the given order."""

    def take(value: object) -> object:
        if isinstance(value, dict):
            return {name: take(item) for name, item in value.items()}
        if isinstance(value, Bag):
            return _take_lists(value, rows)
        assert isinstance(value, Tensor)
        return value.index_select(0, rows)

    fields = dataclasses.fields(batch)
    return RankingBatch(**{one.name: take(getattr(batch, one.name)) for one in fields})  # type: ignore[arg-type]


def _take_lists(bag: Bag, rows: Tensor) -> Bag:
    lengths = bag.offsets.diff()[rows]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shift = torch.repeat_interleave(bag.offsets[rows] - offsets[:-1], lengths)
    return Bag(bag.values[torch.arange(int(offsets[-1])) + shift], offsets)


def concatenate(batches: list[RankingBatch]) -> RankingBatch:
    """The rows of all batches, one after the other."""
    if len(batches) == 1:
        return batches[0]

    def join(values: list[Any]) -> object:
        first = values[0]
        if isinstance(first, dict):
            return {name: join([value[name] for value in values]) for name in first}
        return _join_lists(values) if isinstance(first, Bag) else torch.cat(values)

    fields = dataclasses.fields(batches[0])
    parts = {one.name: join([getattr(b, one.name) for b in batches]) for one in fields}
    return RankingBatch(**parts)  # type: ignore[arg-type]


def scatter(batches: list[RankingBatch], places: Tensor) -> RankingBatch:
    """The rows of all batches; row i goes to place places[i], a permutation. One copy: this is half
    of what joining and then taking costs.
    """
    starts = np.cumsum([0, *map(len, batches)]).tolist()

    def join(values: list[Any]) -> object:
        first = values[0]
        if isinstance(first, dict):
            return {name: join([value[name] for value in values]) for name in first}
        if isinstance(first, Bag):
            return _take_lists(_join_lists(values), places.argsort())
        whole = first.new_empty((len(places), *first.shape[1:]))
        for start, value in zip(starts, values, strict=False):
            whole.index_copy_(0, places[start : start + len(value)], value)
        return whole

    fields = dataclasses.fields(batches[0])
    parts = {one.name: join([getattr(b, one.name) for b in batches]) for one in fields}
    return RankingBatch(**parts)  # type: ignore[arg-type]


def _join_lists(bags: list[Bag]) -> Bag:
    lengths = torch.cat([bag.offsets.diff() for bag in bags])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Bag(torch.cat([bag.values for bag in bags]), offsets)
