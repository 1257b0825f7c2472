"""Relation prediction as an auxiliary task (arXiv 2110.02834): which relation joins two entities?

Beside the softmax over entities, each edge (s, r, t) adds λ times

    −log softmax_r' (f(s, r', t) / T) at r' = r

over the relations r' that join the same two tables. With reciprocal relations the question for
heads is one of the inverse relations: they compete, s and t having changed places.

For given entities, f compares the parameters of r' with a query of both, so that the scores of all
edges with all relations are one matrix product, whose gradients `one_vs_all` writes out:

    dot                 diagonal            ⟨d_r', s ⊙ t⟩                       (DistMult)
                        complex_diagonal    ⟨c_r', s̄ ⊙ t⟩ over ℂ, real part     (ComplEx)
                        translation         ⟨b_r', t⟩ + ⟨s, t⟩
                        identity            ⟨s, t⟩
    l2, squared_l2      translation         −‖t − s − b_r'‖, or its square      (TransE)
                        identity            the same with b_r' = 0

Where relations of several operators compete, their queries lie side by side, ⟨s, t⟩ as one more
number, and the parameters of a relation are zeros in the places of the others.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin import one_vs_all
from projects.twhin.comparators import Comparator, products
from projects.twhin.operators import LINEAR_PART_IS_IDENTITY, PARAMETERS, Operators
from projects.twhin.scoring import Entities, Queries
from tml import losses

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
"""The tables that an edge joins: left-hand, right-hand."""
BY_DOT = ("identity", "translation", "diagonal", "complex_diagonal")
"""Operators whose relations can be told apart by one product, with dot."""


class HasOperator(Protocol):
    """What relation prediction asks of a relation; a RelationConfig is one."""

    @property
    def lhs(self) -> str: ...

    @property
    def rhs(self) -> str: ...

    @property
    def operator(self) -> str: ...


@dataclass(frozen=True)
class Ends:
    """The vectors of one side of n edges."""

    vectors: Tensor  # (u, D)
    number: Tensor | None = None  # (n,) which of them an edge has; None: each its own

    def by_edge(self) -> Tensor:
        """(n, D)."""
        if self.number is None:
            return self.vectors
        rows = _Gathered.apply(self.vectors, self.number)  # type: ignore[no-untyped-call]
        assert isinstance(rows, Tensor)
        return rows


def competitors(relations: Sequence[HasOperator]) -> dict[Pair, list[int]]:
    """Tables → the numbers of the relations between them, where there is something to tell apart:
    several relations, not all of them the identity.
    """
    found: dict[Pair, list[int]] = {}
    for number, relation in enumerate(relations):
        found.setdefault((relation.lhs, relation.rhs), []).append(number)
    return {
        pair: numbers
        for pair, numbers in found.items()
        if len(numbers) > 1 and any(relations[r].operator != "identity" for r in numbers)
    }


def not_predicted(relations: Sequence[HasOperator], comparator: Comparator) -> int | None:
    """The first competing relation that is not known here; None where all are."""
    known: tuple[str, ...] = ()
    if comparator != "cosine":
        known = BY_DOT if comparator == "dot" else LINEAR_PART_IS_IDENTITY
    competing = (r for numbers in competitors(relations).values() for r in numbers)
    return next((r for r in sorted(competing) if relations[r].operator not in known), None)


class RelationPrediction:
    """The term of a model's edges."""

    def __init__(
        self,
        relations: Sequence[HasOperator],
        operators: Operators,
        comparator: Comparator,
        *,
        weight: float,
        temperature: float,
        reciprocal: bool,
    ) -> None:
        """weight: λ. Nothing to tell apart is announced."""
        self.reciprocal = reciprocal
        self._operators = operators
        self._comparator = comparator
        self._weight = weight
        self._temperature = temperature
        self._num_relations = len(relations)
        self._competing = {
            pair: torch.tensor(numbers) for pair, numbers in competitors(relations).items()
        }
        if not self._competing:
            logger.warning(
                "model.loss.softmax.relation_weight has no effect: no two tables are joined by "
                "several relations that could be told apart"
            )

    def is_asked(self, pair: Pair, side: str, sides: Sequence[str]) -> bool:
        """Whether edges between these tables have a term when their `side` is asked for, one of
        `sides`: with reciprocal relations on each side, else once.
        """
        return pair in self._competing and (self.reciprocal or side == sides[-1])

    def loss(
        self,
        pair: Pair,
        side: str,
        relation: Tensor,
        asking: Ends,
        answering: Ends,
        weight: Tensor | None,
        *,
        written: bool = True,
    ) -> Tensor:
        """λ times the sum of the terms of n edges between the tables `pair` that are asked for
        `side`: relation (n,), weight (n,), None: 1 → scalar. written: False leaves the gradients to
        autograd.
        """
        own = self._competing[pair].to(relation.device)
        target = torch.searchsorted(own, relation)
        if self.reciprocal and side == "lhs":
            own = own + self._num_relations
        x, y = asking.by_edge(), answering.by_edge()
        if side == "lhs" and not self.reciprocal:
            x, y = y, x
        queries, keys = self._compared(own, x, y)
        weight = torch.ones_like(x[:, 0]) if weight is None else weight
        weight = weight.detach() * self._weight
        if not written:
            scores = products(self._comparator, queries, keys)
            return losses.full_softmax(scores, target, self._temperature, weight)
        each = torch.arange(len(target), device=target.device)
        return one_vs_all.full_loss(
            self._comparator,
            Queries(queries, None),
            Entities(keys),
            one_vs_all.Answers(each, target, weight),
            one_vs_all.Objective(self._temperature),
        )

    def _compared(self, relations: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(queries (n, F), parameters of the relations (C, F)), whose comparison is that of
        op_r(x) with y but for what is the same for all relations.
        """
        kinds = [self._operators.kinds[r] for r in relations.tolist()]
        if self._comparator != "dot":
            return y - x, self._parameters("translations", relations, kinds)
        queries, keys = [], []
        for name in dict.fromkeys(name for kind in kinds for name in PARAMETERS[kind]):
            queries.append(_query(name, x, y))
            keys.append(self._parameters(name, relations, kinds))
        keeps = [kind in LINEAR_PART_IS_IDENTITY for kind in kinds]
        if any(keeps) and not all(keeps):
            queries.append((x * y).sum(dim=1, keepdim=True))
            keys.append(torch.tensor(keeps, dtype=x.dtype, device=x.device).unsqueeze(1))
        if len(keys) == 1:
            return queries[0], keys[0]
        return torch.cat(queries, dim=1), torch.cat(keys, dim=1)

    def _parameters(self, name: str, relations: Tensor, kinds: Sequence[str]) -> Tensor:
        """(C, D), zeros where the operator of a relation has no such parameter."""
        rows = F.embedding(relations, self._operators.get_parameter(name))
        has = [name in PARAMETERS[kind] for kind in kinds]
        if all(has):
            return rows
        return rows * torch.tensor(has, dtype=rows.dtype, device=rows.device).unsqueeze(1)


def _query(name: str, x: Tensor, y: Tensor) -> Tensor:
    """What the parameters p_r are multiplied with in ⟨op_r(x), y⟩: (n, D)."""
    if name == "translations":
        return y
    if name == "diagonals":
        return x * y
    query = _ConjugateProduct.apply(x, y)  # type: ignore[no-untyped-call]
    assert isinstance(query, Tensor)
    return query


class _Gathered(torch.autograd.Function):
    """vectors[number]; the gradients of a row are added in the order of the edges."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, number: Tensor) -> Tensor:
        ctx.number, ctx.shape = number, vectors.shape
        return vectors.index_select(0, number)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        total = above[0].new_zeros(ctx.shape)
        if total.is_cuda:  # index_add_ would add in an order that changes from run to run
            total.index_put_((ctx.number,), above[0], accumulate=True)
        else:
            total.index_add_(0, ctx.number, above[0])
        return total, None


class _ConjugateProduct(torch.autograd.Function):
    """x̄ ⊙ y over ℂ, (n, D); of its gradient g, ∂x = ḡ ⊙ y and ∂y = g ⊙ x. Autograd would take
    three times as long, a tenth of a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return _multiply(x, y, sign=-1)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return _multiply(above[0], y, sign=-1), _multiply(above[0], x, sign=1)


def _multiply(a: Tensor, b: Tensor, *, sign: int) -> Tensor:
    """a ⊙ b over ℂ; with the sign −1, ā ⊙ b."""
    product = torch.empty_like(a)
    (a_real, a_imaginary), (b_real, b_imaginary) = a.chunk(2, dim=1), b.chunk(2, dim=1)
    real, imaginary = product.chunk(2, dim=1)
    torch.mul(a_real, b_real, out=real).addcmul_(a_imaginary, b_imaginary, value=-sign)
    torch.mul(a_real, b_imaginary, out=imaginary).addcmul_(a_imaginary, b_real, value=sign)
    return product
