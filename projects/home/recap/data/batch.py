"""What the data gives to the model: `Features`, the names and widths known before anything is read,
and `RankingBatch`, the rows of one step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """Names and widths of everything in a batch; the model is built from it."""

    tasks: tuple[str, ...]
    """Labels, in the order of the columns of `RankingBatch.labels`."""
    num_continuous: int = 0
    num_binary: int = 0
    num_discrete: int = 0
    vectors: dict[str, int] = field(default_factory=dict)
    """Vectors made elsewhere (TwHIN): name → width."""
    categorical: dict[str, int] = field(default_factory=dict)
    """Name → number of values; row 0 is the unknown value."""
    bags: dict[str, int] = field(default_factory=dict)
    """Name → number of values of lists of categorical values; row 0 is the unknown value."""
    ids: tuple[str, ...] = ()
    """Whole numbers that are passed on as they are: ids, timestamps, positions."""
    continuous_names: tuple[str, ...] = ()
    """Names of the continuous columns, empty where the data has none."""
    binary_names: tuple[str, ...] = ()
    """Names of the binary columns, empty where the data has none."""


@dataclass(frozen=True)
class Bag:
    """Lists of whole numbers, one a row, end to end."""

    values: Tensor
    """(N,) int64."""
    offsets: Tensor
    """(B + 1,) int64; list i is values[offsets[i]:offsets[i + 1]]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> Self:
        """The lists start … stop − 1."""
        offsets = self.offsets[start : stop + 1]
        values = self.values[int(offsets[0]) : int(offsets[-1])]
        return replace(self, values=values, offsets=offsets - offsets[0])


@dataclass(frozen=True)
class RankingBatch:
    """B rows. Tensors of width 0 stand for what the data does not have."""

    continuous: Tensor
    """(B, C) float32, as in the data: not normalised, may hold NaN."""
    binary: Tensor
    """(B, D) float32."""
    discrete: Tensor
    """(B, E) int64: hashed values, any whole number."""
    labels: Tensor
    """(B, T) float32, 0 or 1, columns in the order of `Features.tasks`."""
    weights: Tensor
    """(B, T) float32: weight of each row in each task's loss and metrics."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Name → (B, n) float32."""
    categorical: dict[str, Tensor] = field(default_factory=dict)
    """Name → (B,) int64, rows of the feature's vocabulary."""
    bags: dict[str, Bag] = field(default_factory=dict)
    """Name → lists of rows of the feature's vocabulary."""
    ids: dict[str, Tensor] = field(default_factory=dict)
    """Name → (B,) int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> Self:
        """Rows start … stop − 1, sharing memory."""

        def cut(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: cut(item) for name, item in value.items()}
            return value.slice(start, stop) if isinstance(value, Bag) else value[start:stop]

        return type(self)(**{one.name: cut(getattr(self, one.name)) for one in fields(self)})

    def split(self, parts: int) -> Iterator[Self]:
        """The rows in `parts` runs whose lengths differ by at most 1, longer ones first; none is
        empty.
        """
        start = 0
        for part in range(parts):
            stop = start + len(self) // parts + (part < len(self) % parts)
            if stop > start:
                yield self.slice(start, stop)
            start = stop

    def to(self, device: torch.device) -> Self:
        """The same rows on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(item) for name, item in value.items()}
            if isinstance(value, Bag):
                return Bag(value.values.to(device), value.offsets.to(device))
            return value.to(device, non_blocking=True)

        if self.labels.device == device:
            return self
        return type(self)(**{one.name: move(getattr(self, one.name)) for one in fields(self)})


def empty_batch(features: Features) -> RankingBatch:
    """A batch without rows."""
    no_ids = torch.empty(0, dtype=torch.int64)
    width = len(features.tasks)
    return RankingBatch(
        continuous=torch.empty(0, features.num_continuous),
        binary=torch.empty(0, features.num_binary),
        discrete=torch.empty(0, features.num_discrete, dtype=torch.int64),
        labels=torch.empty(0, width),
        weights=torch.empty(0, width),
        vectors={name: torch.empty(0, width) for name, width in features.vectors.items()},
        categorical=dict.fromkeys(features.categorical, no_ids),
        bags={name: Bag(no_ids, torch.zeros(1, dtype=torch.int64)) for name in features.bags},
        ids=dict.fromkeys(features.ids, no_ids),
    )
