"""Losses of both sides of translated edges together, by compiled kernels.

Of the translation with dot products and a loss that does not change with what all candidates of a
query share (softmax, margin), the right side asks with l + b, the left one with r, whose true pair
scores ⟨l, r⟩. Here l + b and both scores are made in one pass over l and r, and their gradients in
another; as two sides with autograd between them (`gradients.shared_loss`) they take ten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from projects.twhin.gradients import Dots, Negatives, Objective, derive_side, score_side
from projects.twhin.scoring import Entities, Scoring
from tml.native.kernels import load_kernels


def are_translated(
    scoring: Scoring, objective: Objective, lhs: Entities, rhs: Entities, *, both_sides: bool
) -> bool:
    """Whether `translated_loss` knows it."""
    return (
        both_sides
        and scoring.comparator == "dot"
        and not scoring.reciprocal
        and set(scoring.operators.kinds) == {"translation"}
        and not objective.needs_extra
        and lhs.biases is None
        and lhs.vectors.device.type == "cpu"
        and lhs.vectors.dtype == rhs.vectors.dtype == torch.float32
        and load_kernels() is not None
    )


def translated_loss(
    lhs: Tensor,
    rhs: Tensor,
    translations: Tensor,
    relation: Tensor,
    lhs_negatives: Sequence[Negatives],
    rhs_negatives: Sequence[Negatives],
    weight: Tensor | None,
    objective: Objective,
) -> Tensor:
    """Sum of the losses of edges, lhs and rhs (n, D), relation (n,), with either side replaced by
    its negatives; weight (n,), None: 1 → scalar.
    """
    vectors = [one.entities.vectors for one in (*lhs_negatives, *rhs_negatives)]
    given = ((lhs_negatives, rhs_negatives), relation.contiguous(), weight, objective)
    found = _Translated.apply(given, lhs, rhs, translations, *vectors)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


class _Translated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Any, lhs: Tensor, rhs: Tensor, translations: Tensor, *vectors: Tensor
    ) -> Tensor:
        (lhs_negatives, rhs_negatives), relation, weight, objective = given
        kernels = load_kernels()
        assert kernels is not None
        lhs, rhs, translations = (one.contiguous() for one in (lhs, rhs, translations))
        moved, moved_pairs, pairs = kernels.pairs(lhs, rhs, translations, relation)
        keeps = any(ctx.needs_input_grad)
        sides = []
        total = torch.zeros(())
        cut = len(lhs_negatives)
        for queries, positive, negatives, candidates in (
            (rhs, pairs, lhs_negatives, vectors[:cut]),
            (moved, moved_pairs, rhs_negatives, vectors[cut:]),
        ):
            no_biases = [None] * len(negatives)
            loss, matrices, d_positive = score_side(
                Dots(), queries, positive, negatives, candidates, no_biases, weight, objective,
                keeps=keeps,
            )  # fmt: skip
            total += loss
            sides.append((negatives, matrices, d_positive))
        if keeps:
            ctx.made = (sides, relation)
            ctx.half = torch.is_autocast_enabled("cpu")
            ctx.save_for_backward(lhs, rhs, translations, moved, *vectors)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:
        assert ctx.made is not None, "backward goes through a hand-written loss once"
        (sides, relation), ctx.made = ctx.made, None
        lhs, rhs, translations, moved, *vectors = ctx.saved_tensors
        kernels = load_kernels()
        assert kernels is not None
        made, d_vectors = [], []
        with torch.autocast("cpu", torch.bfloat16, enabled=ctx.half):
            for queries, (negatives, matrices, _) in zip((rhs, moved), sides, strict=True):
                candidates, vectors = vectors[: len(negatives)], vectors[len(negatives) :]
                no_biases = [None] * len(negatives)
                d_queries, d_candidates, _ = derive_side(
                    Dots(), queries, matrices, negatives, candidates, no_biases, above[0]
                )
                made.append(d_queries.contiguous())
                d_vectors += d_candidates
        d_rhs, d_lhs = made
        d_pairs, d_moved_pairs = (d_positive * above[0] for _, _, d_positive in sides)
        d_translations = kernels.derive_pairs(
            lhs, rhs, translations, relation, d_moved_pairs, d_pairs, d_lhs, d_rhs
        )
        return (None, d_lhs, d_rhs, d_translations, *d_vectors)
