"""`EvaluationConfig`: what of held-out edges is measured, at the end and during training."""

import re
from typing import ClassVar, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from tml.config import Config

METRIC = re.compile(r"mrr|hits@(1|3|10)|(recall|ndcg|hit)@([1-9]\d*)")
"""Metrics that larger is better of."""


class RetrievalConfig(Config):
    """Ranks all right-hand entities for each left-hand one, those of its training edges left
    out.
    """

    k: list[PositiveInt] = Field(default=[10, 20, 50])
    """Cut-offs of Recall@K, NDCG@K and Hit@K."""


class DuringTrainingConfig(Config):
    """Ranks validation_data while training goes on. Each time a checkpoint is saved and measured,
    the best one is kept beside those of checkpoint_max_to_keep, and at the end it is what is
    exported and tested.
    """

    at_most_one_of: ClassVar = (("every_n_epochs", "every_n"),)

    every_n_epochs: PositiveFloat | None = None
    """Passes over the training edges between validations, such as 0.5; the last step is always
    validated. Unset, and every_n too: 1. Where train_data.grouped asks for the two sides by turns,
    a multiple of 2.
    """
    every_n: PositiveInt | None = None
    """Training steps between validations. Not where train_data.grouped asks for the two sides by
    turns.
    """
    metric: str = "mrr"
    """What the best step and early stopping go by: mrr, hits@1, hits@3, hits@10, or one of
    evaluation.retrieval: recall@K, ndcg@K, hit@K. It alone is measured, and what comes with it.
    """
    relation: str | None = None
    """The relation whose metric it is. Unset: the mean over all."""
    max_edges: PositiveInt | None = None
    """Edges ranked at most, spread evenly over validation_data; of retrieval those of left-hand
    entities spread evenly. Unset: evaluation.max_edges.
    """
    patience: PositiveInt | None = None
    """Validations in a row without improvement after which training ends. Unset: it does not end
    early.
    """
    min_delta: NonNegativeFloat = 0.0
    """An improvement is one by more than this over the last improvement."""

    @validator(mode="after")
    def _check(self) -> Self:
        if not METRIC.fullmatch(self.metric):
            raise ValueError(
                f"metric: {self.metric!r} is none of mrr, hits@1, hits@3, hits@10, recall@K, "
                "ndcg@K, hit@K"
            )
        return self

    def interval(self, num_edges: int) -> int | None:
        """Edges read between validations, of num_edges in a pass; None with every_n."""
        if self.every_n is not None:
            return None
        return max(1, round((self.every_n_epochs or 1) * num_edges))

    @property
    def is_link_prediction(self) -> bool:
        """Whether the metric is one of link prediction, else of retrieval."""
        return self.metric == "mrr" or self.metric.startswith("hits@")


class EvaluationConfig(Config):
    """What is measured on validation_data and test_data."""

    link_prediction: bool = True
    """Filtered MRR, MR, Hits@1/3/10 of both sides and of each relation, among all entities."""
    retrieval: RetrievalConfig | None = None
    """Recall@K, NDCG@K, Hit@K of each relation. Unset: left out."""
    relations: list[str] | None = None
    """Names of the relations that are measured. Unset: all."""
    max_edges: PositiveInt | None = None
    """Edges ranked at most, spread evenly over the data; of retrieval those of left-hand entities
    spread evenly; said in the report. Unset: all.
    """
    sampled_candidates: PositiveInt | None = None
    """Each true entity is ranked among so many drawn ones of its table instead of all, for tables
    of millions of rows: a number of its own, not comparable with that of the full protocol. Link
    prediction alone. Unset: all.
    """
    during_training: DuringTrainingConfig | None = None
    """Validation by ranking, early stopping and the best checkpoint. Unset: validation_data is
    ranked once training has ended, where there is no test_data, and the last checkpoint counts.
    """

    @validator(mode="after")
    def _check(self) -> Self:
        if self.sampled_candidates is not None and self.retrieval is not None:
            raise ValueError(
                "sampled_candidates: retrieval among sampled candidates says little about that "
                "among all; leave out retrieval, or sampled_candidates"
            )
        if (during := self.during_training) is None:
            return self
        if during.is_link_prediction and not self.link_prediction:
            raise ValueError(
                f"during_training.metric: {during.metric} needs link_prediction; set it to true, "
                "or take a metric of retrieval"
            )
        if not during.is_link_prediction:
            cut = int(during.metric.partition("@")[2])
            if self.retrieval is None or cut not in self.retrieval.k:
                raise ValueError(
                    f"during_training.metric: {during.metric} needs retrieval with {cut} among its "
                    f"k; set evaluation.retrieval.k"
                )
        if during.relation is not None and during.relation not in (
            self.relations or [during.relation]
        ):
            raise ValueError(
                f"during_training.relation: {during.relation!r} is not among evaluation.relations, "
                f"{', '.join(self.relations or ())}"
            )
        return self

    def for_training(self) -> "EvaluationConfig":
        """What is measured during training: the metric's kind alone, of max_edges edges."""
        during = self.during_training
        assert during is not None
        changes = {
            "link_prediction": during.is_link_prediction,
            "retrieval": None if during.is_link_prediction else self.retrieval,
            "max_edges": during.max_edges or self.max_edges,
        }
        return self.model_copy(update=changes)
