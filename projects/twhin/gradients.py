"""Losses of edges with drawn negatives, their gradients written out: what `scoring` and
`tml.losses` say, for the time and memory of three batched products a side.

Going forward, exponentials and then the derivatives take the place of the scores in their one
matrix; going backward, it is multiplied with the vectors. Autograd would keep several such matrices
and pass over each many times.

    of scores x_k and the true one's p, divided by the temperature T for the softmax:
        softmax    log(e^p + Σ e^x_k) − p             ∂x_k = softmax_k / T, ∂p = (softmax_p − 1) / T
        logistic   log(1 + e^−p) + Σ log(1 + e^x_k)   ∂x_k = σ(x_k), ∂p = −σ(−p)
        margin     Σ max(0, m − p + x_k)              ∂x_k = 1 where above 0, ∂p = −Σ ∂x_k
    of queries q and candidates c:
        dot         x = ⟨q, c⟩       ∂q = Σ_c ∂x c, ∂c = Σ_q ∂x q
        squared_l2  x = −‖q − c‖²    ∂q = 2 Σ_c ∂x (c − q), ∂c = 2 Σ_q ∂x (q − c)
        l2          x = −‖q − c‖     the same with ∂x / ‖q − c‖ in place of 2 ∂x

What is the same for all candidates of a query has no part in softmax and margin: `needs_extra`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.comparators import SMALLEST_SQUARE, Comparator, wide
from projects.twhin.scoring import Entities, Queries, chunked
from tml.native.kernels import load_kernels

SMALLEST_ROOT = 1.001 * SMALLEST_SQUARE**0.5
"""A distance that is no greater has no gradient."""
LEAST_LOG = -64.0
"""Of a share: what is less likely than e^−64 = 1.6e-28 is lost in float32 sums anyway, and as a
number below 1.2e-38 (denormal) would make exponentials and products a hundred times slower.
"""
LEAST_LOGIT = -20.0
"""What is less counts e^−20 = 2e-9 in a logistic loss; its gradient is exact below too. Between −52
and −26 powers of e^x in the logarithm's series are denormal.
"""


@dataclass(frozen=True)
class Objective:
    """Which loss."""

    temperature: float | None = None
    """Of the softmax; None: another loss."""
    margin: float | None = None
    """Of the margin ranking; with neither: logistic."""
    counts_positive: bool = True
    """False: the logistic term of the positive is left out."""

    @property
    def needs_extra(self) -> bool:
        """Whether numbers that all candidates of a query share change the loss."""
        return self.temperature is None and self.margin is None


@dataclass(frozen=True)
class Hits:
    """Accidental hits that a kernel finds: where a query's true entity is in its chunk's ids."""

    true_ids: Tensor  # (n,)
    ids: Tensor  # (chunks, K)
    chunk_size: int


@dataclass(frozen=True)
class Negatives:
    """Candidates that the queries of a chunk share."""

    entities: Entities  # (chunks, K, D)
    chunk_size: int
    hidden: Tensor | Hits
    """Accidental hits: (n, K) bool, or their places in (n, K) as one row of numbers, or `Hits`."""
    log_counts: Tensor | None = None  # (chunks, K)


class Written(torch.autograd.Function):
    """Gradients are made going forward."""

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "backward goes through a hand-written loss once"
        return tuple(one if one is None else one.mul_(above[0]) for one in gradients)


def accidental_hits(true_ids: Tensor, ids: Tensor, chunk_size: int) -> Tensor | Hits:
    """Where a negative is the query's true entity: `Negatives.hidden` of true_ids (n,) and ids
    (chunks, K).
    """
    if not ids.is_cuda and load_kernels() is not None:
        return Hits(true_ids.contiguous(), ids.contiguous(), min(chunk_size, len(true_ids)))
    true = chunked(true_ids, chunk_size, padding=-1)
    if ids.is_cuda:
        return (true.unsqueeze(2) == ids.unsqueeze(1)).flatten(0, 1)[: len(true_ids)]
    # They are few: numpy finds them in a fifth of the time that a mask takes to make and to apply.
    same = true.numpy()[:, :, None] == ids.numpy()[:, None, :]
    return torch.from_numpy(np.flatnonzero(same))


def shared_loss(
    comparator: Comparator,
    queries: Queries,
    true: Entities,
    negatives: Sequence[Negatives],
    weight: Tensor | None,
    objective: Objective,
) -> Tensor:
    """Sum of the losses of queries (n, D) with their true entities (n, D) and all `negatives`;
    weight (n,), None: 1 → scalar.
    """
    assert queries.relation is None, "candidates that go through an operator are scored by autograd"
    vectors = [queries.vectors, true.vectors, *(one.entities.vectors for one in negatives)]
    if comparator == "cosine":
        vectors = [F.normalize(one, dim=-1) for one in vectors]
    rest = (comparator, negatives, weight, objective)
    extra = queries.extra if objective.needs_extra else None
    biases = [one.entities.biases for one in negatives]
    found = _Shared.apply(rest, extra, true.biases, *vectors, *biases)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rest: tuple[Comparator, Sequence[Negatives], Tensor | None, Objective],
        extra: Tensor | None,
        true_bias: Tensor | None,
        queries: Tensor,
        true: Tensor,
        *more: Tensor | None,
    ) -> Tensor:
        comparator, negatives, weight, objective = rest
        vectors, biases = more[: len(negatives)], more[len(negatives) :]
        products = Dots() if comparator in ("dot", "cosine") else Distances(comparator)
        positive = products.pairs(queries, true)
        if true_bias is not None:
            positive += true_bias
        if extra is not None:
            positive += extra
        keeps = any(ctx.needs_input_grad)
        given = (queries, positive, negatives, vectors, biases, weight, objective)
        loss, matrices, d_positive = score_side(products, *given, extra=extra, keeps=keeps)
        if keeps:
            ctx.made = (products, matrices, d_positive, extra is not None, rest)
            ctx.half = torch.is_autocast_enabled(queries.device.type)
            ctx.save_for_backward(true_bias, queries, true, *more)
        return loss

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:
        assert ctx.made is not None, "backward goes through a hand-written loss once"
        (products, matrices, d_positive, has_extra, rest), ctx.made = ctx.made, None
        negatives = rest[1]
        true_bias, queries, true, *more = ctx.saved_tensors
        vectors, biases = more[: len(negatives)], more[len(negatives) :]
        d_positive = d_positive * above[0]
        d_extra = d_positive.clone() if has_extra else None
        d_true_bias = None if true_bias is None else d_positive
        with torch.autocast(queries.device.type, torch.bfloat16, enabled=ctx.half):
            d_queries, d_vectors, d_biases = derive_side(
                products, queries, matrices, negatives, vectors, biases, above[0], d_extra
            )
        d_true = products.derive_pairs(d_positive, queries, true, d_queries)
        return (None, d_extra, d_true_bias, d_queries, d_true, *d_vectors, *d_biases)


def score_side(
    products: "Dots | Distances",
    queries: Tensor,
    positive: Tensor,
    negatives: Sequence[Negatives],
    vectors: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    weight: Tensor | None,
    objective: Objective,
    *,
    extra: Tensor | None = None,
    keeps: bool = True,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss of queries (n, D) whose true entities score `positive` (n,), its derivatives by the
    scores with each of `negatives`, (chunks · C, K), and by the positive ones (n,). keeps: False
    leaves the derivatives out.
    """
    t = objective.temperature or 1.0
    matrices = []  # (chunks · C, K) each
    for one, candidates, bias in zip(negatives, vectors, biases, strict=True):
        assert candidates is not None
        scores = products.shared(chunked(queries, one.chunk_size), candidates)
        if bias is not None:
            scores += bias.unsqueeze(1)
        if t != 1.0:
            scores /= t
        if one.log_counts is not None:
            scores -= one.log_counts.unsqueeze(1)
        matrices.append(scores.flatten(0, 1))
    n = len(queries)
    rows = [matrix[:n] for matrix in matrices]
    for one, own in zip(negatives, rows, strict=True):
        _hide(own, one.hidden)
    together = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    if extra is not None:
        together += extra.unsqueeze(1)
    loss, d_positive = _derive(positive, together, weight, objective)
    if keeps:
        if len(rows) > 1:
            torch.split_with_sizes_copy(together, [own.shape[1] for own in rows], 1, out=rows)
        for matrix in matrices:
            matrix[n:] = 0.0
    return loss, matrices, d_positive


