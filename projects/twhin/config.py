"""TwHIN's configuration: `TwhinConfig` and its parts, the shape of the YAML files in `config/`.

The keys of the published local.yaml are all here; what this program adds has a default. Rules
between fields are checked where they meet: tables of one dimension and one data type, relations
between known tables.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from projects.twhin.planted import PlantedConfig
from tml import train
from tml.config import Config
from tml.optimizers import OptimizerConfig


class RuntimeConfig(Config):
    """How the program runs."""

    enable_amp: bool = False
    """Score products in bfloat16 (autocast); no gradient scaler, bfloat16 has the range of
    float32.
    """
    enable_tensorfloat32: bool = False
    """TensorFloat-32 products on NVIDIA GPUs."""
    wandb: dict[str, Any] | None = None
    """Read for the published YAML's sake; not used, and announced where set."""


class TrainingConfig(train.TrainingConfig):
    """How long training runs and what it leaves behind."""

    num_epochs: PositiveInt = 1
    """Passes over the training edges."""


class TableConfig(Config):
    """One embedding table: the vectors of one type of entity."""

    name: str = Field(min_length=1)
    """Type of entity, unique."""
    num_embeddings: PositiveInt
    """Rows: ids run from 0 to num_embeddings − 1."""
    embedding_dim: int = Field(gt=0, multiple_of=4)
    """Dimension D, the same in all tables; FBGEMM wants multiples of 4."""
    data_type: Literal["fp32", "fp16"] = "fp32"
    """Storage of the vectors, the same in all tables."""
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({"rowwise_adagrad": {"lr": 0.1}})
    """What updates the rows that a batch touches."""
    pretrained: str | None = None
    """Vectors to start from: an .npy file of shape (num_embeddings, embedding_dim)."""
    vocab: str | None = None
    """Parquet file with columns id, entity (what `prepare` writes): names for the exported
    vectors.
    """


class TableDefaults(Config):
    """Values for tables that leave them out."""

    embedding_dim: int | None = Field(default=None, gt=0, multiple_of=4)
    data_type: Literal["fp32", "fp16"] | None = None
    optimizer: OptimizerConfig | None = None


class EmbeddingsConfig(Config):
    """All tables."""

    defaults: TableDefaults | None = None
    """Values for tables that leave them out: hyper-parameters apart from what is known of the
    data.
    """
    tables: list[TableConfig] = Field(min_length=1)

    @validator(mode="before")
    @classmethod
    def _fill_defaults(cls, tree: Any) -> Any:
        defaults = tree.get("defaults") if isinstance(tree, dict) else None
        if not isinstance(defaults, dict) or not isinstance(tree.get("tables"), list):
            return tree
        known = {key: value for key, value in defaults.items() if value is not None}
        tables = [
            {**known, **table} if isinstance(table, dict) else table for table in tree["tables"]
        ]
        return {**tree, "tables": tables}

    @validator(mode="after")
    def _check(self) -> Self:
        _refuse_doubles("tables", [table.name for table in self.tables])
        for field in ("embedding_dim", "data_type"):
            values = {table.name: getattr(table, field) for table in self.tables}
            if len(set(values.values())) > 1:
                raise ValueError(f"all tables must have the same {field}, not {values}")
        return self


class RelationConfig(Config):
    """One type of edge; its position in the list is its number in the data."""

    name: str = Field(min_length=1)
    lhs: str
    """Table of the left-hand entity."""
    rhs: str
    """Table of the right-hand entity."""
    operator: Literal["translation", "identity"] = "translation"
    """translation: score (θ_s + θ_r)·θ_t; identity: θ_s·θ_t."""


class SoftmaxConfig(Config):
    """Sampled softmax: cross-entropy of the positive among itself and its negatives."""

    temperature: PositiveFloat = 1.0
    """Scores are divided by it."""


class LogisticConfig(Config):
    """−log σ(f(e)) − Σ log σ(−f(e′)) over the negatives e′ of e, both sides (TwHIN, equation 3)."""


class LossConfig(Config):
    """Training objective: exactly one."""

    exactly_one_of: ClassVar = (("logistic", "softmax"),)

    logistic: LogisticConfig | None = None
    softmax: SoftmaxConfig | None = None


