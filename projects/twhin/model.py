"""TwHIN: embeddings of a typed graph (arXiv 2202.05387), its training loss and its trained vectors.

What scores an edge is in `scoring`; here are the looked-up vectors of a batch, the negatives of
each side with accidental hits masked, and the loss of both.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.twhin import gradients, one_vs_all, translated
from projects.twhin.anchors import Anchors
from projects.twhin.asked import (
    ids_by_table,
    read_questions,
    side_loss,
    side_penalty,
    split_rows,
)
from projects.twhin.config import BIAS, SIDES, DataConfig, LossConfig, ModelConfig, Side
from projects.twhin.data import EdgeBatch, Group
from projects.twhin.operators import Operators, modulus
from projects.twhin.relation_prediction import Ends, RelationPrediction
from projects.twhin.scoring import Entities, Queries, Scoring, chunked
from tml import losses
from tml.dense_optimizer import DenseOptimizer
from tml.distributed import Job
from tml.embeddings import Tables, TableSpec
from tml.optimizers import build_dense_optimizer, dense_state

BIAS_DIM = 4
"""FBGEMM wants multiples of 4; the first number is the bias."""
SINGULAR = {
    "translations": "translation",
    "diagonals": "diagonal",
    "matrices": "matrix",
    "complex_diagonals": "complex_diagonal",
}
"""How the optimizer's state of each parameter begins: translation_accumulator."""


def table_specs(config: ModelConfig) -> list[TableSpec]:
    """The tables of the model; those of biases come last."""
    tables = config.embeddings.tables
    vectors = [
        TableSpec(
            name=table.name,
            num_rows=table.num_embeddings,
            dim=table.embedding_dim,
            data_type=table.data_type,
            optimizer=table.optimizer,
            init_scale=config.init_scale or table.embedding_dim**-0.5,
        )
        for table in tables
    ]
    biases = [
        TableSpec(
            name=table.name + BIAS,
            num_rows=table.num_embeddings,
            dim=BIAS_DIM,
            data_type="fp32",
            optimizer=table.optimizer,
            init_scale=0.0,
        )
        for table in tables
        if config.biases
    ]
    return vectors + biases


