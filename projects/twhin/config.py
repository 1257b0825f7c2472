"""TwHIN's configuration: `TwhinConfig` and its parts, the shape of the YAML files in `config/`.

The keys of the published local.yaml are all here; what this program adds has a default. Rules
between fields are checked where they meet: tables of one dimension and one data type, relations
between known tables, operators that the dimension allows, candidates that fit into memory.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from projects.twhin.comparators import Comparator
from projects.twhin.evaluation_config import EvaluationConfig
from projects.twhin.exported import refuse_table_names
from projects.twhin.operators import LINEAR_PART_IS_IDENTITY, Operator
from projects.twhin.planted import PlantedConfig
from projects.twhin.relation_prediction import BY_DOT, not_predicted
from projects.twhin.scoring import moves_to_the_query
from projects.twhin.warm_start_config import WarmStartConfig
from tml import train
from tml.config import Config
from tml.optimizers import OptimizerConfig

BIAS = ".bias"
"""What is added to a table's name for the table of its entities' biases."""
MAX_SCORES = 1 << 28
"""Scores of one step of one process at most, where all rows are candidates: 1 GiB of float32, a few
times over.
"""


Side = Literal["lhs", "rhs"]
SIDES: tuple[Side, ...] = ("lhs", "rhs")


class RuntimeConfig(Config):
    """How the program runs."""

    enable_amp: bool | Literal["auto"] = False
    """Score products in bfloat16 (autocast); no gradient scaler, bfloat16 has the range of
    float32. auto: where the machine multiplies faster in it, a GPU or a processor with AMX tiles;
    others do so at half the speed.
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
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Storage of the vectors, the same in all tables. fp16 holds numbers up to 65,504; bf16 has the
    range of fp32 and 8 bits of precision, in one process alone.
    """
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({"rowwise_adagrad": {"lr": 0.1}})
    """What updates the rows that a batch touches: sgd, adagrad, rowwise_adagrad, or in one process
    adam, whose moments are those of the touched rows alone.
    """
    pretrained: str | None = None
    """Vectors to start from: an .npy file of shape (num_embeddings, embedding_dim)."""
    vocab: str | None = None
    """Parquet file with columns id, entity (what `prepare` writes): names for the exported
    vectors.
    """


class TableDefaults(Config):
    """Values for tables that leave them out."""

    embedding_dim: int | None = Field(default=None, gt=0, multiple_of=4)
    data_type: Literal["fp32", "fp16", "bf16"] | None = None
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
        refuse_table_names([table.name for table in self.tables])
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
    operator: Operator = "translation"
    """What is done to the left-hand vector θ_s before it is compared with θ_t: identity nothing;
    translation θ_s + b_r; diagonal d_r ⊙ θ_s (DistMult); linear A_r θ_s (RESCAL); affine
    A_r θ_s + b_r; complex_diagonal c_r ⊙ θ_s over the complex numbers (ComplEx), the first half of
    a vector being real parts, the second imaginary ones.
    """
    weight: PositiveFloat = 1.0
    """What an edge of it counts in the loss."""
    sampling_rate: float = Field(default=1.0, gt=0, le=1)
    """Share of its training edges that an epoch uses, drawn anew each time; those left out count as
    edges of loss 0.
    """


class SoftmaxConfig(Config):
    """Sampled softmax: cross-entropy of the positive among itself and its negatives."""

    temperature: PositiveFloat = 1.0
    """Scores are divided by it."""

    log_q: bool = False
    """Subtract from a negative's score the log of how often it is expected among the drawn ones, so
    that the sum over negatives estimates that over all entities without bias; needs
    global_negatives alone.
    """
    relation_weight: NonNegativeFloat = 0.0
    """λ of relation prediction (arXiv 2110.02834): each edge also adds λ times the cross-entropy of
    its relation among all that join the same two tables, its entities being given.
    """


class LogisticConfig(Config):
    """−log σ(f(e)) − Σ log σ(−f(e′)) over the negatives e′ of e, both sides (TwHIN, equation 3)."""

    negatives: Literal["sum", "mean"] = "sum"
    """mean: the mean over an edge's negatives in place of their sum, as in PyTorch-BigGraph."""


