"""Losses of dot products with their gradients written out: what `scoring` and `tml.losses` say, for
the time and memory of four matrix products a side.

Each function computes the loss and all gradients going forward, in the one matrix of scores:
exponentials and then their derivatives take its place. Going backward only multiplies by what comes
from above. Autograd would keep four such matrices and pass over each several times.

    softmax, scores x / T of the true one p and the negatives x_k:
        loss = log(e^p + Σ e^x_k) − p,   ∂x_k = softmax_k / T,   ∂p = (softmax_p − 1) / T
    logistic:
        loss = log(1 + e^−p) + Σ log(1 + e^x_k),   ∂x_k = σ(x_k),   ∂p = −σ(−p)
    and of the vectors of scores X = Q Cᵀ:   ∂Q = ∂X C,   ∂C = ∂Xᵀ Q
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.comparators import wide
from projects.twhin.scoring import Entities, Queries, chunked


@dataclass(frozen=True)
class Objective:
    """Which loss."""

    temperature: float | None
    """Of the softmax; None: logistic."""
    counts_positive: bool = True
    """False: the logistic term of the positive is left out."""


def shared_loss(
    queries: Queries,
    true: Entities,
    negatives: Entities,
    masked: Tensor,
    log_counts: Tensor | None,
    weight: Tensor | None,
    objective: Objective,
    chunk_size: int,
) -> Tensor:
    """Sum of the losses of queries (n, D) with their true entities (n, D) and the negatives
    (chunks, K, D) that those of a chunk share; masked and log_counts (n, K), weight (n,) → scalar.
    """
    rest = (masked, log_counts, weight, objective, chunk_size)
    found = _Shared.apply(  # type: ignore[no-untyped-call]
        queries.vectors,
        queries.extra,
        true.vectors,
        true.biases,
        negatives.vectors,
        negatives.biases,
        rest,
    )
    assert isinstance(found, Tensor)
    return found


class Written(torch.autograd.Function):
    """Gradients are made going forward."""

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "backward goes through a hand-written loss once"
        return tuple(one if one is None else one.mul_(above[0]) for one in gradients)


class _Shared(Written):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        extra: Tensor | None,
        true: Tensor,
        true_bias: Tensor | None,
        negatives: Tensor,
        negative_bias: Tensor | None,
        rest: tuple[Tensor, Tensor | None, Tensor | None, Objective, int],
    ) -> Tensor:
        masked, log_counts, weight, objective, chunk_size = rest
        n = len(queries)
        together = chunked(queries, chunk_size)  # (chunks, C, D)
        scores = wide(torch.bmm(together, negatives.transpose(1, 2)))  # (chunks, C, K)
        if negative_bias is not None:
            scores += negative_bias.unsqueeze(1)
        rows = scores.flatten(0, 1)  # the same memory
        rows[n:] = 0.0
        rows = rows[:n]
        positive = (queries * true).sum(dim=1)
        if extra is not None:
            rows += extra.unsqueeze(1)
            positive += extra
        if true_bias is not None:
            positive += true_bias
        if objective.temperature is None:
            loss, d_positive = _logistic(positive, rows, masked, weight, objective.counts_positive)
        else:
            t = objective.temperature
            loss, d_positive = _softmax(positive, rows, masked, log_counts, weight, t)
        ctx.gradients = None
        if any(ctx.needs_input_grad):
            d_queries = wide(torch.bmm(scores, negatives)).flatten(0, 1)[:n]
            d_queries.addcmul_(d_positive.unsqueeze(1), true)
            ctx.gradients = (
                d_queries,
                None if extra is None else rows.sum(dim=1).add_(d_positive),
                queries * d_positive.unsqueeze(1),
                None if true_bias is None else d_positive,
                wide(torch.bmm(scores.transpose(1, 2), together)),
                None if negative_bias is None else scores.sum(dim=1),
                None,
            )
        return loss


def _softmax(
    positive: Tensor,
    negative: Tensor,
    masked: Tensor | None,
    log_counts: Tensor | None,
    weight: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(loss, ∂positive); negative (n, K) becomes its own derivative."""
    positive = positive / temperature
    if temperature != 1.0:
        negative /= temperature
    if log_counts is not None:
        negative -= log_counts
    if masked is not None:
        negative.masked_fill_(masked, -torch.inf)
    top = torch.maximum(negative.amax(dim=1), positive)
    negative.sub_(top.unsqueeze(1)).exp_()
    own = (positive - top).exp_()
    total = negative.sum(dim=1) + own
    loss = total.log() + top - positive
    share = torch.full_like(positive, 1 / temperature) if weight is None else weight / temperature
    negative *= (share / total).unsqueeze(1)
    return _weighted(loss, weight), (own / total - 1) * share


def _logistic(
    positive: Tensor,
    negative: Tensor,
    masked: Tensor | None,
    weight: Tensor | None,
    counts_positive: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, ∂positive); negative (n, K) becomes its own derivative."""
    if masked is not None:
        negative.masked_fill_(masked, -torch.inf)
    loss = F.softplus(negative).sum(dim=1)
    negative.sigmoid_()
    d_positive = torch.zeros_like(positive)
    if counts_positive:
        loss += F.softplus(-positive)
        d_positive = -torch.sigmoid(-positive)
    if weight is not None:
        negative *= weight.unsqueeze(1)
        d_positive *= weight
    return _weighted(loss, weight), d_positive


def _weighted(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss.sum() if weight is None else (loss * weight).sum()
