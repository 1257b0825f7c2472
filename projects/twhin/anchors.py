"""The previous vectors of a run that was started warm: what its rows are pulled toward, or held at.

They lie in the run folder in the order of this run's ids, one file a table, rows of entities that
are new as NaN; each process maps them into memory and looks up what its batch needs, so they take
no memory of their own and need not be cut over processes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = "warm_start"
"""Below the run folder."""


class Anchors:
    """Previous vectors by table and row."""

    def __init__(self, folder: Path, tables: Sequence[str], pull: float, *, freeze: bool) -> None:
        """folder: that of the files `<table>.npy` (rows, D) float32; tables: those that have
        one, of biases too where they are frozen.
        """
        self.pull = pull
        """λ of λ ‖θ − θ_previous‖²."""
        self._previous = {name: map_rows(folder, name) for name in tables}
        self._held = {
            name: ~rows[:, 0].isnan() for name, rows in self._previous.items() if freeze
        }  # (rows,) bool

    def distance(self, table: str, ids: Tensor, vectors: Tensor) -> Tensor:
        """Σ ‖θ − θ_previous‖² over the rows `ids` (n,) that have a previous vector; vectors (n, D)
        are θ.
        """
        previous = self._previous.get(table)
        if previous is None:
            return vectors.new_zeros(())
        found = previous[ids.cpu()].to(vectors.device)
        # Where there is nothing to be pulled to, the difference and its gradient are 0.
        return torch.where(found.isnan(), 0.0, vectors - found).square().sum()

    def hold(self, table: str, ids: Tensor | None, rows: Tensor) -> Tensor:
        """Let no gradient reach those of `rows` (all of the table where ids is None) that have a
        previous vector, where they are frozen.
        """
        held = self._held.get(table)
        if held is None or not rows.requires_grad:
            return rows
        held = (held if ids is None else held[ids.cpu()]).to(rows.device).unsqueeze(1)
        rows.register_hook(lambda gradient: gradient.masked_fill(held, 0.0))
        return rows


def path_of(folder: Path, table: str) -> Path:
    """The file of a table's previous vectors."""
    return folder / f"{table}.npy"


def map_rows(folder: Path, table: str) -> Tensor:
    """Previous vectors (rows, D) float32 of a table, read as they are needed."""
    # "c": torch wants memory that it may write to; what is written would never reach the file.
    return torch.from_numpy(np.load(path_of(folder, table), mmap_mode="c"))