class MarginRankingConfig(Config):
    """Σ max(0, margin − f(e) + f(e′)) over the negatives e′ of e, both sides (TransE)."""

    margin: PositiveFloat = 0.1
    """By how much a positive must be above a negative."""


class LossConfig(Config):
    """Training objective: exactly one."""

    exactly_one_of: ClassVar = (("logistic", "softmax", "margin_ranking"),)

    logistic: LogisticConfig | None = None
    softmax: SoftmaxConfig | None = None
    margin_ranking: MarginRankingConfig | None = None


class RegularizationConfig(Config):
    """Penalties on what a batch looks up, added to each edge's loss: λ Σ |θ|^p over the vectors of
    its two entities and the parameters of its relation, complex numbers by their modulus. With
    reciprocal relations once for each direction.
    """

    l2: NonNegativeFloat = 0.0
    """λ of p = 2."""
    n3: NonNegativeFloat = 0.0
    """λ of p = 3, the nuclear 3-norm (arXiv 1806.07297, equation 4)."""


class ModelConfig(Config):
    """Tables, relations and what trains them."""

    embeddings: EmbeddingsConfig
    relations: list[RelationConfig] = Field(min_length=1)
    translation_optimizer: OptimizerConfig = OptimizerConfig.model_validate({"sgd": {"lr": 0.05}})
    """Updates the relations' parameters: sgd, adagrad or adam."""
    operator: Operator | None = None
    """Operator of all relations, in place of their own: for relations that `--graph` brings."""
    comparator: Comparator = "dot"
    """How alike op_r(θ_s) and θ_t are: dot, cosine, l2 (−‖a − b‖, with translation TransE) or
    squared_l2 (−‖a − b‖²).
    """
    reciprocal: bool = False
    """Give each relation a second set of parameters for its inverse: heads are then asked for as
    tails of the inverse relation, op_r⁻¹(θ_t) compared with θ_s (arXiv 1806.07297).
    """
    biases: bool = False
    """Add to a score the biases of its two entities, which start at 0 and learn by their table's
    optimizer.
    """
    loss: LossConfig = LossConfig(logistic=LogisticConfig())
    regularization: RegularizationConfig = RegularizationConfig()
    embedding_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the numbers of the looked-up vectors that are set to 0 in training, the others made
    larger accordingly.
    """
    init_scale: PositiveFloat | None = None
    """Standard deviation of the initial vectors. Unset: 1/√D."""
    relation_init_scale: PositiveFloat | None = None
    """Standard deviation of the relations' initial parameters. Unset: each operator starts as the
    identity, which ComplEx and DistMult do not learn well from.
    """

    @validator(mode="before")
    @classmethod
    def _fill_operator(cls, tree: Any) -> Any:
        operator = tree.get("operator") if isinstance(tree, dict) else None
        if operator is None or not isinstance(tree.get("relations"), list):
            return tree
        relations = [
            {**relation, "operator": operator} if isinstance(relation, dict) else relation
            for relation in tree["relations"]
        ]
        return {**tree, "relations": relations}

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
        self._check_operators()
        self._check_relation_weight()
        if self.translation_optimizer.kind == "rowwise_adagrad":
            raise ValueError("translation_optimizer: rowwise_adagrad is for tables; use adagrad")
        return self

    def scores_questions_once(self, asks: str) -> bool:
        """Whether 1-vs-all is computed by `one_vs_all`, with distinct questions scored once."""
        logistic = self.loss.logistic
        known = self.loss.softmax is not None or (
            logistic is not None and logistic.negatives == "sum"
        )
        operators = [relation.operator for relation in self.relations]
        by_product = self.reciprocal or moves_to_the_query(self.comparator, operators)
        return known and (by_product or asks == "rhs")

    def _check_relation_weight(self) -> None:
        if self.loss.softmax is None or not self.loss.softmax.relation_weight:
            return
        if (index := not_predicted(self.relations, self.comparator)) is None:
            return
        relation = self.relations[index]
        raise ValueError(
            "loss.softmax.relation_weight: relations are predicted with the comparator dot and the "
            f"operators {', '.join(BY_DOT)}, or with l2 and squared_l2 and the operators "
            f"{', '.join(LINEAR_PART_IS_IDENTITY)}; relation {relation.name!r} has "
            f"{relation.operator} with {self.comparator}; change these, or leave relation_weight "
            "out"
        )

    def _check_operators(self) -> None:
        dim = self.embeddings.tables[0].embedding_dim
        for index, relation in enumerate(self.relations):
            if relation.operator == "complex_diagonal" and dim % 8:
                raise ValueError(
                    f"relations.{index}.operator: complex_diagonal of relation {relation.name!r} "
                    f"needs an embedding_dim that is a multiple of 8, not {dim}"
                )


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
    degree_power: float = Field(default=0.0, ge=0, le=1)
    """α: global negatives are drawn with probability ∝ (1 + d)^α, d being an entity's number of
    training edges on that side of the relations between the same tables. 0: uniformly.
    """
    all_negatives: bool = False
    """Compare each edge with all rows of the side's table (1-vs-all) in place of drawn negatives;
    for tables of some ten thousand rows, in one process.
    """
    asks: Literal["both", "lhs", "rhs"] = "both"
    """The side of an edge that is asked for and has negatives. rhs: tails alone, what recommenders
    want; lhs: heads alone.
    """
    grouped: bool = False
    """With all_negatives: edges that ask the same question, by (lhs, rel) or (rhs, rel), come
    together in one batch, and are compared with all rows once. A pass over the edges asks for one
    side, rhs in even passes and lhs in odd ones, from 0 on, or always the one of `asks`.
    """
    limit: PositiveInt | None = None
    """Edges read at most, after the offset. Unset: all."""
    offset: NonNegativeInt = 0
    """Edges left out at the start of the files in their order."""
    shuffle_rows: PositiveInt = 1 << 20
    """Edges held in memory and mixed; row groups are put in random order before."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.grouped and not self.all_negatives:
            raise ValueError(
                "grouped: it saves products with all rows of a table; set all_negatives, or leave "
                "it out"
            )
        return self

    def sides(self, epoch: int) -> tuple[Side, ...]:
        """The sides that are asked for in a pass, the first being 0."""
        if self.asks != "both":
            return (self.asks,)
        if self.grouped:
            return ("lhs",) if epoch % 2 else ("rhs",)
        return SIDES


