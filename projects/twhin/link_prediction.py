"""Link prediction: filtered ranks of the true entity of each held-out edge, as sums that add up
over processes.

    sums = link_prediction(scorer, relations, test, known, shard=(rank, world_size))
    report = link_prediction_report(relations, sums)        # after an all_reduce of sums
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from projects.twhin.edges import Edges, Groups, Lookup, Side
from projects.twhin.ranking import (
    Relation,
    Report,
    Scorer,
    Sums,
    blocks,
    check_relations,
    divide,
    on,
)
from tml import metrics

HITS = (1, 3, 10)
LINK_METRICS = ("mrr", "mr", *(f"hits@{k}" for k in HITS))
PROTOCOL = "filtered, all candidates, ties at their mean rank"


def link_prediction(
    scorer: Scorer,
    relations: Sequence[Relation],
    edges: Edges,
    known: Edges,
    shard: tuple[int, int] = (0, 1),
) -> Sums:
    """Filtered ranks of the true tail among all tails and of the true head among all heads.

    known: true edges (train, valid and test together); those that answer the same query are no
    competitors. shard: (rank, world size); this process ranks each world-size-th edge. Returns
    (number of relations, 2 sides LHS and RHS, 1 + len(LINK_METRICS)): number of edges, then the sum
    of each metric over them.
    """
    check_relations(edges, relations)
    rank, world_size = shard
    sums = empty_sums(relations)
    known_groups = Groups(known.rel, len(relations))
    for relation, index in Groups(edges.rel[rank::world_size], len(relations)):
        queries = edges.take(index * world_size + rank)
        truth = known.take(known_groups.members(relation))
        for position, side in enumerate(Side):
            for ranks in _ranks(scorer, relation, side, queries, truth):
                sums[relation, position] += sum_ranks(ranks)
    return sums


def empty_sums(relations: Sequence[Relation]) -> Sums:
    """What `link_prediction` adds to."""
    return np.zeros((len(relations), len(Side), 1 + len(LINK_METRICS)))


def link_prediction_report(
    relations: Sequence[Relation], sums: Sums, protocol: str = PROTOCOL
) -> Report:
    """Metrics of each relation and side from the sums of all processes; JSON-able.

    `mean` is over all edges and both sides. A relation without edges is left out.
    """
    return {
        "protocol": protocol,
        "edges": int(sums[:, 0, 0].sum()),
        "mean": _link_means(sums.sum(axis=(0, 1))),
        **{side.value: _link_means(sums[:, i].sum(axis=0)) for i, side in enumerate(Side)},
        "relations": {
            relation.name: {
                "edges": int(sums[number, 0, 0]),
                "mean": _link_means(sums[number].sum(axis=0)),
                **{side.value: _link_means(sums[number, i]) for i, side in enumerate(Side)},
            }
            for number, relation in enumerate(relations)
            if sums[number, 0, 0]
        },
    }


def _ranks(
    scorer: Scorer, relation: int, side: Side, queries: Edges, truth: Edges
) -> Iterator[Tensor]:
    """Ranks of the edges `queries` of one relation, block by block; each query entity is scored
    once or twice.
    """
    asked_all, targets_all = queries.entities(side.other), queries.entities(side)
    # Edges that ask the same question come together, so that a block scores its question once.
    order = np.argsort(asked_all, kind="stable")
    asked_all, targets_all = asked_all[order], targets_all[order]
    lookup = Lookup(truth.entities(side.other), truth.entities(side))
    for block in blocks(scorer, relation, side, asked_all):
        asked, rows = np.unique(asked_all[block], return_inverse=True)
        scores = scorer.score(relation, side, torch.from_numpy(asked))
        rows_on, targets, *known = on(scores, rows, targets_all[block], *lookup.pairs(asked))
        yield metrics.filtered_ranks(scores, rows_on, targets, (known[0], known[1]))


def sum_ranks(ranks: Tensor) -> Sums:
    """Number of ranks (n,), then the sum of each metric over them."""
    values = [torch.ones_like(ranks), metrics.reciprocal_ranks(ranks), ranks]
    values += [metrics.hits(ranks, k) for k in HITS]
    return torch.stack(values).sum(dim=1).cpu().numpy()


def _link_means(sums: Sums) -> dict[str, float]:
    return divide(sums, LINK_METRICS)
