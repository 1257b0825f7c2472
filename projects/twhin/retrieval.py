"""Retrieval: the best right-hand entities of each left-hand one against those of its held-out
edges, as sums that add up over processes.

    sums = retrieval(scorer, relations, test, training, [20], shard=(rank, world_size))
    report = retrieval_report(relations, sums, [20])        # after an all_reduce of sums
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from projects.twhin.edges import Edges, Groups, Ids, Lookup, Side
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


def retrieval(
    scorer: Scorer,
    relations: Sequence[Relation],
    edges: Edges,
    training_edges: Edges,
    k: Sequence[int],
    shard: tuple[int, int] = (0, 1),
) -> Sums:
    """The best right-hand entities for each left-hand one, its training edges of the same relation
    left out.

    An edge of `edges` that is a training edge too cannot be found and is not asked for. Users
    without an edge to find are not counted. shard: (rank, world size); this process takes each
    world-size-th user of a relation. Returns (number of relations, 1 + 3·len(k)): number of users,
    then the sums of Recall, NDCG and Hit at each K.
    """
    check_relations(edges, relations)
    rank, world_size = shard
    sums = np.zeros((len(relations), 1 + 3 * len(k)))
    training_groups = Groups(training_edges.rel, len(relations))
    for relation, index in Groups(edges.rel, len(relations)):
        training = training_edges.take(training_groups.members(relation))
        wanted = _new_pairs(edges.take(index), training)
        users = np.unique(wanted.lhs)[rank::world_size]
        seen, sought = Lookup(training.lhs, training.rhs), Lookup(wanted.lhs, wanted.rhs)
        for block in blocks(scorer, relation, Side.RHS, users):
            scores = scorer.score(relation, Side.RHS, torch.from_numpy(users[block]))
            masked, relevant = seen.pairs(users[block]), sought.pairs(users[block])
            sums[relation] += _sum_retrieved(scores, masked, relevant, k)
    return sums


def retrieval_report(relations: Sequence[Relation], sums: Sums, k: Sequence[int]) -> Report:
    """Metrics of each relation from the sums of all processes; JSON-able. `mean` is over all
    (relation, user).
    """
    names = [f"{metric}@{cut}" for metric in ("recall", "ndcg", "hit") for cut in k]
    return {
        "protocol": "all candidates, training edges left out, mean over users with an edge to find",
        "users": int(sums[:, 0].sum()),
        "mean": divide(sums.sum(axis=0), names),
        "relations": {
            relation.name: {"users": int(sums[number, 0]), **divide(sums[number], names)}
            for number, relation in enumerate(relations)
            if sums[number, 0]
        },
    }


def _sum_retrieved(
    scores: Tensor, masked: tuple[Ids, Ids], relevant: tuple[Ids, Ids], k: Sequence[int]
) -> Sums:
    num_users, num_candidates = scores.shape
    masked_rows, masked_columns, rows, columns = on(scores, *masked, *relevant)
    metrics.refuse_nan(scores)
    scores[masked_rows, masked_columns] = -torch.inf
    best = metrics.top_columns(scores, max(k))
    is_found = metrics.found(best, (rows, columns), num_candidates)
    num_relevant = torch.bincount(rows, minlength=num_users)
    values = [torch.ones(num_users, dtype=torch.float64, device=scores.device)]
    values += [metrics.recall_at(is_found, num_relevant, cut) for cut in k]
    values += [metrics.ndcg_at(is_found, num_relevant, cut) for cut in k]
    values += [metrics.hit_at(is_found, cut) for cut in k]
    return torch.stack(values).sum(dim=1).cpu().numpy()


def _new_pairs(edges: Edges, training: Edges) -> Edges:
    """Edges of one relation, doubles dropped, without those that are training edges."""
    width = max((int(part.rhs.max()) for part in (edges, training) if len(part)), default=0) + 1
    pairs = np.unique(edges.lhs * width + edges.rhs)
    if len(training):
        seen = np.sort(training.lhs * width + training.rhs)
        places = np.minimum(np.searchsorted(seen, pairs), len(seen) - 1)
        pairs = pairs[seen[places] != pairs]  # np.isin of numpy 2.4 takes ten times as long
    return Edges(pairs // width, np.full(len(pairs), edges.rel[0]), pairs % width)