class TwhinConfig(Config):
    """The whole of a TwHIN run."""

    runtime: RuntimeConfig = RuntimeConfig()
    training: TrainingConfig = TrainingConfig()
    model: ModelConfig
    train_data: DataConfig
    validation_data: DataConfig | None = None
    test_data: DataConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    warm_start: WarmStartConfig | None = None
    """Start from the vectors of an earlier run, matched by entity. Unset: from random ones."""
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
        self._check_warm_start()
        self._check_during_training(known)
        data = self.train_data
        sampled = bool(data.global_negatives or data.in_batch_negatives)
        if not sampled and not data.all_negatives:
            raise ValueError(
                "train_data: set global_negatives or in_batch_negatives above 0, or all_negatives"
            )
        for where, one in (("train_data", data), ("validation_data", self.validation_data)):
            if one is not None and one.all_negatives:
                self._check_all_negatives(where, one)
                if not data.all_negatives:
                    raise ValueError(f"{where}.all_negatives: train_data must have it too")
        self._check_grouped()
        softmax = self.model.loss.softmax
        corrects = softmax is not None and softmax.log_q
        for where, one in (("train_data", data), ("validation_data", self.validation_data)):
            if one is None:
                continue
            if corrects and (one.in_batch_negatives or one.all_negatives):
                raise ValueError(
                    "model.loss.softmax.log_q: only negatives that are drawn can be corrected; use "
                    f"{where}.global_negatives alone"
                )
            if one.degree_power and not data.degree_power:
                raise ValueError(
                    f"{where}.degree_power: degrees are counted where train_data has it too"
                )
        if data.degree_power and not data.global_negatives:
            raise ValueError(
                "train_data.degree_power: it decides how global_negatives are drawn, and there are "
                "none; set global_negatives above 0, or leave it out"
            )
        return self

    def _check_grouped(self) -> None:
        if self.validation_data is not None and self.validation_data.grouped:
            raise ValueError(
                "validation_data.grouped: it is for passes of training, a validation asks for the "
                "sides at once; leave it out"
            )
        data = self.train_data
        if not data.grouped:
            return
        if data.asks == "both" and self.training.num_epochs % 2:
            number = self.training.num_epochs
            raise ValueError(
                "training.num_epochs: with train_data.grouped a pass asks for one side, and "
                f"{number} would ask for tails once more than for heads; make it {number + 1} (two "
                "passes are one epoch of both sides), or set train_data.asks to one side"
            )
        if not self.model.scores_questions_once(data.asks):
            raise ValueError(
                "train_data.grouped: a question is scored once with the losses softmax and "
                "logistic (negatives: sum), where no candidate goes through a relation's operator; "
                "change the loss, set model.reciprocal to true or model.comparator to dot, or "
                "leave grouped out"
            )

    def _check_warm_start(self) -> None:
        if self.warm_start is None:
            return
        if self.training.initial_checkpoint_dir is not None:
            raise ValueError(
                "warm_start: training.initial_checkpoint_dir says another start, with rows matched "
                "by number; leave one of them out"
            )
        tables = {table.name: table for table in self.model.embeddings.tables}
        for name in self.warm_start.tables or ():
            if name not in tables:
                raise ValueError(
                    f"warm_start.tables: unknown table {name!r}; there are {', '.join(tables)}"
                )
        for index, table in enumerate(self.model.embeddings.tables):
            chosen = self.warm_start.tables is None or table.name in self.warm_start.tables
            if chosen and table.pretrained is not None:
                raise ValueError(
                    f"model.embeddings.tables.{index}.pretrained: table {table.name!r} starts from "
                    "warm_start; leave one of them out, or name the others in warm_start.tables"
                )

    def _check_during_training(self, known: list[str]) -> None:
        if (during := self.evaluation.during_training) is None:
            return
        if self.validation_data is None:
            raise ValueError(
                "evaluation.during_training: it ranks validation_data, which is unset; hold edges "
                "out with `prepare --valid …` (or set validation_data.data_root), or train without "
                "it: --set evaluation.during_training=null"
            )
        data = self.train_data
        by_turns = data.grouped and data.asks == "both"
        if by_turns and during.every_n is not None:
            raise ValueError(
                "evaluation.during_training.every_n: with train_data.grouped a pass asks for one "
                f"side, and every {during.every_n:,} steps would measure now after more of one side"
                " and now after more of the other; give every_n_epochs in place of every_n, 2 or a "
                "multiple"
            )
        if by_turns and (passes := during.every_n_epochs or 1) % 2:
            raise ValueError(
                "evaluation.during_training.every_n_epochs: with train_data.grouped a pass asks "
                f"for one side, and every {passes:g} would measure now after one side and now "
                "after the other; make every_n_epochs 2 or a multiple"
            )
        if during.relation is not None and during.relation not in known:
            raise ValueError(
                f"evaluation.during_training.relation: unknown relation {during.relation!r}; "
                f"there are {', '.join(known)}"
            )

    def _check_all_negatives(self, where: str, data: DataConfig) -> None:
        if data.global_negatives or data.in_batch_negatives:
            raise ValueError(
                f"{where}: all_negatives takes the place of drawn negatives; "
                "set global_negatives and in_batch_negatives to 0"
            )
        if data.grouped:  # scores are made for a block of questions at a time
            return
        table = max(self.model.embeddings.tables, key=lambda table: table.num_embeddings)
        edges = data.per_replica_batch_size * (self.training.gradient_accumulation or 1)
        if (scores := edges * table.num_embeddings) > MAX_SCORES:
            raise ValueError(
                f"{where}.all_negatives: {edges:,} edges a batch × {table.num_embeddings:,} rows "
                f"of table {table.name!r} are {scores:,} scores, more than {MAX_SCORES:,}; make "
                f"per_replica_batch_size {MAX_SCORES // table.num_embeddings:,} at most, or use "
                "global_negatives"
            )


def _refuse_doubles(what: str, names: list[str]) -> None:
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"{what}: the name {doubles[0]!r} is given twice")
