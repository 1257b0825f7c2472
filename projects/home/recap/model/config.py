"""The model's configuration: `ModelConfig`, the shape of the key `model` in the YAML files.

The keys of the published YAML are all here; MMoE, PLE and the sizes of tables are added.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from tml.config import Config
from tml.optimizers import OptimizerConfig


class BatchNormConfig(Config):
    """Batch normalisation (Ioffe and Szegedy 2015)."""

    affine: bool = True
    """Whether a scale and a shift are learned."""
    momentum: float = Field(0.1, gt=0, le=1)
    """Weight of the new batch in the running statistics."""


class LayerNormConfig(Config):
    """Layer normalisation (Ba et al. 2016) over the last axis."""

    axis: Literal[-1] = -1
    """Only −1, the features of a row, is known."""
    center: bool = True
    """Whether a shift is learned."""
    scale: bool = True
    """Whether a scale is learned."""
    epsilon: NonNegativeFloat = 0.0
    """Added to the variance; a constant row gives the shift, never NaN, also with 0."""


class DropoutConfig(Config):
    """Dropout."""

    rate: float = Field(0.1, ge=0, lt=1)
    """Probability that a value is set to 0 in training."""


class MlpConfig(Config):
    """Fully connected layers with ReLU."""

    layer_sizes: list[PositiveInt] = Field(min_length=1)
    """Width of each layer."""
    batch_norm: BatchNormConfig | None = None
    """After each layer but the last, before ReLU; after the last too where it has an
    activation.
    """
    dropout: DropoutConfig | None = None
    """After each activation."""
    final_layer_activation: bool = False
    """Whether the last layer has an activation."""


class MaskBlockConfig(Config):
    """One MaskBlock (arXiv 2102.07619, equations 5 to 8)."""

    exactly_one_of: ClassVar = (("aggregation_size", "reduction_factor"),)

    output_size: PositiveInt
    """Width of the output."""
    aggregation_size: PositiveInt | None = None
    """Width of the hidden layer of the mask."""
    reduction_factor: PositiveFloat | None = None
    """That width as a multiple of the width that the mask is made from."""
    input_layer_norm: bool = False
    """Whether the block's input is normalised first."""


class MaskNetConfig(Config):
    """MaskNet: MaskBlocks side by side or one after the other."""

    mask_blocks: list[MaskBlockConfig] = Field(min_length=1)
    mlp: MlpConfig | None = None
    """After the blocks."""
    use_parallel: bool = True
    """true: all blocks see the input, their outputs are concatenated; false: each sees the output
    of the one before.
    """


class DcnConfig(Config):
    """DCN-v2 (arXiv 2008.13535): cross layers x₀ ⊙ (W x + b) + x."""

    poly_degree: PositiveInt = 2
    """Number of cross layers."""
    projection_dim: PositiveInt | None = None
    """Rank of W = U V. Unset: full."""
    parallel_mlp: MlpConfig | None = None
    """Deep part beside the cross layers (parallel) or after them (stacked)."""
    use_parallel: bool = True
    """Whether parallel_mlp sees the input, or the output of the cross layers."""
    output_mlp: MlpConfig | None = None
    """After both."""


class DlrmConfig(Config):
    """DLRM (arXiv 1906.00091): dot products between embeddings and the bottom MLP's output."""

    bottom_mlp: MlpConfig
    """Over everything that is not an embedding; its last width must be the embeddings' width."""
    top_mlp: MlpConfig
    """Over the bottom MLP's output and the products of all pairs."""


class AffineMap(Config):
    """logit ↦ scale · logit + bias, fixed."""

    scale: float = 1.0
    bias: float = 0.0


class TaskModel(Config):
    """A network: exactly one kind; used for the backbone and for each task's tower."""

    exactly_one_of: ClassVar = (("mlp_config", "dcn_config", "dlrm_config", "mask_net_config"),)

    mlp_config: MlpConfig | None = None
    dcn_config: DcnConfig | None = None
    dlrm_config: DlrmConfig | None = None
    mask_net_config: MaskNetConfig | None = None
    affine_map: AffineMap | None = None
    """On the logit (towers)."""
    pos_weight: PositiveFloat = 1.0
    """Weight of positive rows in the loss (towers)."""


class DoubleNormLogConfig(Config):
    """Non-finite → 0, sign(x)·log1p(|x|), BatchNorm, clip, concatenate, LayerNorm."""

    batch_norm_config: BatchNormConfig | None = BatchNormConfig(affine=True, momentum=0.01)
    clip_magnitude: PositiveFloat = 5.0
    """Values are clipped to ± this after BatchNorm."""
    layer_norm_config: LayerNormConfig | None = LayerNormConfig()


class Log1pAbsConfig(Config):
    """Non-finite → 0, sign(x)·log1p(|x|)."""


class ClipLog1pAbsConfig(Config):
    """Non-finite → 0, clip to ± clip_magnitude, sign(x)·log1p(|x|)."""

    clip_magnitude: PositiveFloat = 5.0


class ZScoreLogConfig(Config):
    """Non-finite → 0, sign(x)·log1p(|x|), then (x − mean)/std by statistics of the training span,
    clip.
    """

    statistics_path: str = Field(min_length=1)
    """JSON file {"mean": [C], "std": [C]} of the values after the logarithm."""
    clip_magnitude: PositiveFloat | None = 5.0
    """Values are clipped to ± this. Unset: not clipped."""


