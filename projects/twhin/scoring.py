"""Scores of edges and of whole rows of candidates; training, evaluation and export use these alone.

    f(s, r, t) = comparator(op_r(θ_s), θ_t) + b_s + b_t         (biases where the model has them)

Asked for tails, op_r(θ_s) is the query and candidates are compared with it. Asked for heads, the
operator is moved to the query's side where the comparator allows it (⟨op_r(s′), t⟩ = ⟨s′, L_rᵀ t⟩ +
⟨b_r, t⟩; ‖s′ + b_r − t‖ = ‖s′ − (t − b_r)‖), so that the edges of a chunk and its shared negatives
make one matrix product (PyTorch-BigGraph, arXiv 1903.12287, section 4.3). Where it does not allow
it, the candidates go through the operator, once for each relation of a chunk. With reciprocal
relations heads are the tails of the inverse relation, whose parameters lie R rows further.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.comparators import Comparator, pairs, products, wide
from projects.twhin.operators import LINEAR_PART_IS_IDENTITY, Operators


class HasOperator(Protocol):
    """What scoring asks of a relation; a RelationConfig is one."""

    @property
    def operator(self) -> str: ...


@dataclass(frozen=True)
class Entities:
    """Looked-up entities."""

    vectors: Tensor  # (…, D)
    biases: Tensor | None = None  # (…)

    def rows(self, chosen: Tensor) -> "Entities":
        """Those at `chosen` (n,), no one twice."""
        biases = None if self.biases is None else self.biases.index_select(0, chosen)
        return Entities(self.vectors.index_select(0, chosen), biases)

    def chunks(self, size: int) -> "Entities":
        """(n, …) → (⌈n / size⌉, size, …), the last chunk padded."""
        biases = None if self.biases is None else chunked(self.biases, size)
        return Entities(chunked(self.vectors, size), biases)


@dataclass(frozen=True)
class Queries:
    """Rows that ask for candidates of a side."""

    vectors: Tensor  # (n, D)
    extra: Tensor | None  # (n,): the same for all candidates of a row
    relation: Tensor | None = None  # (n,): candidates go through its operator first


class Scoring:
    """Operators and comparator."""

    def __init__(
        self,
        relations: Sequence[HasOperator],
        operators: Operators,
        comparator: Comparator,
        *,
        reciprocal: bool,
    ) -> None:
        self.operators = operators
        self.comparator = comparator
        self.reciprocal = reciprocal
        self._num_relations = len(relations)
        self.heads_by_product = moves_to_the_query(
            comparator, [relation.operator for relation in relations]
        )

    def queries(
        self, side: str, entities: Entities, relation: Tensor, *, needs_extra: bool = True
    ) -> Queries:
        """Ask for `side` of the edges whose other side is `entities` (n, D), of `relation` (n,).
        needs_extra: False leaves out the numbers that all candidates of a query share.
        """
        vectors, extra = entities.vectors, entities.biases if needs_extra else None
        if side == "rhs":
            return Queries(self.operators.apply_to(vectors, relation), extra)
        if self.reciprocal:
            inverse = relation + self._num_relations
            return Queries(self.operators.apply_to(vectors, inverse), extra)
        if not self.heads_by_product:
            return Queries(vectors, extra, relation)
        is_distance = self.comparator in ("l2", "squared_l2")
        offset = self.operators.offset(relation) if is_distance or needs_extra else None
        if is_distance:
            return Queries(vectors if offset is None else vectors - offset, extra)
        if offset is not None and needs_extra:
            moved = (offset * vectors).sum(dim=1)
            extra = moved if extra is None else extra + moved
        return Queries(self.operators.transpose(vectors, relation), extra)

    def pairs(self, queries: Queries, candidates: Entities) -> Tensor:
        """Score of each query with its one candidate → (n,)."""
        vectors = candidates.vectors
        if queries.relation is not None:
            vectors = self.operators.apply_to(vectors, queries.relation)
        scores = pairs(self.comparator, queries.vectors, vectors)
        for more in (queries.extra, candidates.biases):
            scores = scores if more is None else scores + more
        return scores

    def with_all(self, queries: Queries, candidates: Entities) -> Tensor:
        """Scores of each query with all candidates (N, D) → (n, N)."""
        if queries.relation is None:
            scores = products(self.comparator, queries.vectors, candidates.vectors)
        else:
            whole = candidates.vectors.unsqueeze(0)
            scores = self._moved(queries.vectors, queries.relation, whole, len(queries.vectors))
        return _plus(scores, queries.extra, candidates.biases)

    def with_shared(self, queries: Queries, candidates: Entities, chunk_size: int) -> Tensor:
        """Scores of the queries of a chunk with its candidates (chunks, K, D) → (n, K)."""
        n = len(queries.vectors)
        if queries.relation is None:
            together = chunked(queries.vectors, chunk_size)
            scores = products(self.comparator, together, candidates.vectors)
            if candidates.biases is not None:
                scores = scores + candidates.biases.unsqueeze(1)
            return _plus(scores.flatten(0, 1)[:n], queries.extra, None)
        scores = self._moved(queries.vectors, queries.relation, candidates.vectors, chunk_size)
        if candidates.biases is not None:
            shape = (-1, min(chunk_size, n), -1)
            scores = scores + candidates.biases.unsqueeze(1).expand(shape).flatten(0, 1)[:n]
        return _plus(scores, queries.extra, None)

    def _moved(self, queries: Tensor, relation: Tensor, candidates: Tensor, size: int) -> Tensor:
        """Scores with op_r(candidates): queries (n, D), candidates (chunks, K, D) → (n, K)."""
        chunk = torch.arange(len(queries), device=queries.device) // size
        places, counts = torch.unique_consecutive(
            torch.stack([chunk, relation]), dim=1, return_counts=True
        )
        each = candidates.unbind()
        scores = []
        for number, r, part in zip(
            places[0].tolist(), places[1].tolist(), queries.split(counts.tolist()), strict=True
        ):
            of_chunk = each[number]
            moved = self.operators.apply_to(of_chunk, relation.new_full((len(of_chunk),), r))
            scores.append(products(self.comparator, part, moved))
        return torch.cat(scores)


def moves_to_the_query(comparator: Comparator, operators: Sequence[str]) -> bool:
    """Whether heads can be asked for without putting them through any of the operators."""
    if comparator == "dot":
        return True
    allowed = ("identity",) if comparator == "cosine" else LINEAR_PART_IS_IDENTITY
    return all(operator in allowed for operator in operators)


def chunked(values: Tensor, size: int, padding: int = 0) -> Tensor:
    """(n, …) → (⌈n / size⌉, size, …), the last chunk padded."""
    size = min(size, len(values))  # a group of few edges is one chunk of so many
    missing = -len(values) % size
    if missing:
        values = F.pad(values, (0, 0) * (values.dim() - 1) + (0, missing), value=padding)
    return values.view(-1, size, *values.shape[1:])


def _plus(scores: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    for more in (None if rows is None else wide(rows).unsqueeze(1), columns):
        if more is None:
            continue
        # Scores are fresh memory, which autograd may still need as they are.
        scores = scores + more if scores.requires_grad else scores.add_(more)
    return scores
