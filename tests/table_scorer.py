"""What tests of ranking rank: edges at random, and scores that are read from a table."""

import numpy as np
from torch import Tensor

from projects.twhin.edges import Edges, Side


class TableScorer:
    """Scores read from one (heads, tails) matrix a relation; remembers how many rows were asked for
    at once, the largest block of scores, and the candidates that were drawn.
    """

    def __init__(self, *matrices: Tensor) -> None:
        self.matrices = matrices
        self.asked: list[int] = []
        self.largest = 0
        self.drawn: list[tuple[int, ...]] = []

    def score(
        self, relation: int, side: Side, entities: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        self.asked.append(len(entities))
        matrix = self.matrices[relation]
        found = (matrix if side is Side.RHS else matrix.T)[entities]
        if candidates is not None:
            self.drawn.append(tuple(candidates.tolist()))
            found = found[:, candidates]
        self.largest = max(self.largest, found.numel())
        return found

    def num_candidates(self, relation: int, side: Side) -> int:
        return self.matrices[relation].shape[1 if side is Side.RHS else 0]


def random_edges(number: int, heads: int, relations: int, tails: int, seed: int) -> Edges:
    """Edges of ids below the numbers of heads, relations and tails."""
    random = np.random.default_rng(seed)
    return Edges(
        random.integers(0, heads, number),
        random.integers(0, relations, number),
        random.integers(0, tails, number),
    )
