"""Ranking losses over positives and negatives: sums over the examples of a batch.

Shapes: `positive` (B,), `negative` (B, K), `masked` (B, K) bool, true where a negative is not to be
counted: a padding, or an accidental hit (a sampled negative that is a true edge). `weight` (B,) is
what each example counts; None: 1. Sums, not means: the caller knows how many examples all processes
have together.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(
    positive: Tensor,
    negative: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    negatives: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Σ_b [ −log σ(positive_b) − Σ_k log σ(−negative_bk) ] (Mikolov et al. 2013, eq. 4; TwHIN, eq.
    3) → scalar. negatives "mean": the mean over k in place of the sum, so that both parts weigh the
    same (PyTorch-BigGraph).
    """
    attracted = F.softplus(-positive)
    repelled = F.softplus(negative).masked_fill(masked, 0.0).sum(dim=1)
    if negatives == "mean":
        repelled = repelled / (~masked).sum(dim=1).clamp_min(1)
    return _weighted_sum(attracted + repelled, weight)


def sampled_softmax(
    positive: Tensor,
    negative: Tensor,
    masked: Tensor,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    log_counts: Tensor | None = None,
) -> Tensor:
    """Σ_b −log( e^positive_b / (e^positive_b + Σ_k e^negative_bk) ), scores divided by
    `temperature` → scalar.

    log_counts (B, K) or what broadcasts to it: log(K·Q) of each negative, the log of how often it
    is expected among K draws of probability Q. Subtracted from the divided scores, it makes the sum
    over negatives an unbiased estimate of that over all other candidates (logQ correction, Bengio
    and Senécal 2008, importance sampling). The positive is always there, hence not corrected.
    """
    scores = negative / temperature
    if log_counts is not None:
        scores = scores - log_counts
    scores = scores.masked_fill(masked, -torch.inf)
    true = positive / temperature
    scores = torch.cat([true.unsqueeze(1), scores], dim=1)
    return _weighted_sum(torch.logsumexp(scores, dim=1) - true, weight)


def full_softmax(
    scores: Tensor, target: Tensor, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Σ_b −log softmax(scores_b / temperature)[target_b] → scalar: 1-vs-all. scores (B, N) of all
    candidates, target (B,) the true one's place.
    """
    if weight is None:
        return F.cross_entropy(scores / temperature, target, reduction="sum")
    return _weighted_sum(F.cross_entropy(scores / temperature, target, reduction="none"), weight)


def margin_ranking(
    positive: Tensor,
    negative: Tensor,
    masked: Tensor,
    margin: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Σ_b Σ_k max(0, margin − positive_b + negative_bk) → scalar (TransE; PyTorch-BigGraph)."""
    missing = F.relu(margin - positive.unsqueeze(1) + negative).masked_fill(masked, 0.0)
    return _weighted_sum(missing.sum(dim=1), weight)


def _weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.sum() if weight is None else (values * weight).sum()
