"""Tables of float32 rows in one process on a processor: rows are looked up and updated, never all.

FBGEMM's update sorts the ids of a batch and walks over their rows one by one: 26 ms of processor
time for 40,000 rows of 128 floats, where this takes 9. Here the gradients of rows that were looked
up twice are summed first, which most batches of a large table hardly need; then all rows change by
whole-array operations: Adagrad's accumulator, its root, the step, and one addition to the table.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tml.embeddings import Ids, Rows, RowSource, Tables, TableSpec, copy_rows
from tml.optimizers import Adagrad

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
SPREAD_FROM = 16
"""Rows of so many floats are added by torch's parallel addition of rows."""


def can_hold(spec: TableSpec, device: torch.device) -> bool:
    """Whether RowTables can hold the table."""
    is_known = spec.optimizer.kind in OPTIMIZERS
    return is_known and spec.data_type == "fp32" and device.type == "cpu"


class RowTables(Tables):
    """Whole tables in one process, updated by rows."""

    def __init__(self, specs: Sequence[TableSpec]) -> None:
        super().__init__(specs)
        self._tables = {spec.name: _RowTable(spec) for spec in self.specs}

    def forward(self, ids: Ids) -> Rows:
        """Look up; see Tables."""
        return {spec.name: self._tables[spec.name].look_up(ids[spec.name]) for spec in self.specs}

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """See Tables."""
        for table in self._tables.values():
            table.learning_rate = table.spec.optimizer.learning_rate_at(step)
        return {name: table.learning_rate for name, table in self._tables.items()}

    def state(self) -> dict[str, Any]:
        """See Tables."""
        saved: dict[str, Any] = {}
        for name, table in self._tables.items():
            saved[f"tables.{name}.weight"] = table.weight
            if table.accumulator is not None:
                saved[f"tables.{name}.accumulator"] = table.accumulator
        return saved

    def fill(self, name: str, rows: RowSource) -> None:
        """See Tables."""
        copy_rows(self._tables[name].weight, rows, 0)


class _RowTable:
    """One table and its optimizer."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.learning_rate = spec.optimizer.learning_rate_at(0)
        self.weight = torch.zeros(spec.num_rows, spec.dim)
        shape = {
            "sgd": None,
            "adagrad": (spec.num_rows, spec.dim),
            "rowwise_adagrad": (spec.num_rows,),
        }[spec.optimizer.kind]
        self.accumulator = None if shape is None else torch.zeros(shape)
        self.gradients: list[tuple[Tensor, Tensor]] = []
        """(ids, gradient) of each lookup that the present backward pass has gone through."""
        # Stands for the weight in autograd's graph, whose gradient would be as large as the table.
        # It gets its own, a zero, when all lookups have got theirs: then the update runs, once.
        self._token = torch.zeros(1, requires_grad=True)
        self._token.register_post_accumulate_grad_hook(self._update)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows (n, D)."""
        rows = _Rows.apply(self._token, self, ids)  # type: ignore[no-untyped-call]
        assert isinstance(rows, Tensor)
        return rows

    @torch.no_grad()
    def _update(self, token: Tensor) -> None:
        token.grad = None
        parts, self.gradients = self.gradients, []
        ids, gradient = parts[0]
        if len(parts) > 1:
            ids = torch.cat([ids for ids, _ in parts])
            gradient = torch.cat([gradient for _, gradient in parts])
        if len(ids):
            # An expanded gradient, such as that of a sum, has no memory to be changed in.
            self._update_rows(ids, gradient.contiguous())

    def _update_rows(self, ids: Tensor, gradient: Tensor) -> None:
        """Change the rows `ids` (n,) by their gradient (n, D), which is used up."""
        settings = self.spec.optimizer.settings
        if self.accumulator is not None:
            assert isinstance(settings, Adagrad)
            _sum_repeated(ids, gradient)
            if self.accumulator.dim() == 1:  # row-wise: the mean square of a row's gradient
                squares = torch.linalg.vector_norm(gradient, dim=1).square_().div_(self.spec.dim)
                self.accumulator.index_add_(0, ids, squares)
            else:
                _add_rows(self.accumulator, ids, gradient.square())
            root = self.accumulator.index_select(0, ids).sqrt_().add_(settings.eps)
            if root.dim() == 1:
                gradient.mul_(root.reciprocal_().mul_(-self.learning_rate).unsqueeze(1))
            else:
                gradient.div_(root).mul_(-self.learning_rate)
        else:
            gradient.mul_(-self.learning_rate)
        _add_rows(self.weight, ids, gradient)


class _Rows(torch.autograd.Function):
    """Rows of a table; their gradient is left with it."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, table: _RowTable, ids: Tensor) -> Tensor:
        ctx.table, ctx.ids = table, ids
        return table.weight.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.table.gradients.append((ctx.ids, gradient))
        return gradient.new_zeros(1), None, None


def _sum_repeated(ids: Tensor, gradient: Tensor) -> None:
    """Leave the gradients (n, D) of a row that is there several times with the first, as their sum;
    the others become 0.
    """
    n = len(ids)
    bits = max(1, (n - 1).bit_length())
    # The place is part of the key: equal ids keep their order, whatever the sort does.
    keys = np.sort((ids.numpy() << bits) | np.arange(n))
    found = keys >> bits
    same = found[1:] == found[:-1]
    if not same.any():
        return
    is_repeated = np.zeros(n, dtype=bool)
    is_repeated[1:] = same
    is_first = ~is_repeated
    is_repeated[:-1] |= same
    is_first = is_first[is_repeated]
    places = torch.from_numpy(keys[is_repeated] & ((1 << bits) - 1))
    numbers = torch.from_numpy(np.cumsum(is_first) - 1)
    sums = gradient.new_zeros(int(numbers[-1]) + 1, gradient.shape[1])
    _add_rows(sums, numbers, gradient.index_select(0, places))
    gradient.index_fill_(0, places, 0.0)
    gradient.index_copy_(0, places[torch.from_numpy(is_first)], sums)


def _add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """table[ids] += rows, (n, D); ids that are there twice are added twice."""
    if rows.shape[1] < SPREAD_FROM:
        table.index_add_(0, ids, rows)
    else:  # index_add_ does the same on one thread
        table.scatter_add_(0, ids.unsqueeze(1).expand_as(rows), rows)
