"""How continuous and binary features and vectors made elsewhere become inputs.

The published way (double_norm_log): non-finite → 0, sign(x)·log1p(|x|), batch norm, clip,
concatenate the binary features, layer norm; each vector gets a layer norm of its own.

The batch norm's statistics are those of the whole update, over all micro-batches and processes:
`statistics` computes them once, and micro-batches that are given them add up to the gradient of the
one large batch. (Batch norm inside networks sees a micro-batch of one process, as it does
everywhere.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.model.config import (
    BatchNormConfig,
    DoubleNormLogConfig,
    FeaturizationConfig,
    ZScoreLogConfig,
)
from projects.home.recap.model.layers import LayerNorm
from tml import distributed
from tml.config import ConfigError
from tml.data.parquet import DataError

BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class InputStatistics:
    """Of the continuous features after the logarithm, over all rows of an update."""

    mean: Tensor
    """(C,) float32."""
    variance: Tensor
    """(C,) float32, divided by the number of rows."""


def finite(x: Tensor) -> Tensor:
    """NaN and ±∞ → 0."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def signed_log(x: Tensor) -> Tensor:
    """sign(x)·log1p(|x|), non-finite → 0."""
    x = finite(x)
    logarithm = torch.log1p(torch.abs(x))
    if torch.compiler.is_exporting():  # ONNX has no copysign
        return torch.sign(x) * logarithm
    return torch.copysign(logarithm, x)


class InputBatchNorm(nn.Module):
    """Batch norm (B, C) → (B, C) by statistics that are given (training) or the running ones."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, config: BatchNormConfig, width: int) -> None:
        super().__init__()
        self._momentum = config.momentum
        self.weight = nn.Parameter(torch.ones(width)) if config.affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    @torch.no_grad()
    def statistics(self, x: Tensor) -> InputStatistics:
        """Statistics of the rows of all processes; moves the running ones (by the unbiased
        variance, as torch does). x: (B, C) of this process.
        """
        # Sums of float32 in float64: processes of different row counts then agree with one.
        num_rows = float(distributed.all_reduce_sum(torch.tensor(float(x.shape[0]))))
        if num_rows < 2:
            raise DataError(
                f"training on {num_rows:.0f} row: batch norm of the inputs needs at least 2 rows "
                "an update; raise train_data.global_batch_size"
            )
        mean = distributed.all_reduce_sum(x.sum(0).double()) / num_rows
        squares = (x - mean.float()).square_().sum(0).double()
        distributed.all_reduce_sum(squares)
        self.running_mean.lerp_(mean.float(), self._momentum)
        self.running_var.lerp_((squares / (num_rows - 1)).float(), self._momentum)
        return InputStatistics(mean.float(), (squares / num_rows).float())

    def forward(self, x: Tensor, statistics: InputStatistics | None) -> Tensor:
        """statistics None: the running ones."""
        mean = self.running_mean if statistics is None else statistics.mean
        variance = self.running_var if statistics is None else statistics.variance
        # x has no gradient and the statistics none with it: two plain affine maps are all.
        normed = (x - mean) * torch.rsqrt(variance + BATCH_NORM_EPSILON)
        if self.weight is None or self.bias is None:
            return normed
        return torch.addcmul(self.bias, normed, self.weight)


class Featurization(nn.Module):
    """A batch's continuous and binary features and vectors → (B, width) float32."""

    z_mean: Tensor
    z_std: Tensor

    def __init__(self, config: FeaturizationConfig, features: Features) -> None:
        super().__init__()
        self._config = config
        self._concat = _concatenated(config, features)
        self._vectors = [name for name in features.vectors if name not in self._concat]
        widths = {"binary": features.num_binary, **features.vectors}
        width_first = features.num_continuous + sum(widths[name] for name in self._concat)
        self.width = width_first + sum(features.vectors[name] for name in self._vectors)
        double = config.double_norm_log_config or DoubleNormLogConfig(
            batch_norm_config=None, layer_norm_config=None
        )
        self.batch_norm = (
            InputBatchNorm(double.batch_norm_config, features.num_continuous)
            if double.batch_norm_config is not None
            else None
        )
        norm = double.layer_norm_config
        self.layer_norm = LayerNorm(norm, width_first) if norm and width_first else None
        self.vector_norms = nn.ModuleList(
            LayerNorm(norm, features.vectors[name]) for name in self._vectors if norm
        )
        if config.z_score_log_config is not None:
            mean, std = _read_statistics(config.z_score_log_config, features.num_continuous)
            self.register_buffer("z_mean", mean)
            self.register_buffer("z_std", std)

    def statistics(self, batch: RankingBatch) -> InputStatistics | None:
        """What `forward` needs in training, of a whole update; None where there is no batch
        norm.
        """
        if self.batch_norm is None or not self.training:
            return None
        with torch.no_grad():
            return self.batch_norm.statistics(signed_log(batch.continuous))

    def forward(self, batch: RankingBatch, statistics: InputStatistics | None) -> list[Tensor]:
        """Parts of the input, to be concatenated."""
        if statistics is None:
            statistics = self.statistics(batch)
        parts = [self._continuous(batch.continuous, statistics)]
        parts += [
            finite(batch.binary if name == "binary" else batch.vectors[name])
            for name in self._concat
        ]
        first = torch.cat(parts, dim=1)
        if self.layer_norm is not None:
            first = self.layer_norm(first)
        vectors = [finite(batch.vectors[name]) for name in self._vectors]
        if self.vector_norms:
            vectors = [norm(v) for norm, v in zip(self.vector_norms, vectors, strict=True)]
        return [first, *vectors]

    def _continuous(self, x: Tensor, statistics: InputStatistics | None) -> Tensor:
        config = self._config
        if config.clip_log1p_abs_config is not None:
            limit = config.clip_log1p_abs_config.clip_magnitude
            return signed_log(finite(x).clamp(-limit, limit))
        x = signed_log(x)
        if config.z_score_log_config is not None:
            x = (x - self.z_mean) / self.z_std
            clip = config.z_score_log_config.clip_magnitude
            return x if clip is None else x.clamp(-clip, clip)
        if config.double_norm_log_config is not None:
            if self.batch_norm is not None:
                x = self.batch_norm(x, statistics)
            clip = config.double_norm_log_config.clip_magnitude
            return x.clamp(-clip, clip)
        return x


