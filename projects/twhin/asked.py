"""What a 1-vs-all batch asks, looked up without doubles: the rows of its distinct questions, and,
for penalties and relation prediction, those of their distinct answers, beside the whole tables that
hold the candidates.

The loss is that of the batch's edges, exactly: `one_vs_all` weighs questions by their edges, the
penalties here weigh vectors by them. Only dropout is another: edges of one question share its mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projects.twhin import one_vs_all
from projects.twhin.config import LossConfig, ModelConfig, Side
from projects.twhin.data import EdgeBatch, Group
from projects.twhin.one_vs_all import Answers, Questions
from projects.twhin.operators import Operators
from projects.twhin.penalties import power_sum
from projects.twhin.relation_prediction import Pair, RelationPrediction
from projects.twhin.scoring import Entities, Scoring


@dataclass(frozen=True)
class Rows:
    """Distinct rows of a table, and how many edges have them."""

    table: str
    ids: Tensor  # (m,)
    relation: Tensor  # (m,) of one of the edges
    counts: Tensor  # (m,) float32


@dataclass(frozen=True)
class Joined:
    """The n edges one by one, in the order of the batch."""

    pair: Pair
    relation: Tensor  # (n,)
    asking: Tensor  # (n,) which of the asking rows
    answering: Tensor  # (n,) which of the answering rows
    weight: Tensor | None  # (n,)


@dataclass(frozen=True)
class Asked:
    """One side of a group that is asked for."""

    side: Side
    asking: Rows
    """The questions: a row of the asking table and a relation."""
    answering: Rows | None
    """The answers' rows; None where nothing needs them."""
    answer_table: str
    answers: Answers
    joined: Joined | None = None
    """None where the edges' relations are not predicted."""


def read_questions(
    batch: EdgeBatch,
    weights: Tensor | None,
    operators: Operators,
    prediction: RelationPrediction | None = None,
    *,
    penalised: bool,
) -> list[Asked]:
    """The questions of each group and side that is asked for. weights (R,): what an edge of a
    relation counts in the loss; None: 1.
    """
    return [
        _read_side(
            group,
            side,
            weights,
            operators,
            penalised=penalised,
            predicted=prediction is not None
            and prediction.is_asked((group.lhs_table, group.rhs_table), side, batch.sides),
        )
        for group in batch.groups
        for side in batch.sides
    ]


def _read_side(
    group: Group,
    side: Side,
    weights: Tensor | None,
    operators: Operators,
    *,
    penalised: bool,
    predicted: bool,
) -> Asked:
    asking_table, asking, answer_table, answer = (
        (group.rhs_table, group.rhs, group.lhs_table, group.lhs)
        if side == "lhs"
        else (group.lhs_table, group.lhs, group.rhs_table, group.rhs)
    )
    questions = one_vs_all.distinct(asking, group.relation)
    weight = None if weights is None else weights[group.relation]
    answering, joined = None, None
    if penalised or predicted:
        # Vectors of complex relations are other numbers than those of real ones.
        kinds = operators.is_complex(group.relation).long()
        distinct = one_vs_all.distinct(answer, kinds)
        answering = _rows(answer_table, answer, group.relation, distinct)
        if predicted:
            pair = (group.lhs_table, group.rhs_table)
            joined = Joined(pair, group.relation, questions.number, distinct.number, weight)
    return Asked(
        side,
        _rows(asking_table, asking, group.relation, questions),
        answering,
        answer_table,
        one_vs_all.sort_answers(questions, answer, weight),
        joined,
    )


def _rows(table: str, ids: Tensor, relation: Tensor, distinct: Questions) -> Rows:
    first = distinct.first
    counts = torch.bincount(distinct.number, minlength=len(first))
    return Rows(table, ids[first], relation[first], counts.float())


def ids_by_table(asked: Sequence[Asked]) -> dict[str, Tensor]:
    """Table → the ids of its rows, one behind the other, of all tables that are asked or asking."""
    found: dict[str, list[Tensor]] = {}
    for one in asked:
        found.setdefault(one.asking.table, []).append(one.asking.ids)
        own = found.setdefault(one.answer_table, [])
        if one.answering is not None:
            own.append(one.answering.ids)
    empty = asked[0].asking.ids[:0] if asked else torch.empty(0, dtype=torch.int64)
    return {table: torch.cat(parts) if parts else empty for table, parts in found.items()}


def split_rows(
    asked: Sequence[Asked], rows: dict[str, Entities]
) -> list[tuple[Entities, Entities | None]]:
    """What was looked up for `ids_by_table`, as (asking, answering) of each of `asked`."""
    wanted = [one for each in asked for one in (each.asking, each.answering) if one is not None]
    pieces = {}
    for table, found in rows.items():
        lengths = [len(one.ids) for one in wanted if one.table == table]
        vectors = found.vectors.split(lengths)
        biases = [None] * len(lengths) if found.biases is None else found.biases.split(lengths)
        pieces[table] = iter([Entities(*pair) for pair in zip(vectors, biases, strict=True)])
    return [
        (
            next(pieces[one.asking.table]),
            None if one.answering is None else next(pieces[one.answering.table]),
        )
        for one in asked
    ]


def side_loss(
    side: Side,
    asking: Entities,
    relation: Tensor,
    candidates: Entities,
    answers: Answers,
    scoring: Scoring,
    config: LossConfig,
    positive_share: float,
) -> Tensor:
    """Sum of the losses of the edges whose questions are (asking, relation), (u,) of them."""
    temperature = None if config.softmax is None else config.softmax.temperature
    # What is the same for all candidates has no part in the softmax; the rounding left of its
    # gradient would be a whole step to Adagrad.
    queries = scoring.queries(side, asking, relation, needs_extra=temperature is None)
    objective = one_vs_all.Objective(temperature, positive_share)
    return one_vs_all.full_loss(scoring.comparator, queries, candidates, answers, objective)


def side_penalty(
    asked: Asked,
    asking: Tensor,
    answering: Tensor,
    operators: Operators,
    config: ModelConfig,
) -> Tensor:
    """λ Σ |θ|^p over the edges' two entities and the relation's parameters of the direction that is
    asked: those of the inverse relation for heads, with reciprocal relations.
    """
    total = torch.zeros((), device=asking.device)
    settings = config.regularization
    assert asked.answering is not None
    relation, counts = asked.asking.relation, asked.asking.counts
    distinct, number = torch.unique_consecutive(relation, return_inverse=True)
    edges = torch.zeros(len(distinct), device=asking.device).index_add_(0, number, counts)
    if config.reciprocal and asked.side == "lhs":
        distinct = distinct + len(config.relations)
    for power, scale in ((2, settings.l2), (3, settings.n3)):
        if not scale:
            continue
        for rows, vectors in ((asked.asking, asking), (asked.answering, answering)):
            total = total + scale * _entity_powers(rows, vectors, power, operators)
        total = total + scale * operators.powers(distinct, power, edges)
    return total


def _entity_powers(rows: Rows, vectors: Tensor, power: int, operators: Operators) -> Tensor:
    flags = operators.is_complex(rows.relation)
    if power == 2 or not operators.mixes_complex:
        is_complex = "complex_diagonal" in operators.kinds
        return power_sum(vectors, rows.counts, power, is_complex=is_complex)
    complex_counts = rows.counts * flags
    return power_sum(vectors, complex_counts, power, is_complex=True) + power_sum(
        vectors, rows.counts - complex_counts, power, is_complex=False
    )