class TwhinModel(nn.Module):
    """Tables (owned by their engine) and the parameters of the relations."""

    def __init__(
        self, config: ModelConfig, tables: Tables, *, amp: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.tables = tables
        self.operators = build_operators(config, seed)
        weights = torch.tensor([relation.weight for relation in config.relations])
        self.register_buffer("weights", weights, persistent=False)
        self._weighted = bool((weights != 1).any())
        self._config = config
        self._scoring = build_scoring(config, self.operators)
        self._prediction = build_prediction(config, self.operators)
        self._amp = amp
        self.anchors: Anchors | None = None
        """Previous vectors, after a warm start with pull or freeze."""
        self.writes_gradients = True
        """Whether losses with written-out gradients are computed by them; tests compare both."""

    @property
    def translations(self) -> nn.Parameter:
        """Relation vectors of the translation operator (R, D)."""
        return self.operators.get_parameter("translations")

    def relation_parameters(self) -> dict[str, nn.Parameter]:
        """Saved name → parameters of the relations."""
        return dict(self.operators.named_parameters())

    def forward(self, batch: EdgeBatch, data: DataConfig) -> Tensor:
        """Sum of the losses of this process's edges → scalar. `data` gives the numbers of negatives
        and the chunk size. With gradients on, it holds the penalties, and vectors are dropped out
        of with torch's generator.
        """
        device = self.get_buffer("weights").device
        batch = batch.to(device)
        if self._asks_without_doubles(data):
            return self._forward_asked(batch, data)
        looked_up = self._look_up(batch)
        rows = self._dropped_out(looked_up)
        # Every table takes part in the backward pass of every process, also where its batch has no
        # edge of it: the engine's collectives wait for all. The sum of no rows costs nothing.
        total: Tensor = sum(
            (parameter.sum() * 0.0 for parameter in self.operators.parameters()),
            torch.zeros((), device=device),
        )
        total = total + sum(part.sum() for part in rows.values() if not len(part))
        sections = self._sections(batch, rows, as_looked_up=self._changes_no_rows())
        share = self._common_share(data)
        whole = self._whole(batch) if data.all_negatives else {}
        for group in batch.groups:
            found = [self._entities(sections, table) for table, _ in group.lookups()]
            everyone = None
            if data.all_negatives:
                everyone = (whole[group.lhs_table], whole[group.rhs_table])
            with torch.autocast(device.type, torch.bfloat16, enabled=self._amp):
                vectors = EdgeVectors(*found)
                total = total + self._loss(group, vectors, everyone, data, batch.sides, share)
                if self._prediction is not None:
                    total = total + share * self._predict(
                        self._prediction, group, vectors, batch.sides
                    )
            if torch.is_grad_enabled():
                lhs, rhs = vectors.lhs.vectors, vectors.rhs.vectors
                total = total + share * self._penalty(group, lhs, rhs, batch.sides)
        if self.anchors is not None and self.anchors.pull and torch.is_grad_enabled():
            total = total + share * self._pull(self.anchors, batch, looked_up)
        return total

    def _common_share(self, data: DataConfig) -> float:
        """What counts of that which an edge's sides have in common: half in a pass that asks for
        one of them, so that two passes make one epoch of both.
        """
        is_half = data.grouped and data.asks == "both" and not self._config.reciprocal
        return 0.5 if is_half else 1.0

    def _asks_without_doubles(self, data: DataConfig) -> bool:
        """Whether `_forward_asked` knows it."""
        return (
            data.all_negatives
            and self.writes_gradients
            and self.anchors is None
            and self._config.scores_questions_once(data.asks)
        )

    def _forward_asked(self, batch: EdgeBatch, data: DataConfig) -> Tensor:
        """`forward` with all rows as candidates: distinct questions are looked up and scored."""
        config = self._config
        settings = config.regularization
        penalised = torch.is_grad_enabled() and bool(settings.l2 or settings.n3)
        weights = self.get_buffer("weights")
        asked = read_questions(
            batch,
            weights if self._weighted else None,
            self.operators,
            self._prediction,
            penalised=penalised,
        )
        whole, rows = {}, {}
        answering_tables = {one.answer_table for one in asked}
        for name, ids in ids_by_table(asked).items():
            if name in answering_tables:
                whole[name], rows[name] = self._whole_and_rows(name, ids)
            else:  # a table that only asks may have millions of rows that have no gradient
                rows[name] = self._rows(name, ids)
        share = self._common_share(data)
        total = sum(
            (parameter.sum() * 0.0 for parameter in self.operators.parameters()),
            torch.zeros((), device=weights.device),
        )
        for one, (asking, answering) in zip(asked, split_rows(asked, rows), strict=True):
            counts_positive = config.reciprocal or one.side == batch.sides[-1]
            with torch.autocast(weights.device.type, torch.bfloat16, enabled=self._amp):
                total = total + side_loss(
                    one.side,
                    asking,
                    one.asking.relation,
                    whole[one.answer_table],
                    one.answers,
                    self._scoring,
                    config.loss,
                    share if counts_positive else 0.0,
                )
                if self._prediction is not None and (joined := one.joined) is not None:
                    assert answering is not None
                    total = total + share * self._prediction.loss(
                        joined.pair,
                        one.side,
                        joined.relation,
                        Ends(asking.vectors, joined.asking),
                        Ends(answering.vectors, joined.answering),
                        joined.weight,
                    )
            if penalised and answering is not None:
                of_side = 1.0 if config.reciprocal else share / len(batch.sides)
                total = total + of_side * side_penalty(
                    one, asking.vectors, answering.vectors, self.operators, config
                )
        return total

    def _whole_and_rows(self, table: str, ids: Tensor) -> tuple[Entities, Entities]:
        """All entities of a table, and those at ids (n,)."""
        both = self.tables.whole_and_rows(table, ids)
        biases: tuple[Tensor | None, ...] = (None, None)
        if self._config.biases:
            biases = tuple(one[:, 0] for one in self.tables.whole_and_rows(table + BIAS, ids))
        whole, rows = (
            Entities(self._drop_out(table, vectors), own)
            for vectors, own in zip(both, biases, strict=True)
        )
        return whole, rows

    def _rows(self, table: str, ids: Tensor) -> Entities:
        """The entities of a table at ids (n,)."""
        vectors = self._drop_out(table, self.tables.rows(table, ids))
        has_biases = self._config.biases
        return Entities(vectors, self.tables.rows(table + BIAS, ids)[:, 0] if has_biases else None)

    def _loss(
        self,
        group: Group,
        vectors: "EdgeVectors",
        everyone: tuple[Entities, Entities] | None,
        data: DataConfig,
        sides: tuple[Side, ...],
        share: float,
    ) -> Tensor:
        """Sum over the edges of a group; by written-out gradients where there are some."""
        weight = self.get_buffer("weights")[group.relation] if self._weighted else None
        config, scoring = self._config.loss, self._scoring
        if everyone is not None:
            if self.writes_gradients and self._config.scores_questions_once(data.asks):
                return one_vs_all_loss(
                    group, vectors, everyone, scoring, config, weight, sides, share
                )
            scores = score_with_all(group, vectors.lhs, vectors.rhs, everyone, scoring, sides)
        elif self.writes_gradients and has_written_gradients(config, scoring, data):
            return written_loss(group, vectors, scoring, data, config, weight, sides)
        else:
            scores = score_group(group, vectors, scoring, data, sides)
        return group_loss(scores, config, weight, share)

    def _predict(
        self,
        prediction: RelationPrediction,
        group: Group,
        vectors: "EdgeVectors",
        sides: tuple[Side, ...],
    ) -> Tensor:
        """The loss of the relations of a group's edges, their entities being given."""
        weight = self.get_buffer("weights")[group.relation] if self._weighted else None
        pair = (group.lhs_table, group.rhs_table)
        ends = {"lhs": Ends(vectors.lhs.vectors), "rhs": Ends(vectors.rhs.vectors)}
        total = torch.zeros((), device=group.relation.device)
        for side in sides:
            if prediction.is_asked(pair, side, sides):
                asking, answering = ends["rhs" if side == "lhs" else "lhs"], ends[side]
                written = self.writes_gradients
                total = total + prediction.loss(
                    pair, side, group.relation, asking, answering, weight, written=written
                )
        return total

    def _look_up(self, batch: EdgeBatch) -> dict[str, Tensor]:
        """Table → rows of all lookups of the batch."""
        device = self.get_buffer("weights").device
        names = [table.name for table in self._config.embeddings.tables]
        ids = {name: found.to(device) for name, found in batch.ids(names).items()}
        if self._config.biases:
            ids |= {name + BIAS: found for name, found in ids.items()}
        found: dict[str, Tensor] = self.tables(ids)
        if self.anchors is not None:
            found = {name: self.anchors.hold(name, ids[name], rows) for name, rows in found.items()}
        return found

    def _whole(self, batch: EdgeBatch) -> dict[str, Entities]:
        """Table → all its entities, for the tables that the batch touches."""
        names = dict.fromkeys(
            name for group in batch.groups for name in (group.lhs_table, group.rhs_table)
        )
        found = {}
        for name in names:
            vectors = self._drop_out(name, self._held_whole(name))
            biases = self._held_whole(name + BIAS)[:, 0] if self._config.biases else None
            found[name] = Entities(vectors, biases)
        return found

    def _held_whole(self, table: str) -> Tensor:
        rows = self.tables.whole(table)
        return rows if self.anchors is None else self.anchors.hold(table, None, rows)

    def _dropped_out(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._drop_out(name, found) for name, found in rows.items()}

    def _drop_out(self, table: str, rows: Tensor) -> Tensor:
        share = self._config.embedding_dropout
        if not share or not torch.is_grad_enabled() or table.endswith(BIAS):
            return rows
        return F.dropout(rows, share)

    def _changes_no_rows(self) -> bool:
        """Whether rows are scored as they are looked up."""
        drops_out = self._config.embedding_dropout and torch.is_grad_enabled()
        return self.anchors is None and not drops_out

    def _sections(
        self, batch: EdgeBatch, rows: dict[str, Tensor], *, as_looked_up: bool = False
    ) -> dict[str, Iterator[Tensor]]:
        """Table → its rows cut into the lookups of the batch, in their order."""
        lengths: dict[str, list[int]] = {}
        for group in batch.groups:
            for table, ids in group.lookups():
                lengths.setdefault(table, []).append(len(ids))
        if self._config.biases:
            lengths |= {table + BIAS: found for table, found in lengths.items()}
        if as_looked_up:
            cut = self.tables.cut
            return {table: iter(cut(table, rows[table], n)) for table, n in lengths.items()}
        return {table: iter(rows[table].split(found)) for table, found in lengths.items()}

    def _entities(self, sections: Mapping[str, Iterator[Tensor]], table: str) -> Entities:
        """The next lookup of `table`."""
        vectors = next(sections[table])
        return Entities(
            vectors, next(sections[table + BIAS])[:, 0] if self._config.biases else None
        )

    def _penalty(self, group: Group, lhs: Tensor, rhs: Tensor, sides: tuple[Side, ...]) -> Tensor:
        """λ Σ |θ|^p over the vectors and relation parameters of the edges of a group, with
        reciprocal relations once for each side that is asked for.
        """
        total = torch.zeros((), device=lhs.device)
        settings = self._config.regularization
        for power, scale in ((2, settings.l2), (3, settings.n3)):
            if not scale:
                continue
            directions = [int(side == "lhs") for side in sides] if self._config.reciprocal else [0]
            total = total + scale * len(directions) * (
                self._entity_powers(group, lhs, power) + self._entity_powers(group, rhs, power)
            )
            for direction in directions:
                relation = group.relation + direction * len(self._config.relations)
                total = total + scale * self.operators.powers(relation, power)
        return total

    def _pull(self, anchors: Anchors, batch: EdgeBatch, rows: dict[str, Tensor]) -> Tensor:
        """λ ‖θ − θ_previous‖² of the entities of each edge, before dropout; with reciprocal
        relations once for each side that is asked for.
        """
        times = anchors.pull * (len(batch.sides) if self._config.reciprocal else 1)
        sections = self._sections(batch, rows)
        total = torch.zeros((), device=self.get_buffer("weights").device)
        for group in batch.groups:
            found = [self._entities(sections, table).vectors for table, _ in group.lookups()]
            for (table, ids), vectors in zip(group.lookups()[:2], found[:2], strict=True):
                total = total + times * anchors.distance(table, ids, vectors)
        return total

    def _entity_powers(self, group: Group, vectors: Tensor, power: int) -> Tensor:
        """Σ |θ|^power; of the edges of complex relations by the modulus."""
        if power == 2:
            return vectors.square().sum()
        is_complex = [kind == "complex_diagonal" for kind in self.operators.kinds]
        if all(is_complex):
            return modulus(vectors).pow(3).sum()
        total = vectors.abs().pow(3).sum(dim=1)
        if any(is_complex):
            chosen = torch.tensor(is_complex, device=vectors.device)[group.relation]
            total = torch.where(chosen, modulus(vectors).pow(3).sum(dim=1), total)
        return total.sum()


def build_operators(config: ModelConfig, seed: int = 0) -> Operators:
    """The operators of the relations, those of the inverse relations behind them."""
    kinds = [relation.operator for relation in config.relations]
    dim = config.embeddings.tables[0].embedding_dim
    directions = 2 if config.reciprocal else 1
    return Operators(kinds * directions, dim, config.relation_init_scale, seed)


def build_relation_optimizer(
    config: ModelConfig, model: TwhinModel
) -> tuple[DenseOptimizer, dict[str, Tensor]]:
    """What updates the relations' parameters, and its state by saved names."""
    parameters = model.relation_parameters()
    optimizer = build_dense_optimizer(config.translation_optimizer, parameters.values())
    by_singular = {SINGULAR[name]: parameter for name, parameter in parameters.items()}
    return optimizer, dense_state(optimizer, by_singular)


def seed_dropout(seed: int, step: int, job: Job) -> None:
    """Let the dropout of an update depend on (seed, step, rank) alone, so that a run that is taken
    up again drops what the unbroken one does.
    """
    key = np.random.SeedSequence([seed, step, job.rank])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def build_scoring(config: ModelConfig, operators: Operators) -> Scoring:
    """What scores the edges."""
    return Scoring(config.relations, operators, config.comparator, reciprocal=config.reciprocal)


def build_prediction(config: ModelConfig, operators: Operators) -> RelationPrediction | None:
    """What predicts the edges' relations; None where nothing asks for it."""
    softmax = config.loss.softmax
    if softmax is None or not softmax.relation_weight:
        return None
    return RelationPrediction(
        config.relations,
        operators,
        config.comparator,
        weight=softmax.relation_weight,
        temperature=softmax.temperature,
        reciprocal=config.reciprocal,
    )


@dataclass(frozen=True)
class EdgeVectors:
    """The looked-up entities of a group, in the order of Group.lookups."""

    lhs: Entities  # (n, D)
    rhs: Entities  # (n, D)
    lhs_negatives: Entities  # (chunks · K, D)
    rhs_negatives: Entities  # (chunks · K, D)


@dataclass(frozen=True)
class SideScores:
    """Scores of the n edges of a group and of their corruptions on one side."""

    positive: Tensor  # (n,)
    negative: Tensor  # (n, K)
    masked: Tensor | None  # (n, K) bool: not to be counted; None with `target`
    log_counts: Tensor | None = None  # (n, K): log of how often the negative is expected
    target: Tensor | None = None  # (n,): `negative` holds all candidates, the true one here

    def mask(self) -> Tensor:
        """(n, K) bool: not to be counted."""
        if self.masked is not None:
            return self.masked
        assert self.target is not None
        mask = torch.zeros_like(self.negative, dtype=torch.bool)
        return mask.scatter_(1, self.target.unsqueeze(1), value=True)


@dataclass(frozen=True)
class GroupScores:
    """The sides of a group that are asked for. With reciprocal relations their positives differ."""

    sides: tuple[SideScores, ...]
    one_positive: bool


def score_group(
    group: Group,
    vectors: EdgeVectors,
    scoring: Scoring,
    data: DataConfig,
    sides: tuple[Side, ...] = SIDES,
) -> GroupScores:
    """Score the edges of a group, and those with either side replaced by its negatives."""
    positive = None
    masked = None
    if size := data.in_batch_negatives:
        masked = in_batch_mask(group, size + 1)
    scored = []
    for side in reversed(sides):  # an edge's one score is that of its tail
        asking, true, drawn = (
            (vectors.rhs, vectors.lhs, vectors.lhs_negatives)
            if side == "lhs"
            else (vectors.lhs, vectors.rhs, vectors.rhs_negatives)
        )
        queries = scoring.queries(side, asking, group.relation)
        if positive is None or scoring.reciprocal:
            positive = scoring.pairs(queries, true)
        negatives = _side(group, side, queries, true, drawn, masked, scoring, data)
        scored.append(SideScores(positive, *negatives))
    return GroupScores(tuple(reversed(scored)), not scoring.reciprocal)


def _side(
    group: Group,
    side: str,
    queries: Queries,
    true: Entities,
    negatives: Entities,
    in_batch: Tensor | None,
    scoring: Scoring,
    data: DataConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores (n, K) of the queries with the negatives of their chunk, global ones and those of the
    batch, the mask (n, K), and the log of the expected counts where they are known.
    """
    true_ids, ids, log_counts = (
        (group.lhs, group.lhs_negatives, group.lhs_log_counts)
        if side == "lhs"
        else (group.rhs, group.rhs_negatives, group.rhs_log_counts)
    )
    n = len(true_ids)
    shared, same, log_counts = _shared(true_ids, negatives, ids, log_counts, data.chunk_size)
    scores = [scoring.with_shared(queries, shared, data.chunk_size)]
    masks = [same]
    if in_batch is not None:
        size = data.in_batch_negatives + 1
        scores.append(scoring.with_shared(queries, true.chunks(size), size))
        mask = in_batch.transpose(1, 2) if side == "lhs" else in_batch
        masks.append(mask.flatten(0, 1)[:n])
    if len(scores) == 1:
        return scores[0], masks[0], log_counts
    return torch.cat(scores, dim=1), torch.cat(masks, dim=1), log_counts


def score_with_all(
    group: Group,
    lhs: Entities,
    rhs: Entities,
    everyone: tuple[Entities, Entities],
    scoring: Scoring,
    sides: tuple[Side, ...] = SIDES,
) -> GroupScores:
    """Score the edges of a group with either side replaced by all rows of its table. everyone: all
    entities of the left and of the right table.
    """
    scored = []
    for side in sides:
        asking, true_ids, candidates = (
            (rhs, group.lhs, everyone[0]) if side == "lhs" else (lhs, group.rhs, everyone[1])
        )
        queries = scoring.queries(side, asking, group.relation)
        scores = scoring.with_all(queries, candidates)
        positive = scores.gather(1, true_ids.unsqueeze(1)).squeeze(1)
        scored.append(SideScores(positive, scores, None, target=true_ids))
    return GroupScores(tuple(scored), not scoring.reciprocal)


def one_vs_all_loss(
    group: Group,
    vectors: EdgeVectors,
    everyone: tuple[Entities, Entities],
    scoring: Scoring,
    config: LossConfig,
    weight: Tensor | None,
    sides: tuple[Side, ...],
    share: float,
) -> Tensor:
    """What score_with_all and group_loss make together, by `one_vs_all`. Where vectors are dropped
    out of, edges of one question have one mask.
    """
    total = torch.zeros((), device=vectors.lhs.vectors.device)
    for side in sides:
        asking, asking_ids, answer_ids, candidates = (
            (vectors.rhs, group.rhs, group.lhs, everyone[0])
            if side == "lhs"
            else (vectors.lhs, group.lhs, group.rhs, everyone[1])
        )
        questions = one_vs_all.distinct(asking_ids, group.relation)
        first = questions.first
        relation = group.relation[first]
        answers = one_vs_all.sort_answers(questions, answer_ids, weight)
        own_share = share if scoring.reciprocal or side == sides[-1] else 0.0
        total = total + side_loss(
            side, asking.rows(first), relation, candidates, answers, scoring, config, own_share
        )
    return total


def has_written_gradients(config: LossConfig, scoring: Scoring, data: DataConfig) -> bool:
    """Whether `written_loss` knows it: all but the logistic loss by the mean, and candidates that
    go through operators.
    """
    is_mean = config.logistic is not None and config.logistic.negatives == "mean"
    return (
        not is_mean
        and (scoring.reciprocal or scoring.heads_by_product)
        and bool(data.global_negatives or data.in_batch_negatives)
    )


def written_loss(
    group: Group,
    vectors: EdgeVectors,
    scoring: Scoring,
    data: DataConfig,
    config: LossConfig,
    weight: Tensor | None,
    sides: tuple[Side, ...],
) -> Tensor:
    """What score_group and group_loss make together, by `gradients`."""
    objective = gradients.Objective(
        None if config.softmax is None else config.softmax.temperature,
        None if config.margin_ranking is None else config.margin_ranking.margin,
    )
    in_batch = None
    if size := data.in_batch_negatives:
        in_batch = in_batch_mask(group, size + 1)
    lhs, rhs = vectors.lhs, vectors.rhs
    negatives = {side: _negatives(group, side, vectors, in_batch, data) for side in sides}
    if translated.are_translated(scoring, objective, lhs, rhs, both_sides=len(sides) == 2):
        return translated.translated_loss(
            lhs.vectors,
            rhs.vectors,
            scoring.operators.get_parameter("translations"),
            group.relation,
            negatives["lhs"],
            negatives["rhs"],
            weight,
            objective,
        )
    total = torch.zeros((), device=lhs.vectors.device)
    for side in sides:
        asking, true = (rhs, lhs) if side == "lhs" else (lhs, rhs)
        queries = scoring.queries(side, asking, group.relation, needs_extra=objective.needs_extra)
        counts = scoring.reciprocal or side == sides[-1]
        total = total + gradients.shared_loss(
            scoring.comparator,
            queries,
            true,
            negatives[side],
            weight,
            dataclasses.replace(objective, counts_positive=counts),
        )
    return total


def _negatives(
    group: Group,
    side: Side,
    vectors: EdgeVectors,
    in_batch: Tensor | None,
    data: DataConfig,
) -> list[gradients.Negatives]:
    """All negatives of a side; in_batch: see in_batch_mask."""
    found = []
    if data.global_negatives:
        found.append(_drawn(group, side, vectors, data.chunk_size))
    if in_batch is not None:
        size = data.in_batch_negatives + 1
        true = vectors.lhs if side == "lhs" else vectors.rhs
        mask = in_batch.transpose(1, 2) if side == "lhs" else in_batch
        hidden = mask.flatten(0, 1)[: len(group.lhs)]
        found.append(gradients.Negatives(true.chunks(size), size, hidden))
    return found


def _drawn(group: Group, side: Side, vectors: EdgeVectors, chunk_size: int) -> gradients.Negatives:
    """The drawn negatives of a side."""
    true_ids, ids, log_counts, drawn = (
        (group.lhs, group.lhs_negatives, group.lhs_log_counts, vectors.lhs_negatives)
        if side == "lhs"
        else (group.rhs, group.rhs_negatives, group.rhs_log_counts, vectors.rhs_negatives)
    )
    by_chunk = Entities(
        drawn.vectors.view(*ids.shape, -1),
        None if drawn.biases is None else drawn.biases.view(ids.shape),
    )
    hidden = gradients.accidental_hits(true_ids, ids, chunk_size)
    return gradients.Negatives(by_chunk, chunk_size, hidden, log_counts)


def _shared(
    true_ids: Tensor,
    negatives: Entities,
    ids: Tensor,
    log_counts: Tensor | None,
    chunk_size: int,
) -> tuple[Entities, Tensor, Tensor | None]:
    """The drawn negatives by chunk (chunks, K, D), the mask of accidental hits (n, K), and the logs
    of the expected counts (n, K).
    """
    n = len(true_ids)
    vectors = negatives.vectors.view(*ids.shape, negatives.vectors.shape[1])
    biases = None if negatives.biases is None else negatives.biases.view(ids.shape)
    same = chunked(true_ids, chunk_size).unsqueeze(2) == ids.unsqueeze(1)
    if log_counts is not None:
        log_counts = log_counts.repeat_interleave(min(chunk_size, n), dim=0)[:n]
    return Entities(vectors, biases), same.flatten(0, 1)[:n], log_counts


def in_batch_mask(group: Group, chunk_size: int) -> Tensor:
    """(chunks, C, C): [i, j] is true where the tail of edge j is no negative for the head of edge
    i.

    That is where their relations differ, or where the chunk holds the edge (head of i, relation,
    tail of j), itself included. Transposed it is the mask of heads: [i, j] true where the head of j
    is no negative for the tail of i.
    """
    relation, lhs, rhs = (
        chunked(ids, chunk_size, padding=-1) for ids in (group.relation, group.lhs, group.rhs)
    )
    same_relation = _equal(relation)
    same_lhs, same_rhs = same_relation & _equal(lhs), same_relation & _equal(rhs)
    # Some edge k has the head of i and the tail of j: a product of 0/1 matrices, counts stay exact
    # in float32.
    known = torch.bmm(same_lhs.float(), same_rhs.float()) > 0
    return ~same_relation | known


def _equal(ids: Tensor) -> Tensor:
    """(chunks, C) → (chunks, C, C): whether edges i and j have the same id."""
    return ids.unsqueeze(2) == ids.unsqueeze(1)


def group_loss(
    scores: GroupScores, config: LossConfig, weight: Tensor | None = None, share: float = 1.0
) -> Tensor:
    """Sum over the edges of a group, each counted `weight` (n,). Softmax and margin: one term a
    side. Logistic: one positive term, counted `share`, and the negatives of both sides; with
    reciprocal relations, whose sides are two examples, a positive term each.
    """
    sides = scores.sides
    if (softmax := config.softmax) is not None:
        return sum(
            (_softmax_loss(side, softmax.temperature, weight) for side in sides),
            torch.zeros((), device=sides[0].positive.device),
        )
    if (ranking := config.margin_ranking) is not None:
        return sum(
            (
                losses.margin_ranking(
                    side.positive, side.negative, side.mask(), ranking.margin, weight
                )
                for side in sides
            ),
            torch.zeros((), device=sides[0].positive.device),
        )
    assert config.logistic is not None
    kind = config.logistic.negatives
    if scores.one_positive:
        negative = torch.cat([side.negative for side in sides], dim=1)
        masked = torch.cat([side.mask() for side in sides], dim=1)
        loss = losses.logistic(sides[-1].positive, negative, masked, weight, kind)
        if share == 1:
            return loss
        attracted = F.softplus(-sides[-1].positive)
        return loss - (1 - share) * (attracted if weight is None else attracted * weight).sum()
    return sum(
        (
            losses.logistic(side.positive, side.negative, side.mask(), weight, kind)
            for side in sides
        ),
        torch.zeros((), device=sides[0].positive.device),
    )


def _softmax_loss(side: SideScores, temperature: float, weight: Tensor | None) -> Tensor:
    if side.target is not None:
        return losses.full_softmax(side.negative, side.target, temperature, weight)
    return losses.sampled_softmax(
        side.positive, side.negative, side.mask(), temperature, weight, side.log_counts
    )


class Vectors:
    """The trained vectors, whole and in memory: what is evaluated and exported.

    tables: name → (rows, D) float32; biases: name → (rows,) float32, where the model has them;
    operators: those of the relations in the order of their numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        tables: Mapping[str, Tensor],
        operators: Operators,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tables = dict(tables)
        self.biases = dict(biases or {})
        self.operators = operators
        self.relations = config.relations
        self._scoring = build_scoring(config, operators)

    @classmethod
    def from_saved(cls, config: ModelConfig, saved: Mapping[str, Tensor]) -> Self:
        """From the tensors of a step folder, by the names of `saved_names`."""
        operators = build_operators(config)
        with torch.no_grad():
            for name, parameter in operators.named_parameters():
                parameter.copy_(saved[name])
        names = [table.name for table in config.embeddings.tables]
        tables = {name: saved[weight_name(name)].float() for name in names}
        biases = {}
        if config.biases:
            biases = {name: saved[weight_name(name + BIAS)][:, 0].float() for name in names}
        return cls(config, tables, operators, biases)

    @torch.no_grad()
    def score(
        self, relation: int, side: str, entities: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """Scores of the candidates of one side, ids (c,), all where None: "rhs" ranks tails of the
        heads `entities` (n,), "lhs" heads of the tails → (n, c) float32.
        """
        known = self.relations[relation]
        asking, asked = (known.rhs, known.lhs) if side == "lhs" else (known.lhs, known.rhs)
        numbers = torch.full_like(entities, relation)
        queries = self._scoring.queries(side, self._entities(asking, entities), numbers)
        return self._scoring.with_all(queries, self._entities(asked, candidates))

    def num_candidates(self, relation: int, side: str) -> int:
        """Rows of the table that a side of a relation is in."""
        known = self.relations[relation]
        return len(self.tables[known.lhs if side == "lhs" else known.rhs])

    def _entities(self, table: str, ids: Tensor | None = None) -> Entities:
        vectors, biases = self.tables[table], self.biases.get(table)
        if ids is None:
            return Entities(vectors, biases)
        return Entities(vectors[ids], None if biases is None else biases[ids])


def weight_name(table: str) -> str:
    """The saved name of a table's rows."""
    return f"tables.{table}.weight"


def saved_names(config: ModelConfig) -> list[str]:
    """The saved names of all that `Vectors` are made of."""
    operators = [name for name, _ in build_operators(config).named_parameters()]
    return [weight_name(spec.name) for spec in table_specs(config)] + operators
