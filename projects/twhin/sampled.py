"""Link prediction among sampled candidates, for tables too large to rank all of: time and memory do
not grow with the table.

A query ranks its true entity among N entities of the table, drawn uniformly and without doubles;
those known to be true are left out as in the full protocol. Its numbers are much higher than among
all candidates and must not be compared with them (Krichene and Rendle, 2020: they may even order
models differently). With N at least the table's size it is the full protocol.

    sums = sampled_link_prediction(scorer, relations, test, known, 1000, seed=1)
    report = link_prediction_report(relations, sums, protocol(1000))
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from projects.twhin.edges import Edges, Groups, Ids, Lookup, Side
from projects.twhin.link_prediction import empty_sums, sum_ranks
from projects.twhin.ranking import CandidateScorer, Relation, Sums, check_relations, on
from tml import metrics

QUERIES_OF_DRAW = 64
"""Edges of a relation for each draw, up to MAX_DRAWS: candidates shared by some edges make one
product, and many draws make the mean over edges nearly that of a draw for each edge.
"""
MAX_DRAWS = 64
BLOCK_QUERIES = 256
"""Queries scored at once; their true entities are scored along with the candidates."""


def protocol(num_candidates: int) -> str:
    """How a report names it."""
    return (
        f"filtered, {num_candidates:,} sampled candidates: not comparable with the full protocol; "
        "ties at their mean rank"
    )


def sampled_link_prediction(
    scorer: CandidateScorer,
    relations: Sequence[Relation],
    edges: Edges,
    known: Edges,
    num_candidates: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> Sums:
    """As `link_prediction`, the true entity among `num_candidates` drawn ones.

    The draw of an edge follows from seed, relation, side and the edge's place among its relation's,
    whatever the number of processes.
    """
    check_relations(edges, relations)
    rank, world_size = shard
    sums = empty_sums(relations)
    known_groups = Groups(known.rel, len(relations))
    for relation, index in Groups(edges.rel, len(relations)):
        truth = known.take(known_groups.members(relation))
        num_draws = min(MAX_DRAWS, -(-len(index) // QUERIES_OF_DRAW))
        for position, side in enumerate(Side):
            lookup = Lookup(truth.entities(side.other), truth.entities(side))
            num_rows = scorer.num_candidates(relation, side)
            for draw in range(num_draws):
                mine = index[draw::num_draws]
                queries = edges.take(mine[mine % world_size == rank])
                generator = np.random.default_rng([seed, relation, position, draw])
                drawn = _draw(generator, num_rows, num_candidates)
                for ranks in _ranks(scorer, relation, side, queries, drawn, lookup):
                    sums[relation, position] += sum_ranks(ranks)
    return sums


def _draw(generator: np.random.Generator, num_rows: int, num_candidates: int) -> Ids:
    """Ids of the candidates, ascending."""
    if num_candidates >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.sort(generator.choice(num_rows, num_candidates, replace=False, shuffle=False))


def _ranks(
    scorer: CandidateScorer,
    relation: int,
    side: Side,
    queries: Edges,
    drawn: Ids,
    lookup: Lookup,
) -> Iterator[Tensor]:
    """Ranks of the true entities of `queries`, edges of one relation, among those `drawn`."""
    asked_all, targets_all = queries.entities(side.other), queries.entities(side)
    for start in range(0, len(queries), BLOCK_QUERIES):
        block = slice(start, start + BLOCK_QUERIES)
        asked, rows = np.unique(asked_all[block], return_inverse=True)
        # One product for candidates and true entities: the same vector gets the same score.
        columns = np.union1d(drawn, targets_all[block])
        entities, candidates = torch.from_numpy(asked), torch.from_numpy(columns)
        scores = scorer.score(relation, side, entities, candidates)
        targets = np.searchsorted(columns, targets_all[block])
        left_out = _left_out(asked, columns, drawn, lookup)
        rows_on, targets_on, *known = on(scores, rows, targets, *left_out)
        yield metrics.filtered_ranks(scores, rows_on, targets_on, (known[0], known[1]))


def _left_out(asked: Ids, columns: Ids, drawn: Ids, lookup: Lookup) -> tuple[Ids, Ids]:
    """(row, column) of what does not compete: known edges, and true entities of other queries that
    were not drawn.
    """
    rows, neighbours = lookup.pairs(asked)
    places = np.minimum(np.searchsorted(columns, neighbours), len(columns) - 1)
    is_scored = columns[places] == neighbours
    others = np.flatnonzero(np.isin(columns, drawn, assume_unique=True, invert=True))
    all_rows = np.concatenate([rows[is_scored], np.repeat(np.arange(len(asked)), len(others))])
    all_columns = np.concatenate([places[is_scored], np.tile(others, len(asked))])
    return all_rows, all_columns