def derive_side(
    products: "Dots | Distances",
    queries: Tensor,
    matrices: list[Tensor],
    negatives: Sequence[Negatives],
    vectors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    above: Tensor,
    d_extra: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Gradients of the queries, of the candidates and of their biases, times `above`; without what
    the pairs add. Those of `extra` are added to d_extra. The matrices are used up.
    """
    n = len(queries)
    d_queries: Tensor | None = None
    d_vectors: list[Tensor] = []
    d_biases: list[Tensor | None] = []
    for number, (one, candidates) in enumerate(zip(negatives, vectors, strict=True)):
        d = matrices[number].mul_(above).view(len(candidates), -1, candidates.shape[1])
        if d_extra is not None:
            d_extra += d.sum(dim=2).flatten()[:n]
        d_biases.append(None if biases[number] is None else d.sum(dim=1))
        asked = chunked(queries, one.chunk_size)
        d_asked, d_candidates = products.derive_shared(number, d, asked, candidates)
        d_asked = d_asked.flatten(0, 1)[:n]
        d_queries = d_asked if d_queries is None else d_queries.add_(d_asked)
        d_vectors.append(d_candidates)
    assert d_queries is not None
    return d_queries, d_vectors, d_biases


def _hide(scores: Tensor, hidden: Tensor | Hits) -> None:
    """scores (n, K) become −∞ where `hidden` says; see Negatives."""
    if isinstance(hidden, Hits):
        kernels = load_kernels()
        assert kernels is not None
        kernels.hide(scores, hidden.true_ids, hidden.ids, hidden.chunk_size)
    elif hidden.dtype == torch.bool:
        scores.masked_fill_(hidden, -torch.inf)
    else:
        scores.view(-1).index_fill_(0, hidden, -torch.inf)


class Dots:
    """Scores by dot products, in bfloat16 under autocast."""

    def pairs(self, queries: Tensor, true: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            return torch.einsum("nd,nd->n", queries, true)

    def shared(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(chunks, C, D) and (chunks, K, D) → (chunks, C, K)."""
        return wide(torch.bmm(queries, candidates.transpose(1, 2)))

    def derive_shared(
        self, number: int, d: Tensor, queries: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of queries and candidates; d (chunks, C, K) is that of their scores."""
        return wide(torch.bmm(d, candidates)), wide(torch.bmm(d.transpose(1, 2), queries))

    def derive_pairs(self, d: Tensor, queries: Tensor, true: Tensor, d_queries: Tensor) -> Tensor:
        """Gradient of `true`; that of the queries is added to d_queries."""
        d = d.unsqueeze(1)
        d_queries.addcmul_(d, true)
        return queries * d


class Distances:
    """Scores −‖q − c‖² or its root, by ‖q‖² + ‖c‖² − 2⟨q, c⟩. Large numbers cancel: never in
    bfloat16.
    """

    def __init__(self, comparator: Comparator) -> None:
        self._has_root = comparator == "l2"
        self._scale = 1.0 if self._has_root else 2.0
        self._roots: list[Tensor] = []
        self._true_roots: Tensor | None = None

    def pairs(self, queries: Tensor, true: Tensor) -> Tensor:
        squares = (queries - true).square_().sum(dim=1)
        if not self._has_root:
            return squares.neg_()
        self._true_roots = squares.clamp_min_(SMALLEST_SQUARE).sqrt_()
        return self._true_roots.neg()

    def shared(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """See Dots."""
        with torch.autocast(queries.device.type, enabled=False):
            squares = torch.baddbmm(
                candidates.square().sum(dim=2).unsqueeze(1),
                queries,
                candidates.transpose(1, 2),
                alpha=-2,
            )
        squares += queries.square().sum(dim=2, keepdim=True)
        if not self._has_root:
            return squares.clamp_min_(0.0).neg_()
        roots = squares.clamp_min_(SMALLEST_SQUARE).sqrt_()
        self._roots.append(roots)
        return roots.neg()

    def derive_shared(
        self, number: int, d: Tensor, queries: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See Dots."""
        if self._has_root:
            roots = self._roots[number]
            d.div_(roots).masked_fill_(roots <= SMALLEST_ROOT, 0.0)
        with torch.autocast(queries.device.type, enabled=False):
            d_queries = torch.baddbmm(
                queries * d.sum(dim=2, keepdim=True),
                d,
                candidates,
                beta=-self._scale,
                alpha=self._scale,
            )
            transposed = d.transpose(1, 2)
            d_candidates = torch.baddbmm(
                candidates * transposed.sum(dim=2, keepdim=True),
                transposed,
                queries,
                beta=-self._scale,
                alpha=self._scale,
            )
        return d_queries, d_candidates

    def derive_pairs(self, d: Tensor, queries: Tensor, true: Tensor, d_queries: Tensor) -> Tensor:
        """See Dots."""
        if self._true_roots is not None:
            roots = self._true_roots
            d = (d / roots).masked_fill_(roots <= SMALLEST_ROOT, 0.0)
        d_true = (queries - true).mul_((d * self._scale).unsqueeze(1))
        d_queries -= d_true
        return d_true


def _derive(
    positive: Tensor, negative: Tensor, weight: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(loss, ∂positive); negative (n, K) becomes its own derivative, none where it is −∞."""
    if objective.temperature is not None:
        return _softmax(positive, negative, weight, objective.temperature)
    if objective.margin is not None:
        return _margin(positive, negative, weight, objective.margin)
    return _logistic(positive, negative, weight, counts_positive=objective.counts_positive)


def _softmax(
    positive: Tensor, negative: Tensor, weight: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """See _derive; `negative` is divided by the temperature already."""
    positive = positive / temperature
    share = torch.full_like(positive, 1 / temperature) if weight is None else weight / temperature
    kernels = load_kernels()
    if kernels is not None and _suits_kernels(positive, negative, share):
        loss, d_positive = kernels.softmax(negative, positive, share, LEAST_LOG)
        return _weighted(loss, weight), d_positive
    top = torch.maximum(negative.amax(dim=1), positive)
    negative.sub_(top.unsqueeze(1)).clamp_min_(LEAST_LOG).exp_()
    own = (positive - top).exp_()
    total = negative.sum(dim=1) + own
    loss = total.log() + top - positive
    negative *= (share / total).unsqueeze(1)
    return _weighted(loss, weight), (own / total - 1) * share


def _suits_kernels(*tensors: Tensor) -> bool:
    return all(
        one.dtype == torch.float32 and one.device.type == "cpu" and one.is_contiguous()
        for one in tensors
    )


def _logistic(
    positive: Tensor, negative: Tensor, weight: Tensor | None, *, counts_positive: bool
) -> tuple[Tensor, Tensor]:
    """See _derive."""
    loss = F.softplus(negative.clamp_min(LEAST_LOGIT)).sum(dim=1)
    negative.clamp_min_(LEAST_LOG).sigmoid_()
    d_positive = torch.zeros_like(positive)
    if counts_positive:
        loss += F.softplus(-positive)
        d_positive = -torch.sigmoid(-positive)
    if weight is not None:
        negative *= weight.unsqueeze(1)
        d_positive *= weight
    return _weighted(loss, weight), d_positive


def _margin(
    positive: Tensor, negative: Tensor, weight: Tensor | None, margin: float
) -> tuple[Tensor, Tensor]:
    """See _derive."""
    negative.add_((margin - positive).unsqueeze(1)).relu_()
    loss = negative.sum(dim=1)
    negative.sign_()
    if weight is not None:
        negative *= weight.unsqueeze(1)
    return _weighted(loss, weight), -negative.sum(dim=1)


def _weighted(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss.sum() if weight is None else (loss * weight).sum()
