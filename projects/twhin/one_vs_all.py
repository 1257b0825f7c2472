"""1-vs-all losses at the price of distinct questions, with their gradients written out.

An edge (s, r, t) that is asked for its tail is the question (s, r) with the answer t; asked for its
head, it is the question (t, r) of the other side. Edges that ask the same question have the same
scores x_q, so each distinct question q of a batch is compared with all candidates once:

    softmax    Σ_q c_q log Σ_k e^x_qk − Σ_j w_j x_qt
               ∂x_qk = c_q softmax_k − Σ w_j of the answers t_j = k
    logistic   Σ_q c_q Σ_k log(1 + e^x_qk) + Σ_j w_j (p log(1 + e^−x_qt) − log(1 + e^x_qt))
               ∂x_qk = c_q σ(x_qk) − Σ w_j (p σ(−x_qt) + σ(x_qt)) of the answers t_j = k

over the questions q and the edges j, whose question is q, answer t and weight w_j; c_q is the sum
of the weights of q's edges, and p the share of the positive term. These are the losses of
`tml.losses`, edge by edge, exactly.

The scores of a block of questions are made, become their own derivative, and are multiplied with
questions and candidates before the next block is made: the matrix of all scores is never there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.comparators import SMALLEST_SQUARE, Comparator, wide
from projects.twhin.gradients import LEAST_LOG, LEAST_LOGIT, SMALLEST_ROOT, Written
from projects.twhin.scoring import Entities, Queries

BLOCK_SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Scores of a block at most: on a processor they stay in its cache, a GPU wants large products."""


@dataclass(frozen=True)
class Questions:
    """The distinct questions of n edges."""

    first: Tensor  # (u,) the first edge that asks it
    number: Tensor  # (n,) which of them an edge asks


@dataclass(frozen=True)
class Answers:
    """The edges' answers, sorted by question."""

    question: Tensor  # (n,)
    entity: Tensor  # (n,) row of the candidates
    weight: Tensor  # (n,) what the edge counts


@dataclass(frozen=True)
class Objective:
    """Which loss."""

    temperature: float | None
    """Of the softmax; None: logistic."""
    positive_share: float = 1.0
    """What the logistic term of the positive counts."""


def distinct(asking: Tensor, relation: Tensor) -> Questions:
    """The questions of edges whose asking side is the entities `asking` (n,), by relation."""
    n = len(asking)
    keys = relation * (1 << 40) + asking
    found, number = torch.unique(keys, return_inverse=True)
    first = number.new_full((len(found),), n)
    first.scatter_reduce_(0, number, torch.arange(n, device=number.device), "amin")
    return Questions(first, number)


def sort_answers(questions: Questions, entity: Tensor, weight: Tensor | None) -> Answers:
    """entity (n,): each edge's answer; weight (n,), None: 1."""
    order = torch.argsort(questions.number, stable=True)
    weight = torch.ones(len(entity), device=entity.device) if weight is None else weight
    return Answers(questions.number[order], entity[order], weight[order])


def full_loss(
    comparator: Comparator,
    queries: Queries,
    everyone: Entities,
    answers: Answers,
    objective: Objective,
) -> Tensor:
    """Sum over the edges of the losses of their questions (u, D) with all candidates (N, D) →
    scalar.
    """
    assert queries.relation is None, "candidates that go through an operator are scored by autograd"
    vectors, candidates = queries.vectors, everyone.vectors
    if comparator == "cosine":
        vectors, candidates = F.normalize(vectors, dim=-1), F.normalize(candidates, dim=-1)
    rest = (comparator, answers, objective)
    found = _OneVsAll.apply(  # type: ignore[no-untyped-call]
        vectors, queries.extra, candidates, everyone.biases, rest
    )
    assert isinstance(found, Tensor)
    return found


class _OneVsAll(Written):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        extra: Tensor | None,
        everyone: Tensor,
        biases: Tensor | None,
        rest: tuple[Comparator, Answers, Objective],
    ) -> Tensor:
        comparator, answers, objective = rest
        learns = any(ctx.needs_input_grad)
        kind = _Dots if comparator in ("dot", "cosine") else _Distances
        products = kind(queries, everyone, comparator, learns=learns)
        counts = answers.weight.new_zeros(len(queries))
        counts.index_add_(0, answers.question, answers.weight)
        d_extra = None if extra is None else torch.empty_like(extra)
        d_biases = None if biases is None else torch.zeros_like(biases)
        total = wide(queries.new_zeros(()))
        for rows, own in _blocks(answers, len(queries), len(everyone)):
            scores = products.scores(rows)
            if biases is not None:
                scores += biases
            if extra is not None:
                scores += extra[rows].unsqueeze(1)
            if objective.temperature is None:
                share = objective.positive_share
                total += _logistic(scores, counts[rows], own, share, learns=learns)
            else:
                t = objective.temperature
                total += _softmax(scores, counts[rows], own, t, learns=learns)
            if not learns:
                continue
            if d_extra is not None:
                d_extra[rows] = scores.sum(dim=1)
            if d_biases is not None:
                d_biases += scores.sum(dim=0)
            products.add(rows, scores)
        ctx.gradients = None
        if learns:
            d_queries, d_everyone = products.gradients()
            ctx.gradients = (d_queries, d_extra, d_everyone, d_biases, None)
        return total