class FeaturizationConfig(Config):
    """How continuous features become inputs."""

    exactly_one_of: ClassVar = (
        (
            "log1p_abs_config",
            "clip_log1p_abs_config",
            "z_score_log_config",
            "double_norm_log_config",
        ),
    )

    log1p_abs_config: Log1pAbsConfig | None = None
    clip_log1p_abs_config: ClipLog1pAbsConfig | None = None
    z_score_log_config: ZScoreLogConfig | None = None
    double_norm_log_config: DoubleNormLogConfig | None = None
    feature_names_to_concat: list[str] = Field(default=["binary"])
    """Features concatenated as they are after the continuous ones."""


class EmbeddingTableConfig(Config):
    """One table of vectors, for one or several categorical features."""

    name: str
    embedding_dim: PositiveInt
    features: list[str] = Field(min_length=1)
    """Categorical features, bags, or `discrete.<column>`; features of one table share its rows."""
    num_embeddings: PositiveInt | None = None
    """Rows. Unset: as many as the data's vocabulary has."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the vectors of a bag become one."""
    hash_values: bool = False
    """Whether values are hashed to rows; needed where they are no row numbers (`discrete`)."""
    init_scale: PositiveFloat = 0.01
    """Standard deviation of the initial vectors."""
    pretrained: str | None = None
    """.npy file of (num_embeddings, embedding_dim) to start from."""


class SmallEmbeddingsConfig(Config):
    """Tables that every process holds whole, trained with the backbone's optimizer."""

    tables: list[EmbeddingTableConfig] = Field(default=[])
    default_dim: PositiveInt | None = None
    """Every categorical feature and bag that no table names gets one of this width. Unset: they
    are left out.
    """
    dropout: DropoutConfig | None = None
    """On the vectors."""


class LargeEmbeddingsConfig(Config):
    """Tables cut by rows over the processes (TorchRec), with their own fused optimizer."""

    tables: list[EmbeddingTableConfig] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({"rowwise_adagrad": {"lr": 0.01}})


class PositionDebiasConfig(Config):
    """A vector of the position at which the post was shown, an input in training alone."""

    max_position: PositiveInt = 256
    """Positions from this on count as the last."""
    num_dims: PositiveInt = 64
    """Width of the vector."""
    drop_probability: float = Field(0.5, ge=0, lt=1)
    """Probability that a row's position is taken for unknown in training; it always is in
    inference.
    """
    position_feature_name: str = "position"
    """Id feature that holds the position, from 0."""


class StratifierConfig(Config):
    """A part of the rows on which metrics are computed apart."""

    name: str
    index: NonNegativeInt | None = None
    """Column of `feature`, where that has columns (discrete)."""
    value: int
    """Rows whose feature has this value."""
    feature: str = "discrete"
    """discrete, or a categorical or id feature."""


class MmoeConfig(Config):
    """Multi-gate mixture of experts (Ma et al. 2018)."""

    num_experts: PositiveInt = 4
    expert: MlpConfig
    """Network of each expert, over the backbone's output."""


class PleConfig(Config):
    """Progressive layered extraction (Tang et al. 2020)."""

    num_levels: PositiveInt = 2
    num_shared_experts: PositiveInt = 2
    num_task_experts: PositiveInt = 1
    expert: MlpConfig
    """Network of each expert."""


class ModelConfig(Config):
    """The whole network."""

    at_most_one_of: ClassVar = (("mmoe_config", "ple_config"),)

    tasks: dict[str, TaskModel] = Field(min_length=1)
    """Tower of each task; paired with the data's labels by name."""
    featurization_config: FeaturizationConfig
    backbone: TaskModel | None = None
    """Network below the towers. Unset: towers see the inputs."""
    multi_task_type: Literal["share_none", "share_all", "share_partial"] = "share_all"
    """share_all: towers see the backbone's output; share_partial: that and the inputs;
    share_none: every task has a backbone of its own.
    """
    mmoe_config: MmoeConfig | None = None
    """Experts and a gate a task between backbone and towers."""
    ple_config: PleConfig | None = None
    """Experts of all and of each task between backbone and towers."""
    small_embeddings: SmallEmbeddingsConfig | None = None
    large_embeddings: LargeEmbeddingsConfig | None = None
    position_debias_config: PositionDebiasConfig | None = None
    stratifiers: list[StratifierConfig] | None = None

    @validator(mode="after")
    def _check(self) -> Self:
        if self.backbone is None and (self.mmoe_config or self.ple_config):
            return self
        if self.multi_task_type != "share_all" and (self.mmoe_config or self.ple_config):
            raise ValueError(
                f"multi_task_type {self.multi_task_type}: mmoe_config and ple_config are ways of "
                "sharing of their own; leave multi_task_type at share_all"
            )
        return self

    def without_files(self) -> Self:
        """The same network with initial values that are read from no file (`pretrained`,
        `statistics_path`): for models whose values are loaded from a checkpoint.
        """
        changes: dict[str, Any] = {}
        for part in ("small_embeddings", "large_embeddings"):
            if (given := getattr(self, part)) is not None:
                tables = [one.model_copy(update={"pretrained": None}) for one in given.tables]
                changes[part] = given.model_copy(update={"tables": tables})
        inputs = self.featurization_config
        if inputs.z_score_log_config is not None:
            z_score = inputs.z_score_log_config.model_copy(update={"statistics_path": ""})
            changes["featurization_config"] = inputs.model_copy(
                update={"z_score_log_config": z_score}
            )
        return self.model_copy(update=changes)
