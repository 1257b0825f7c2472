"""Ranking metrics, computed from scores; what gave the scores is not known here.

Two protocols. Link prediction: the one true candidate of a query among all others that are not true
either ("filtered"), ties at their mean rank; MRR, mean rank, Hits@k (Bordes et al. 2013, arXiv
1811.04441 on ties). Retrieval: the best K candidates of a query against its set of relevant ones;
Recall@K, NDCG@K, Hit@K with binary gains (as in arXiv 2002.02126, the LightGCN paper).

All of them are returned per query, unitless and in float64, so that callers may add them up over
blocks, relations and processes before they divide. Larger scores are better. NaN scores are an
error: every comparison with NaN is false, so a broken model would be given perfect ranks.
"""

import numpy as np
import torch
from torch import Tensor

TIE_SEED = 20  # any fixed number: the same scores must give the same metrics


def filtered_ranks(
    scores: Tensor, rows: Tensor, targets: Tensor, known: tuple[Tensor, Tensor]
) -> Tensor:
    """Rank of each target among the candidates of its row that are not known to be true: (n,)
    float64, from 1.

    scores: (q, C) floats, one row for each query; OVERWRITTEN, to save a copy of the largest
    tensor. rows, targets: (n,) int64; edge i asks for the rank of column targets[i] in row rows[i].
    known: row and column indices of true candidates, which are left out of the competition; the
    target itself may be among them or not.

    rank = 1 + number of better candidates + half the number of equally good ones, the target not
    counted.
    """
    refuse_nan(scores)
    own = scores[rows, targets].unsqueeze(1)  # (n, 1)
    # NaN is neither above, below nor equal to anything, infinities included: it takes a candidate
    # out of all counts.
    scores[known] = torch.nan
    target_counts = scores[rows, targets].eq(own.squeeze(1))  # targets that are not known
    is_identity = len(rows) == len(scores) and bool((rows.diff() == 1).all())
    candidates = scores if is_identity else scores.index_select(0, rows)  # (n, C)
    better = count_true(candidates > own)
    equal = count_true(candidates == own) - target_counts.long()
    return 1 + better.double() + equal.double() / 2


def reciprocal_ranks(ranks: Tensor) -> Tensor:
    """1/rank; its mean is the MRR. ranks: (n,) from 1."""
    return 1 / ranks


def hits(ranks: Tensor, k: int) -> Tensor:
    """1 where the rank is at most k, else 0; its mean is Hits@k. ranks: (n,) from 1."""
    return (ranks <= k).double()


def top_columns(scores: Tensor, k: int) -> Tensor:
    """The min(k, C) columns of largest score in each row, best first: (q, min(k, C)) int64.

    Equal scores are put in a random order, the same in every call. The order of `topk` would follow
    the columns, and with ids sorted by frequency a model that scores everything alike would pass
    for one that knows popularity.
    """
    refuse_nan(scores)
    wanted = min(k, scores.shape[1])
    # One more than wanted: whether the last place is shared shows only beside the first one left
    # out.
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    is_tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().squeeze(1)
    columns = columns[:, :wanted]
    if len(is_tied):
        generator = torch.Generator().manual_seed(TIE_SEED)
        order = torch.randperm(scores.shape[1], generator=generator).to(scores.device)
        columns[is_tied] = order[scores[is_tied][:, order].topk(wanted, dim=1).indices]
    return columns


def found(columns: Tensor, relevant: tuple[Tensor, Tensor], num_candidates: int) -> Tensor:
    """Whether each retrieved column is relevant for its row: (q, k) bool.

    columns: (q, k) int64, best first. relevant: row and column indices of the relevant candidates.
    """
    table = torch.zeros(len(columns), num_candidates, dtype=torch.bool, device=columns.device)
    table[relevant] = True
    return table.gather(1, columns)


def recall_at(is_found: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Share of a query's relevant candidates among its first k: (q,). num_relevant: (q,) at least
    1.
    """
    return is_found[:, :k].sum(dim=1).double() / num_relevant


def ndcg_at(is_found: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Discounted gain of the first k over that of the ideal order, which has min(num_relevant, k)
    hits: (q,).

    A hit at position p (from 1) gains 1/log2(p + 1).
    """
    positions = torch.arange(1, k + 1, dtype=torch.float64, device=is_found.device)
    gains = 1 / torch.log2(positions + 1)
    taken = is_found[:, :k]
    gained = (taken.double() * gains[: taken.shape[1]]).sum(dim=1)
    ideal = gains.cumsum(0)[num_relevant.clamp(max=k) - 1]
    return gained / ideal


def hit_at(is_found: Tensor, k: int) -> Tensor:
    """1 where at least one of the first k is relevant, else 0: (q,)."""
    return is_found[:, :k].any(dim=1).double()


def refuse_nan(scores: Tensor) -> None:
    """ValueError if a score is NaN."""
    # The sum is finite in all ordinary cases and costs a tenth of looking at every score.
    if not bool(torch.isfinite(scores.sum())) and bool(scores.isnan().any()):
        count = int(scores.isnan().sum())
        raise ValueError(
            f"{count} of {scores.numel()} scores are NaN and cannot be ranked; the model's vectors "
            "hold NaN or infinity: train with a smaller learning rate or from an earlier checkpoint"
        )


def count_true(mask: Tensor) -> Tensor:
    """Number of true values in each row of a (n, C) bool tensor: (n,) int64."""
    if mask.device.type == "cpu":
        # numpy counts bytes; torch widens every one to int64 first and takes ten times as long.
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1).astype(np.int64))
    return mask.sum(dim=1)
