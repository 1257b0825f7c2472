"""The Heavy Ranker: inputs, a network below (backbone), a tower a task, a logit a task.

    features → Featurization, embeddings, position → x (B, input_width)
    x → Sharing → a tower a task → logits (B, T) → Calibration → probabilities (B, T)

Columns of logits and probabilities are the model's tasks, in config order; labels are looked up in
the data's tasks by name.
"""

import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.model import embeddings
from projects.home.recap.model.calibration import NUM_KNOTS, Calibration
from projects.home.recap.model.config import ModelConfig
from projects.home.recap.model.embeddings import PositionDebias, SmallEmbeddings
from projects.home.recap.model.featurization import Featurization, InputStatistics
from projects.home.recap.model.multi_task import Sharing
from projects.home.recap.model.towers import Towers
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.embeddings import Tables

logger = logging.getLogger(__name__)


class RankingModel(nn.Module):
    """The whole network. Initial parameters depend on torch's seed alone; large tables belong to
    their engine and are none of this module's parameters.

    Batch norm of the inputs sees the whole update (`input_statistics`); batch norm in towers and
    other networks sees the rows of one micro-batch of one process, as it does everywhere.
    """

    num_calibration_knots = NUM_KNOTS

    _columns: Tensor
    _pos_weights: Tensor

    def __init__(
        self, config: ModelConfig, features: Features, large: Tables | None = None
    ) -> None:
        super().__init__()
        self.tasks = tuple(config.tasks)
        self._label_columns = _label_columns(self.tasks, features.tasks)
        # In a list, so that their parameters do not become this module's.
        self._tables = [large] if large is not None else []
        self._large = embeddings.large_tables(config, features)
        self.featurization = Featurization(config.featurization_config, features)
        debias = config.position_debias_config
        self.position = PositionDebias(debias, features) if debias else None
        taken = {name for table in self._large for name in table.features}
        small = (
            embeddings.small_tables(config.small_embeddings, features, taken)
            if config.small_embeddings
            else []
        )
        self.small = (
            SmallEmbeddings(config.small_embeddings, small)
            if config.small_embeddings and small
            else None
        )
        self._small = small
        dims = [table.dim for table in (*small, *self._large) for _ in table.features]
        self.input_width = self.featurization.width + sum(dims) + (debias.num_dims if debias else 0)
        if not self.input_width:
            raise ConfigError("model: the data has no feature that the model takes as input")
        _announce(tuple(unused_features(config, features)))
        self.sharing = Sharing(config, self.input_width, dims)
        self.towers = Towers(config.tasks, self.sharing.width_out)
        self.calibration = Calibration(self.tasks)
        weights = [tower.pos_weight for tower in config.tasks.values()]
        self.register_buffer("_pos_weights", torch.tensor(weights), persistent=False)
        self.register_buffer("_columns", torch.tensor(self._label_columns), persistent=False)
        self._has_batch_norm = any(isinstance(m, nn.BatchNorm1d) for m in self.modules())

    @property
    def has_large_tables(self) -> bool:
        """Whether `lookup` is a collective of the job's processes."""
        return bool(self._large)

    def lookup(self, batch: RankingBatch) -> dict[str, Tensor]:
        """Feature → (B, D): pooled rows of the large tables, whose gradient updates them; {}
        without large tables. Once an update, for all its rows; all processes together.
        """
        if not self._large:
            return {}
        if not self._tables:
            raise ValueError("large_embeddings are configured, but the model was given no tables")
        rows = self._tables[0](embeddings.large_ids(self._large, batch))
        return embeddings.pool_large(self._large, batch, rows)

    def input_statistics(self, batch: RankingBatch) -> InputStatistics | None:
        """Statistics of the inputs' batch norm over all rows of an update and all processes, for
        `forward`; moves the running ones. None in eval mode and where there is no batch norm.
        """
        return self.featurization.statistics(batch)

    def forward(
        self,
        batch: RankingBatch,
        large_rows: Mapping[str, Tensor] | None = None,
        statistics: InputStatistics | None = None,
    ) -> Tensor:
        """(B, T) float32 logits. large_rows: from `lookup`; statistics: from `input_statistics`,
        taken from this batch where they are not given.
        """
        if self.training and self._has_batch_norm and batch.labels.shape[0] == 1:
            raise DataError(
                "training on 1 row: the batch norm of towers and networks needs at least 2 rows a "
                "micro-batch and process; raise train_data.global_batch_size"
            )
        x = self.inputs(batch, large_rows, statistics)
        logits: Tensor = self.towers(self.sharing(x))
        return logits

    def inputs(
        self,
        batch: RankingBatch,
        large_rows: Mapping[str, Tensor] | None = None,
        statistics: InputStatistics | None = None,
    ) -> Tensor:
        """(B, input_width): what the networks see, in the type that they multiply in."""
        parts = self.featurization(batch, statistics)
        if self.position is not None:
            parts.append(self.position(batch))
        if self.small is not None:
            parts += self.small(batch)
        if self._large:
            parts += self._rows_of_large(large_rows)
        device_type = parts[0].device.type
        if torch.is_autocast_enabled(device_type):
            # Once: autocast would convert it again in every layer that sees the input.
            dtype = torch.get_autocast_dtype(device_type)
            parts = [part.to(dtype) for part in parts]
        return torch.cat(parts, dim=1)

    def _rows_of_large(self, large_rows: Mapping[str, Tensor] | None) -> list[Tensor]:
        if large_rows is None:
            raise ValueError("the model has large tables: give forward the rows from lookup(batch)")
        return [large_rows[name] for table in self._large for name in table.features]

    def losses(self, logits: Tensor, batch: RankingBatch) -> Tensor:
        """(T,) float32: a task's sum over rows of weight · binary cross-entropy, positives times
        pos_weight.
        """
        return F.binary_cross_entropy_with_logits(
            logits.float(),
            batch.labels[:, self._columns],
            weight=batch.weights[:, self._columns],
            pos_weight=self._pos_weights,
            reduction="none",
        ).sum(0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, T) float32: calibrated for the sampling of the training data where
        `set_sampling_ratios` said so, then by the learned map where there is one.
        """
        calibrated: Tensor = self.calibration(logits)
        return calibrated

    def set_sampling_ratios(self, ratios: Mapping[str, float]) -> None:
        """Task → neg_rate / pos_rate of the training data."""
        self.calibration.set_sampling_ratios(ratios)

    def set_calibration(self, task: str, x: Tensor, y: Tensor) -> None:
        """The learned map of a task: points (x, y) in probabilities, at most
        num_calibration_knots.
        """
        self.calibration.set_map(task, x, y)

    def reset_calibration(self) -> None:
        """Forget the learned maps; the sampling ratios stay."""
        self.calibration.reset_maps()

    def tower_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters of one task alone: its tower and, with share_none, its own backbone."""
        own = list(self.towers.of(task).parameters())
        if self.sharing.own:
            own += self.sharing.own[self.tasks.index(task)].parameters()
        return own

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All the others."""
        towers = {id(p) for task in self.tasks for p in self.tower_parameters(task)}
        return [p for p in self.parameters() if id(p) not in towers]


def unused_features(config: ModelConfig, features: Features) -> list[str]:
    """Features of the data that are no input of the model: binary ones that are not concatenated,
    discrete columns, categorical features and bags without a table.
    """
    tables = embeddings.large_tables(config, features)
    taken = {name for table in tables for name in table.features}
    if config.small_embeddings is not None:
        small = embeddings.small_tables(config.small_embeddings, features, taken)
        taken |= {name for table in small for name in table.features}
    unused = [name for name in (*features.categorical, *features.bags) if name not in taken]
    hashed = sum(name.startswith(embeddings.DISCRETE) for name in taken)
    if left := features.num_discrete - hashed:
        unused.append(f"{left} of {features.num_discrete} discrete columns")
    if features.num_binary and "binary" not in config.featurization_config.feature_names_to_concat:
        unused.append(f"{features.num_binary} binary features")
    return unused


@cache  # once a process, however often the model is built
def _announce(unused: tuple[str, ...]) -> None:
    if unused:
        logger.info(
            "not inputs of the model: %s; small_embeddings, large_embeddings or "
            "feature_names_to_concat take them in",
            ", ".join(unused),
        )


def _label_columns(model_tasks: tuple[str, ...], data_tasks: tuple[str, ...]) -> list[int]:
    missing = [task for task in model_tasks if task not in data_tasks]
    if missing:
        raise ConfigError(
            f"model.tasks: the data has no label {', '.join(missing)}. "
            f"Tasks of the model: {', '.join(model_tasks)}. Labels: {', '.join(data_tasks)}"
        )
    return [data_tasks.index(task) for task in model_tasks]
