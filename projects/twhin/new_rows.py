"""Where the rows of new entities start, from those of their known neighbours.

An edge (s, r, t) with a known s asks for its t with the query op_r(θ_s), and the other way round
(`scoring`). A new entity starts at the mean of the queries of its training edges whose other side
is known. For dot and cosine only the direction of a vector tells what it is near to, so the mean is
made as long as the known rows of its table are on average.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from projects.twhin.anchors import map_rows, path_of
from projects.twhin.config import TwhinConfig
from projects.twhin.data import COLUMNS, EdgeLayout
from projects.twhin.model import build_scoring
from projects.twhin.operators import Operators
from projects.twhin.scoring import Entities, Scoring
from tml.data.parquet import Columns, ParquetRows

EDGES_AT_ONCE = 1 << 16


class _Sums:
    """Sums of the queries for the new rows of a table, and how many there were."""

    def __init__(self, previous: Tensor) -> None:
        self.previous = previous  # (rows, D), NaN for new ones
        self.is_new = previous[:, 0].isnan()
        self.number = self.is_new.cumsum(0) - 1  # (rows,): of a new row among the new ones
        self.sums = torch.zeros(int(self.is_new.sum()), previous.shape[1])
        self.counts = torch.zeros(len(self.sums))

    def add(self, rows: Tensor, queries: Tensor) -> None:
        """Queries (n, D) for the new rows `rows` (n,)."""
        numbers = self.number[rows]
        self.sums.index_add_(0, numbers, queries)
        self.counts.index_add_(0, numbers, torch.ones(len(rows)))

    def starts(self, *, as_long_as_known: bool) -> Tensor:
        """(rows, D), NaN where no neighbour says anything."""
        means = self.sums / self.counts.unsqueeze(1)  # 0 / 0 is NaN
        if as_long_as_known:
            lengths = means.norm(dim=1, keepdim=True)
            means *= torch.where(lengths > 0, self._mean_length() / lengths, torch.nan)
        found = torch.full(self.previous.shape, torch.nan)
        found[self.is_new] = means
        return found

    def _mean_length(self) -> float:
        known = ~self.is_new
        total = sum(
            float(self.previous[start : start + EDGES_AT_ONCE].norm(dim=1).nansum())
            for start in range(0, len(known), EDGES_AT_ONCE)
        )
        return total / max(1, int(known.sum()))


@torch.no_grad()
def neighbour_starts(
    config: TwhinConfig, operators: Operators, folder: Path, tables: list[str]
) -> dict[str, int]:
    """Write `<table>.start.npy` beside the previous vectors `<table>.npy` in `folder`; returns how
    many new rows of each table have a known neighbour.
    """
    model, data = config.model, config.train_data
    sums = {name: _Sums(map_rows(folder, name)) for name in tables}
    scoring, layout = build_scoring(model, operators), EdgeLayout(model)
    rows = ParquetRows(data.data_root, COLUMNS, data.offset, data.limit)
    for piece in rows.pieces:
        columns = rows.read(piece)
        layout.check(columns, piece.path, piece.file_row)
        for number, relation in enumerate(model.relations):
            if relation.lhs in sums and relation.rhs in sums:
                _add_edges(columns, number, scoring, sums[relation.lhs], sums[relation.rhs])
    has_direction = model.comparator in ("dot", "cosine")
    counts = {}
    for name, found in sums.items():
        starts = found.starts(as_long_as_known=has_direction)
        np.save(path_of(folder, f"{name}.start"), starts.numpy())
        counts[name] = int((~starts[:, 0].isnan()).sum())
    return counts


def _add_edges(columns: Columns, relation: int, scoring: Scoring, lhs: _Sums, rhs: _Sums) -> None:
    """Ask for the new ends of the edges of one relation."""
    chosen = columns["rel"] == relation
    heads, tails = (torch.from_numpy(columns[side][chosen]) for side in ("lhs", "rhs"))
    for side, asked, known, asked_sums, known_sums in (
        ("rhs", tails, heads, rhs, lhs),
        ("lhs", heads, tails, lhs, rhs),
    ):
        tells = asked_sums.is_new[asked] & ~known_sums.is_new[known]
        for rows, others in zip(
            asked[tells].split(EDGES_AT_ONCE), known[tells].split(EDGES_AT_ONCE), strict=True
        ):
            entities = Entities(known_sums.previous[others])
            queries = scoring.queries(side, entities, torch.full_like(others, relation))
            asked_sums.add(rows, queries.vectors)
