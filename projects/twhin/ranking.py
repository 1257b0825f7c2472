"""What ranking asks of a model (`Scorer`) and of a relation, and what link prediction and retrieval
share: blocks of queries, sums that become means.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.twhin.edges import Edges, Ids, Side

BLOCK_SCORES = 1 << 24  # scores held at once: 64 MB of float32

Sums = NDArray[np.float64]
Report = dict[str, Any]


class Relation(Protocol):
    """What ranking asks of a relation; a RelationConfig is one."""

    @property
    def name(self) -> str: ...


class Scorer(Protocol):
    """What ranking asks of a model."""

    def score(self, relation: int, side: Side, entities: Tensor) -> Tensor:
        """Scores of all candidates of `side` for each entity of the other side.

        entities: (n,) int64 on the CPU. Returns (n, number of candidates) floats in fresh memory
        that the caller may overwrite, on any device; larger is better.
        """
        ...


class CandidateScorer(Scorer, Protocol):
    """A model that scores some of a table as well."""

    def score(
        self, relation: int, side: Side, entities: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """As Scorer.score; candidates: (c,) int64, ids of those that are scored, all where None."""
        ...

    def num_candidates(self, relation: int, side: Side) -> int:
        """Rows of the table that `side` is in."""
        ...


def blocks(scorer: Scorer, relation: int, side: Side, asked: Ids) -> Iterator[slice]:
    """Slices of the queries `asked` whose scores fit into one block."""
    if len(asked):
        num_candidates = scorer.score(relation, side, torch.from_numpy(asked[:1])).shape[1]
        size = max(1, BLOCK_SCORES // num_candidates)
        yield from (slice(start, start + size) for start in range(0, len(asked), size))


def on(scores: Tensor, *arrays: Ids) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)).to(scores.device) for array in arrays]


def divide(sums: Sums, names: Sequence[str]) -> dict[str, float]:
    """Means from a count followed by sums; none where nothing was counted."""
    if not sums[0]:
        return {}
    return {name: float(total / sums[0]) for name, total in zip(names, sums[1:], strict=True)}


def check_relations(edges: Edges, relations: Sequence[Relation]) -> None:
    if len(edges) and not 0 <= int(edges.rel.min()) <= int(edges.rel.max()) < len(relations):
        raise ValueError(
            f"edges name the relations {int(edges.rel.min())} to {int(edges.rel.max())}; the "
            f"config has {len(relations)}, numbered from 0"
        )