def _concatenated(config: FeaturizationConfig, features: Features) -> list[str]:
    known = ["binary", *features.vectors]
    for name in config.feature_names_to_concat:
        if name not in known:
            raise ConfigError(
                f"model.featurization_config.feature_names_to_concat: {name!r} is neither binary "
                f"nor a vector of the data; there are {', '.join(known)}"
            )
    return list(dict.fromkeys(config.feature_names_to_concat))


def _read_statistics(config: ZScoreLogConfig, width: int) -> tuple[Tensor, Tensor]:
    """(mean, std), each (C,); a std of 0, of a constant column, counts as 1. Without a path: any,
    for they will be loaded.
    """
    if not config.statistics_path:
        return torch.zeros(width), torch.ones(width)
    where = (
        f"model.featurization_config.z_score_log_config.statistics_path {config.statistics_path}"
    )
    try:
        tree = json.loads(Path(config.statistics_path).read_text())
        mean, std = (
            torch.tensor(tree[key], dtype=torch.float32, device="cpu") for key in ("mean", "std")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{where}: cannot be read as {{"mean": [C], "std": [C]}}: {error!r}'
        ) from error
    if mean.shape != (width,) or std.shape != (width,):
        raise ConfigError(
            f"{where}: {len(mean)} means and {len(std)} deviations for {width} continuous features"
        )
    if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
        raise ConfigError(f"{where}: a mean or a deviation is not finite, or a deviation below 0")
    return mean, torch.where(std > 0, std, 1.0)