def _blocks(
    answers: Answers, num_questions: int, num_candidates: int
) -> Iterator[tuple[slice, Answers]]:
    """Stretches of questions, and their answers with questions numbered from the first one's."""
    most = BLOCK_SCORES.get(answers.entity.device.type, BLOCK_SCORES["cpu"])
    size = max(1, min(num_questions, most // num_candidates))
    starts = list(range(0, num_questions, size))
    seams = torch.tensor([*starts, num_questions], device=answers.question.device)
    ends = torch.searchsorted(answers.question, seams).tolist()
    for start, low, high in zip(starts, ends, ends[1:], strict=False):
        own = Answers(
            answers.question[low:high] - start, answers.entity[low:high], answers.weight[low:high]
        )
        yield slice(start, min(start + size, num_questions)), own


def _softmax(
    scores: Tensor, counts: Tensor, own: Answers, temperature: float, *, learns: bool
) -> Tensor:
    """The loss of a block; where it learns, scores (b, N) become their own derivative."""
    places = (own.question, own.entity)
    if temperature != 1.0:
        scores /= temperature
    scores -= scores.amax(dim=1, keepdim=True)
    true = scores[places]
    scores.clamp_min_(LEAST_LOG).exp_()
    sums = scores.sum(dim=1)
    if learns:
        scores *= (counts / (sums * temperature)).unsqueeze(1)
        scores.index_put_(places, own.weight / -temperature, accumulate=True)
    return counts @ sums.log() - own.weight @ true


def _logistic(
    scores: Tensor, counts: Tensor, own: Answers, positive_share: float, *, learns: bool
) -> Tensor:
    """The loss of a block; where it learns, scores (b, N) become their own derivative."""
    places = (own.question, own.entity)
    true = scores[places]
    loss = counts @ F.softplus(scores.clamp_min(LEAST_LOGIT)).sum(dim=1)
    if learns:
        scores.clamp_min_(LEAST_LOG).sigmoid_()
        scores *= counts.unsqueeze(1)
        change = positive_share * torch.sigmoid(-true) + torch.sigmoid(true)
        scores.index_put_(places, -own.weight * change, accumulate=True)
    return loss + own.weight @ (positive_share * F.softplus(-true) - F.softplus(true))


class _Dots:
    """Scores by dot products: ∂Q = ∂X C, ∂C = ∂Xᵀ Q. In bfloat16 under autocast."""

    def __init__(
        self, queries: Tensor, everyone: Tensor, comparator: Comparator, *, learns: bool
    ) -> None:
        self._half = torch.is_autocast_enabled(queries.device.type)
        # Rounded once for all three products.
        self._q = queries.bfloat16() if self._half else queries
        self._c = everyone.bfloat16() if self._half else everyone
        if learns:
            self._d_queries = torch.empty_like(queries)
            self._d_everyone = torch.zeros_like(everyone)

    def scores(self, rows: slice) -> Tensor:
        return wide(self._q[rows] @ self._c.T)

    def add(self, rows: slice, d: Tensor) -> None:
        """d (b, N): the derivative of the scores of `rows`."""
        if self._half:
            d = d.bfloat16()
            self._d_queries[rows] = d @ self._c
            self._d_everyone += d.T @ self._q[rows]
        else:
            torch.mm(d, self._c, out=self._d_queries[rows])
            self._d_everyone.addmm_(d.T, self._q[rows])

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._d_queries, self._d_everyone


class _Distances:
    """Scores −‖q − c‖² or its root, by ‖q‖² + ‖c‖² − 2⟨q, c⟩. Large numbers cancel: never in
    bfloat16.

    Of the squares S with the derivative ∂S: ∂q = 2 Σ_k ∂S_k (q − c_k), ∂c = 2 Σ_q ∂S_q (c − q);
    of the root, ∂S = −∂X / 2‖q − c‖, nothing below the smallest one.
    """

    def __init__(
        self, queries: Tensor, everyone: Tensor, comparator: Comparator, *, learns: bool
    ) -> None:
        self._has_root = comparator == "l2"
        self._q, self._c = queries, everyone
        self._q_squares = queries.square().sum(dim=1, keepdim=True)
        self._c_squares = everyone.square().sum(dim=1)
        self._roots: Tensor | None = None
        if learns:
            self._d_queries = torch.empty_like(queries)
            self._d_everyone = torch.zeros_like(everyone)
            self._sums = torch.zeros_like(self._c_squares)

    def scores(self, rows: slice) -> Tensor:
        with torch.autocast(self._q.device.type, enabled=False):
            squares = torch.addmm(self._c_squares, self._q[rows], self._c.T, alpha=-2)
        squares += self._q_squares[rows]
        if not self._has_root:
            return squares.clamp_min_(0.0).neg_()
        self._roots = squares.clamp_min_(SMALLEST_SQUARE).sqrt_()
        return self._roots.neg()

    def add(self, rows: slice, d: Tensor) -> None:
        """d (b, N): the derivative of the scores of `rows`; it is used up."""
        if self._roots is not None:
            d /= self._roots
            d.masked_fill_(self._roots <= SMALLEST_ROOT, 0.0)
        # Of the root, d is −2 ∂S; of the square, −∂S.
        scale = 1.0 if self._has_root else 2.0
        with torch.autocast(self._q.device.type, enabled=False):
            torch.addmm(
                d.sum(dim=1, keepdim=True) * self._q[rows],
                d,
                self._c,
                beta=-scale,
                alpha=scale,
                out=self._d_queries[rows],
            )
            self._d_everyone.addmm_(d.T, self._q[rows], alpha=scale)
        self._sums.add_(d.sum(dim=0), alpha=-scale)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._d_queries, self._d_everyone.addcmul_(self._sums.unsqueeze(1), self._c)