class ModelConfig(Config):
    """Tables, relations and what trains them."""

    embeddings: EmbeddingsConfig
    relations: list[RelationConfig] = Field(min_length=1)
    translation_optimizer: OptimizerConfig = OptimizerConfig.model_validate({"sgd": {"lr": 0.05}})
    """Updates the relation vectors θ_r."""
    loss: LossConfig = LossConfig(logistic=LogisticConfig())
    init_scale: PositiveFloat | None = None
    """Standard deviation of the initial vectors, relation vectors start at 0. Unset: 1/√D."""

    @validator(mode="after")
    def _check(self) -> Self:
        _refuse_doubles("relations", [relation.name for relation in self.relations])
        tables = [table.name for table in self.embeddings.tables]
        for index, relation in enumerate(self.relations):
            for side in ("lhs", "rhs"):
                if (table := getattr(relation, side)) not in tables:
                    raise ValueError(
                        f"relations.{index}.{side}: relation {relation.name!r} names the table "
                        f"{table!r}; there are {', '.join(tables)}"
                    )
        if self.translation_optimizer.kind == "rowwise_adagrad":
            raise ValueError("translation_optimizer: rowwise_adagrad is for tables; use adagrad")
        if self.translation_optimizer.kind == "adam":
            raise ValueError("translation_optimizer: adam is not supported; use adagrad or sgd")
        return self


class DataConfig(Config):
    """Edges in parquet files, and how batches are made of them."""

    data_root: str
    """Glob of parquet files with integer columns lhs, rel, rhs."""
    per_replica_batch_size: PositiveInt = 10_000
    """Edges in a batch, for each process."""
    global_negatives: NonNegativeInt = 0
    """Negatives of a side drawn uniformly from its table, shared by the edges of a chunk."""
    in_batch_negatives: NonNegativeInt = 0
    """Negatives of a side taken from edges of the same relation in the batch: up to so many."""
    chunk_size: PositiveInt = 100
    """Edges that share their global negatives, so that scores are matrix products."""
    limit: PositiveInt | None = None
    """Edges read at most, after the offset. Unset: all."""
    offset: NonNegativeInt = 0
    """Edges left out at the start of the files in their order."""
    shuffle_rows: PositiveInt = 1 << 20
    """Edges held in memory and mixed; row groups are put in random order before."""


class RetrievalConfig(Config):
    """Ranks all right-hand entities for each left-hand one, those of its training edges left
    out.
    """

    k: list[PositiveInt] = Field(default=[10, 20, 50])
    """Cut-offs of Recall@K, NDCG@K and Hit@K."""


class EvaluationConfig(Config):
    """What is measured on validation_data and test_data once training has ended."""

    link_prediction: bool = True
    """Filtered MRR, MR, Hits@1/3/10 of both sides and of each relation, among all entities."""
    retrieval: RetrievalConfig | None = None
    """Recall@K, NDCG@K, Hit@K of each relation. Unset: left out."""
    relations: list[str] | None = None
    """Names of the relations that are measured. Unset: all."""
    max_edges: PositiveInt | None = None
    """Edges ranked at most, spread evenly over the data; said in the report. Unset: all."""


class TwhinConfig(Config):
    """The whole of a TwHIN run."""

    runtime: RuntimeConfig = RuntimeConfig()
    training: TrainingConfig = TrainingConfig()
    model: ModelConfig
    train_data: DataConfig
    validation_data: DataConfig | None = None
    test_data: DataConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    planted: PlantedConfig | None = None
    """A graph that is generated where its folder is missing, so that the program runs without
    data.
    """

    @validator(mode="after")
    def _check(self) -> Self:
        known = [relation.name for relation in self.model.relations]
        for name in self.evaluation.relations or ():
            if name not in known:
                raise ValueError(
                    f"evaluation.relations: unknown relation {name!r}; there are {', '.join(known)}"
                )
        data = self.train_data
        if not data.global_negatives and not data.in_batch_negatives:
            raise ValueError("train_data: set global_negatives or in_batch_negatives above 0")
        return self


def _refuse_doubles(what: str, names: list[str]) -> None:
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"{what}: the name {doubles[0]!r} is given twice")
