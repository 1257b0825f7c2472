"""TwHIN: translated embeddings of a typed graph (arXiv 2202.05387), its training loss and its
scores.

Score of an edge: f(s, r, t) = (θ_s + θ_r)·θ_t. Corrupted tails are scored (θ_s + θ_r)·θ_t′,
corrupted heads (θ_s′ + θ_r)·θ_t = θ_s′·θ_t + θ_r·θ_t: in both, a row of queries times candidates
plus a number a row, so the edges of a chunk and its shared negatives make one matrix product
(PyTorch-BigGraph, arXiv 1903.12287, section 4.3).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.twhin.config import DataConfig, LossConfig, ModelConfig, RelationConfig
from projects.twhin.data import EdgeBatch, Group
from tml import losses
from tml.embeddings import Tables, TableSpec


def table_specs(config: ModelConfig) -> list[TableSpec]:
    """The tables of the model."""
    return [
        TableSpec(
            name=table.name,
            num_rows=table.num_embeddings,
            dim=table.embedding_dim,
            data_type=table.data_type,
            optimizer=table.optimizer,
            init_scale=config.init_scale or table.embedding_dim**-0.5,
        )
        for table in config.embeddings.tables
    ]


class TwhinModel(nn.Module):
    """Tables (owned by their engine) and relation vectors θ_r (R, D), which start at 0 and
    learn.
    """

    def __init__(self, config: ModelConfig, tables: Tables, *, amp: bool = False) -> None:
        super().__init__()
        self.tables = tables
        self.translations = nn.Parameter(
            torch.zeros(len(config.relations), config.embeddings.tables[0].embedding_dim)
        )
        translated = [relation.operator == "translation" for relation in config.relations]
        self.register_buffer("translated", torch.tensor(translated), persistent=False)
        self._loss = config.loss
        self._amp = amp

    def forward(self, batch: EdgeBatch, data: DataConfig) -> Tensor:
        """Sum of the losses of this process's edges → scalar. `data` gives the numbers of negatives
        and the chunk size.
        """
        device = self.translations.device
        batch = batch.to(device)
        ids = batch.ids([spec.name for spec in self.tables.specs])
        rows = self.tables({name: found.to(device) for name, found in ids.items()})
        # Every table takes part in the backward pass of every process, also where its batch has no
        # edge of it: the engine's collectives wait for all. The sum of no rows costs nothing.
        total: Tensor = self.translations.sum() * 0.0
        total = total + sum(part.sum() for part in rows.values() if not len(part))
        sections = self._sections(batch, rows)
        for group in batch.groups:
            vectors = EdgeVectors(*(next(sections[table]) for table, _ in group.lookups()))
            with torch.autocast(device.type, torch.bfloat16, enabled=self._amp):
                scores = score_group(group, vectors, self._relation_vectors(group), data)
            total = total + group_loss(scores, self._loss)
        return total

    def _relation_vectors(self, group: Group) -> Tensor:
        """θ_r of each edge (n, D), zero for the relations without translation."""
        # Not translations[relation]: the backward pass of indexing adds in an order that changes
        # from run to run.
        vectors = F.embedding(group.relation, self.translations)
        keep = self.get_buffer("translated")[group.relation]
        return vectors * keep.unsqueeze(1)

    def _sections(self, batch: EdgeBatch, rows: dict[str, Tensor]) -> dict[str, Iterator[Tensor]]:
        """Table → its rows cut into the lookups of the batch, in their order. One split: its
        backward is one copy.
        """
        lengths: dict[str, list[int]] = {table: [] for table in rows}
        for group in batch.groups:
            for table, ids in group.lookups():
                lengths[table].append(len(ids))
        return {table: iter(rows[table].split(lengths[table])) for table in rows if lengths[table]}


@dataclass(frozen=True)
class EdgeVectors:
    """The looked-up vectors of a group, in the order of Group.lookups."""

    lhs: Tensor  # (n, D)
    rhs: Tensor  # (n, D)
    lhs_negatives: Tensor  # (chunks · K, D)
    rhs_negatives: Tensor  # (chunks · K, D)


@dataclass(frozen=True)
class SideScores:
    """Scores of the corruptions of one side of the edges of a group."""

    negative: Tensor  # (n, K)
    masked: Tensor  # (n, K) bool: not to be counted


@dataclass(frozen=True)
class GroupScores:
    """Scores of the n edges of a group and of their corruptions."""

    positive: Tensor  # (n,)
    lhs: SideScores
    rhs: SideScores


def score_group(
    group: Group, vectors: EdgeVectors, relation: Tensor, data: DataConfig
) -> GroupScores:
    """Score the edges of a group and their negatives. relation: θ_r of each edge (n, D)."""
    translated = vectors.lhs + relation  # (n, D)
    positive = (translated * vectors.rhs).sum(dim=1)
    # A corrupted head keeps the translation: (θ_s′ + θ_r)·θ_t = θ_s′·θ_t + θ_r·θ_t.
    bias = (relation * vectors.rhs).sum(dim=1, keepdim=True)
    lhs = [
        _global_scores(
            vectors.rhs, vectors.lhs_negatives, group.lhs, group.lhs_negatives, data.chunk_size
        )
    ]
    rhs = [
        _global_scores(
            translated, vectors.rhs_negatives, group.rhs, group.rhs_negatives, data.chunk_size
        )
    ]
    if size := data.in_batch_negatives:
        masked = in_batch_mask(group, size + 1)
        lhs.append(_in_batch_scores(vectors.rhs, vectors.lhs, masked.transpose(1, 2), size + 1))
        rhs.append(_in_batch_scores(translated, vectors.rhs, masked, size + 1))
    head, tail = _beside(lhs), _beside(rhs)
    return GroupScores(
        positive.float(),
        SideScores(head.negative + bias.float(), head.masked),
        tail,
    )


def _beside(parts: list[SideScores]) -> SideScores:
    return SideScores(
        torch.cat([part.negative for part in parts], dim=1),
        torch.cat([part.masked for part in parts], dim=1),
    )


def _global_scores(
    queries: Tensor, candidates: Tensor, true_ids: Tensor, candidate_ids: Tensor, chunk_size: int
) -> SideScores:
    """Queries (n, D) of a chunk against the chunk's K shared candidates (chunks·K, D); the true
    entity is masked.
    """
    num_chunks, num_candidates = candidate_ids.shape
    shared = candidates.view(num_chunks, num_candidates, candidates.shape[1])
    scores = torch.bmm(_chunked(queries, chunk_size), shared.transpose(1, 2))
    same = _chunked(true_ids, chunk_size).unsqueeze(2) == candidate_ids.unsqueeze(1)
    n = len(queries)
    return SideScores(scores.flatten(0, 1)[:n].float(), same.flatten(0, 1)[:n])


def _in_batch_scores(
    queries: Tensor, candidates: Tensor, masked: Tensor, chunk_size: int
) -> SideScores:
    """Queries (n, D) against the corrupted side (n, D) of the other edges of their chunk; masked
    (chunks, C, C).
    """
    scores = torch.bmm(
        _chunked(queries, chunk_size), _chunked(candidates, chunk_size).transpose(1, 2)
    )
    n = len(queries)
    return SideScores(scores.flatten(0, 1)[:n].float(), masked.flatten(0, 1)[:n])


def in_batch_mask(group: Group, chunk_size: int) -> Tensor:
    """(chunks, C, C): [i, j] is true where the tail of edge j is no negative for the head of edge
    i.

    That is where their relations differ, or where the chunk holds the edge (head of i, relation,
    tail of j), itself included. Transposed it is the mask of heads: [i, j] true where the head of j
    is no negative for the tail of i.
    """
    relation, lhs, rhs = (
        _chunked(ids, chunk_size, padding=-1) for ids in (group.relation, group.lhs, group.rhs)
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


def _chunked(values: Tensor, size: int, padding: int = 0) -> Tensor:
    """(n, …) → (⌈n / size⌉, size, …), the last chunk padded."""
    size = min(size, len(values))  # a group of few edges is one chunk of so many
    missing = -len(values) % size
    if missing:
        values = F.pad(values, (0, 0) * (values.dim() - 1) + (0, missing), value=padding)
    return values.view(-1, size, *values.shape[1:])


def group_loss(scores: GroupScores, config: LossConfig) -> Tensor:
    """Sum over the edges of a group. Logistic: one positive term and the negatives of both sides.
    Softmax: one term a side.
    """
    if config.softmax is not None:
        temperature = config.softmax.temperature
        return losses.sampled_softmax(
            scores.positive, scores.lhs.negative, scores.lhs.masked, temperature
        ) + losses.sampled_softmax(
            scores.positive, scores.rhs.negative, scores.rhs.masked, temperature
        )
    both = _beside([scores.lhs, scores.rhs])
    return losses.logistic(scores.positive, both.negative, both.masked)


class Vectors:
    """The trained vectors, whole and in memory: what is evaluated and exported.

    tables: name → (rows, D) float32; translations: (R, D); relations in the order of their numbers.
    """

    def __init__(
        self, tables: dict[str, Tensor], translations: Tensor, relations: list[RelationConfig]
    ) -> None:
        self.tables = tables
        self.translations = translations
        self.relations = relations

    def score(self, relation: int, side: str, entities: Tensor) -> Tensor:
        """Scores of all candidates of one side: "rhs" ranks tails of the heads `entities` (n,),
        "lhs" heads of the tails.

        → (n, rows of that side's table) float32. For heads, θ_r·θ_t is left out: it is the same for
        all candidates.
        """
        known = self.relations[relation]
        if side == "lhs":
            return self.tables[known.rhs][entities] @ self.tables[known.lhs].T
        queries = self.tables[known.lhs][entities]
        if known.operator == "translation":
            queries = queries + self.translations[relation]
        return queries @ self.tables[known.rhs].T
