"""Negatives: rows of a table drawn uniformly or by degree, and how often each is to be expected.

P(row) ∝ (1 + d)^α, where d is the row's number of training edges on one side of the relations
between the same two tables. α = 0 is uniform, α = 3/4 word2vec's, α = 1 by popularity. The 1 lets
rows without an edge be drawn too: what is never a negative keeps the score it began with.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class NegativeSampler:
    """Draws rows of one table."""

    def __init__(self, num_rows: int, degrees: Ints | None = None, power: float = 0.0) -> None:
        """degrees (num_rows,) are needed for a power above 0."""
        self._num_rows = num_rows
        self._cumulative: NDArray[np.float64] | None = None
        if power:
            assert degrees is not None
            assert len(degrees) == num_rows
            sums = np.cumsum((1.0 + degrees) ** power)
            self._cumulative = sums / sums[-1]

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Ints:
        """Rows of `shape`, independent of each other."""
        if self._cumulative is None:
            return generator.integers(self._num_rows, size=shape)
        # The last sum is 1 exactly, and random() is below it.
        return np.searchsorted(self._cumulative, generator.random(shape), side="right")

    def log_counts(self, rows: Ints, num_draws: int) -> NDArray[np.float32]:
        """log(num_draws · P(row)) of each row: the log of how often it is expected."""
        if self._cumulative is None:
            return np.full(rows.shape, np.log(num_draws / self._num_rows), dtype=np.float32)
        before = np.where(rows > 0, self._cumulative[rows - 1], 0.0)
        return np.log(num_draws * (self._cumulative[rows] - before)).astype(np.float32)
