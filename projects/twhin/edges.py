"""Edges as arrays of ids, and what is asked of them: those of a relation, the neighbours of an
entity, a part of them spread over all.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Side(enum.StrEnum):
    """The side of an edge that is asked for."""

    LHS = "lhs"
    """Rank heads: the candidates are the relation's left-hand table, the queries right-hand
    entities.
    """
    RHS = "rhs"
    """Rank tails: the candidates are the relation's right-hand table, the queries left-hand
    entities.
    """

    @property
    def other(self) -> "Side":
        return Side.RHS if self is Side.LHS else Side.LHS


class HasTables(Protocol):
    """What is asked of a relation; a RelationConfig is one."""

    @property
    def lhs(self) -> str: ...

    @property
    def rhs(self) -> str: ...


@dataclass(frozen=True)
class Edges:
    """Edges as three int64 arrays of one length."""

    lhs: Ids
    rel: Ids
    rhs: Ids

    def __post_init__(self) -> None:
        assert len(self.lhs) == len(self.rel) == len(self.rhs)

    def __len__(self) -> int:
        return len(self.rel)

    def take(self, index: NDArray[Any]) -> "Edges":
        """The edges at `index`: positions or a mask."""
        return Edges(self.lhs[index], self.rel[index], self.rhs[index])

    def entities(self, side: Side) -> Ids:
        return self.lhs if side is Side.LHS else self.rhs


def join(parts: Sequence[Edges]) -> Edges:
    """All edges of all parts, such as those of train, valid and test that `link_prediction` knows
    to be true.
    """
    return Edges(
        np.concatenate([part.lhs for part in parts]),
        np.concatenate([part.rel for part in parts]),
        np.concatenate([part.rhs for part in parts]),
    )


def spread(edges: Edges, max_edges: int | None) -> Edges:
    """At most `max_edges` of the edges, evenly spaced over their order, the same ones in every
    process.
    """
    if max_edges is None or len(edges) <= max_edges:
        return edges
    return edges.take(np.arange(max_edges, dtype=np.int64) * len(edges) // max_edges)


def spread_users(edges: Edges, max_edges: int | None) -> Edges:
    """About `max_edges` of the edges, all of those of some left-hand entities of a relation, which
    are evenly spaced over their ids; the same ones in every process.
    """
    if max_edges is None or len(edges) <= max_edges:
        return edges
    width = int(edges.lhs.max()) + 1
    users, user_of = np.unique(edges.rel * width + edges.lhs, return_inverse=True)
    number = max(1, len(users) * max_edges // len(edges))
    is_kept = np.zeros(len(users), dtype=bool)
    is_kept[np.arange(number, dtype=np.int64) * len(users) // number] = True
    return edges.take(is_kept[user_of])


def of_relations(edges: Edges, relations: Sequence[int]) -> Edges:
    """The edges of the relations with these numbers."""
    return edges.take(np.isin(edges.rel, np.asarray(relations, dtype=np.int64)))


class Groups:
    """Positions of each relation's edges, found with one sort."""

    def __init__(self, rel: Ids, num_relations: int) -> None:
        self._order = np.argsort(rel, kind="stable")
        self._starts = np.searchsorted(rel[self._order], np.arange(num_relations + 1))

    def members(self, relation: int) -> Ids:
        return self._order[self._starts[relation] : self._starts[relation + 1]]

    def __iter__(self) -> Iterator[tuple[int, Ids]]:
        for relation in range(len(self._starts) - 1):
            if len(members := self.members(relation)):
                yield relation, members


class Lookup:
    """From an entity to its neighbours, for many entities at once."""

    def __init__(self, entities: Ids, neighbours: Ids) -> None:
        order = np.argsort(entities, kind="stable")
        self._entities, self._neighbours = entities[order], neighbours[order]

    def pairs(self, asked: Ids) -> tuple[Ids, Ids]:
        """(row, neighbour) of each neighbour of each asked entity; rows count the asked ones."""
        starts = np.searchsorted(self._entities, asked, side="left")
        counts = np.searchsorted(self._entities, asked, side="right") - starts
        rows = np.repeat(np.arange(len(asked)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self._neighbours[starts[rows] + within]


def count_unseen(edges: Edges, training: Edges, relations: Sequence[HasTables]) -> int:
    """How many of `edges` hold an entity that no training edge holds; scored as all are."""
    parts = [part.entities(side) for part in (edges, training) for side in Side]
    width = max((int(ids.max()) for ids in parts if len(ids)), default=0) + 1
    seen: dict[str, NDArray[np.bool_]] = {}
    groups = Groups(training.rel, len(relations))
    for number, relation in enumerate(relations):
        of_relation = training.take(groups.members(number))
        for table, ids in ((relation.lhs, of_relation.lhs), (relation.rhs, of_relation.rhs)):
            seen.setdefault(table, np.zeros(width, dtype=bool))[ids] = True
    count = 0
    for number, here in Groups(edges.rel, len(relations)):
        lhs_seen = seen[relations[number].lhs][edges.lhs[here]]
        rhs_seen = seen[relations[number].rhs][edges.rhs[here]]
        count += int((~(lhs_seen & rhs_seen)).sum())
    return count
