"""Tables of float32 rows in one process on a processor: rows are looked up and updated, never all.

FBGEMM's update sorts the ids of a batch and walks over their rows one by one: 26 ms of processor
time for 40,000 rows of 128 floats. The compiled kernel (tml/native/rows.c) takes 8. Where there is
none, torch takes 15: the gradients of rows that were looked up twice are summed first, which most
batches of a large table hardly need; then all rows change by whole-array operations: Adagrad's
accumulator, its root, the step, and one addition to the table.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tml.embeddings import Ids, Rows, RowSource, Tables, TableSpec, copy_rows
from tml.native.kernels import load_kernels
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

    def cut(self, name: str, rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
        """See Tables. The gradients of the pieces go to the table as they are: to join them would
        take a tenth of a step.
        """
        pieces = _Cut.apply(rows, self._tables[name], lengths)  # type: ignore[no-untyped-call]
        assert isinstance(pieces, tuple)
        return pieces

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
        self.looked_up = (0, torch.empty(0, dtype=torch.int64))
        """Where the rows of the last lookup lie, and their ids."""
        # Stands for the weight in autograd's graph, whose gradient would be as large as the table.
        # It gets its own, a zero, when all lookups have got theirs: then the update runs, once.
        self._token = torch.zeros(1, requires_grad=True)
        self._token.register_post_accumulate_grad_hook(self._update)
        self.kernels = load_kernels()

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows (n, D)."""
        rows = _Rows.apply(self._token, self, ids)  # type: ignore[no-untyped-call]
        assert isinstance(rows, Tensor)
        return rows

    @torch.no_grad()
    def _update(self, token: Tensor) -> None:
        token.grad = None
        parts, self.gradients = self.gradients, []
        parts = [(ids, gradient) for ids, gradient in parts if len(ids)]
        if parts:
            ids, gradients = zip(*parts, strict=True)
            self.update_rows(ids, gradients)

    def update_rows(self, ids: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Change the rows `ids`, (n_i,) each, by their gradients, (n_i, D) each."""
        settings = self.spec.optimizer.settings
        if self.kernels is None:
            self._update_by_torch(ids, _own(gradients))
            return
        self.kernels.update_rows(
            self.spec.optimizer.kind,
            self.weight,
            self.accumulator,
            ids,
            gradients,
            self.learning_rate,
            settings.eps if isinstance(settings, Adagrad) else 0.0,
        )

    def _update_by_torch(self, parts: Sequence[Tensor], gradients: list[Tensor]) -> None:
        """See update_rows; the gradients are used up."""
        if self.accumulator is None:
            for ids, gradient in zip(parts, gradients, strict=True):
                _add_rows(self.weight, ids, gradient.mul_(-self.learning_rate))
            return
        settings = self.spec.optimizer.settings
        assert isinstance(settings, Adagrad)
        _sum_repeated(torch.cat(list(parts)), gradients)
        for ids, gradient in zip(parts, gradients, strict=True):
            if self.accumulator.dim() == 1:  # row-wise: the mean square of a row's gradient
                squares = torch.linalg.vector_norm(gradient, dim=1).square_().div_(self.spec.dim)
                self.accumulator.index_add_(0, ids, squares)
            else:
                _add_rows(self.accumulator, ids, gradient.square())
        for ids, gradient in zip(parts, gradients, strict=True):
            root = self.accumulator.index_select(0, ids).sqrt_().add_(settings.eps)
            if root.dim() == 1:
                gradient.mul_(root.reciprocal_().mul_(-self.learning_rate).unsqueeze(1))
            else:
                gradient.div_(root).mul_(-self.learning_rate)
            _add_rows(self.weight, ids, gradient)


class _Rows(torch.autograd.Function):
    """Rows of a table; their gradient is left with it."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, table: _RowTable, ids: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.table, ctx.ids = table, ids
        rows = table.weight.index_select(0, ids)
        table.looked_up = (rows.data_ptr(), ids)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor, None, None]:
        if gradient is not None:  # pieces of a cut have left theirs already
            ctx.table.gradients.append((ctx.ids, gradient))
        return torch.zeros(1), None, None


class _Cut(torch.autograd.Function):
    """Looked-up rows in pieces."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, table: _RowTable, lengths: Sequence[int]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        place, ids = table.looked_up
        assert place == rows.data_ptr(), "only rows as they were looked up last can be cut"
        ctx.table, ctx.ids = table, ids.split(lengths)
        pieces: tuple[Tensor, ...] = rows.split(list(lengths))
        return pieces

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        found = zip(ctx.ids, gradients, strict=True)
        ctx.table.gradients += [(ids, one) for ids, one in found if one is not None]
        return None, None, None


def _own(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, each in memory of its own, to be changed in place: an expanded gradient, such
    as that of a sum, has none, and the gradient of a + b is that of both.
    """
    taken: set[int] = set()
    found = []
    for gradient in gradients:
        is_own = gradient.is_contiguous() and gradient.data_ptr() not in taken
        found.append(gradient if is_own else gradient.clone().contiguous())
        taken.add(gradient.data_ptr())
    return found


def _sum_repeated(ids: Tensor, gradients: list[Tensor]) -> None:
    """Leave the gradients of a row that is there several times with the first, as their sum; the
    others become 0. ids (n,) are those of all gradients, (n_i, D) each, one behind the other.
    """
    n = len(ids)
    bits = max(1, (n - 1).bit_length())
    # The place is part of the key: equal ids keep their order, whatever the sort does.
    keys = np.sort((ids.numpy() << bits) | np.arange(n))
    found = keys >> bits
    repeated = np.flatnonzero(found[1:] == found[:-1]) + 1
    if not len(repeated):
        return
    places = keys & ((1 << bits) - 1)
    begins = np.diff(repeated, prepend=-1) != 1  # the first is the one before
    firsts = places[(repeated[begins] - 1)[np.cumsum(begins) - 1]]
    order = np.argsort(firsts, kind="stable")
    firsts, others = firsts[order], places[repeated[order]]
    ends = np.cumsum([len(gradient) for gradient in gradients])
    moved = gradients[0].new_empty(len(others), gradients[0].shape[1])
    # numpy, because torch's index_fill_ and index_copy_ take three times as long.
    for end, gradient in zip(ends, gradients, strict=True):
        rows, start = gradient.numpy(), end - len(gradient)
        chosen = np.flatnonzero((others >= start) & (others < end))
        here = others[chosen] - start
        moved.numpy()[chosen] = rows[here]
        rows[here] = 0.0
    cuts = np.searchsorted(firsts, ends)
    begin = 0
    for cut, end, gradient in zip(cuts, ends, gradients, strict=True):
        here = firsts[begin:cut] - (end - len(gradient))
        _add_rows(gradient, torch.from_numpy(here), moved[begin:cut])
        begin = cut


def _add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """table[ids] += rows, (n, D); ids that are there twice are added twice."""
    if rows.shape[1] < SPREAD_FROM:
        table.index_add_(0, ids, rows)
    elif len(ids):  # index_add_ does the same on one thread
        table.scatter_add_(0, ids.unsqueeze(1).expand_as(rows), rows)
