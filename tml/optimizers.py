"""Optimizer and learning-rate configs, and the schedule as a pure function of the step.

Which optimizer updates which parameter is decided where the parameter lives: embedding tables by
their engine (`tml.embeddings`, fused into the backward pass), dense parameters by
`build_dense_optimizer` (`tml.dense_optimizer`).
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from tml import dense_optimizer
from tml.config import Config, ConfigError
from tml.dense_optimizer import DenseOptimizer

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=Config)


class PiecewiseConstant(Config):
    """Values between boundaries: values[i] holds before boundaries[i], the last one afterwards."""

    learning_rate_boundaries: list[NonNegativeInt]
    """Steps at which the next value starts, increasing."""
    learning_rate_values: list[NonNegativeFloat]
    """One more than there are boundaries."""

    @validator(mode="after")
    def _check(self) -> Self:
        boundaries, values = self.learning_rate_boundaries, self.learning_rate_values
        if len(values) != len(boundaries) + 1:
            raise ValueError(
                f"learning_rate_values needs {len(boundaries) + 1} values for {len(boundaries)} "
                f"boundaries, has {len(values)}"
            )
        if any(a >= b for a, b in pairwise(boundaries)):
            raise ValueError(f"learning_rate_boundaries must increase: {boundaries}")
        return self


class LinearRampToConstant(Config):
    """From 0, linearly over num_ramp_steps, then constant."""

    learning_rate: NonNegativeFloat
    """Value after the ramp."""
    num_ramp_steps: PositiveInt
    """Length of the ramp in steps."""


class LinearRampToCosine(Config):
    """From 0, linearly over num_ramp_steps, then a half cosine down to final_learning_rate at
    final_num_steps.
    """

    learning_rate: NonNegativeFloat
    """Value at the end of the ramp."""
    final_learning_rate: NonNegativeFloat
    """Value from final_num_steps on."""
    num_ramp_steps: PositiveInt
    """Length of the ramp in steps. Where final_num_steps is unset and training has no more steps
    than this: a tenth of them, and a warning.
    """
    final_num_steps: PositiveInt | None = None
    """Step at which the cosine ends; more than num_ramp_steps. Unset: the last step of training,
    which must be known: num_epochs of files, or num_train_steps.
    """

    @validator(mode="after")
    def _check(self) -> Self:
        if self.final_num_steps is not None and self.final_num_steps <= self.num_ramp_steps:
            raise ValueError(
                f"final_num_steps {self.final_num_steps} must be more than num_ramp_steps "
                f"{self.num_ramp_steps}"
            )
        return self


class LearningRate(Config):
    """A schedule: exactly one of the four kinds."""

    exactly_one_of: ClassVar = (
        ("constant", "piecewise_constant", "linear_ramp_to_constant", "linear_ramp_to_cosine"),
    )

    constant: NonNegativeFloat | None = None
    """The same value at every step."""
    piecewise_constant: PiecewiseConstant | None = None
    linear_ramp_to_constant: LinearRampToConstant | None = None
    linear_ramp_to_cosine: LinearRampToCosine | None = None

    def at(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from 0."""
        if self.constant is not None:
            return self.constant
        if (piecewise := self.piecewise_constant) is not None:
            passed = sum(step >= boundary for boundary in piecewise.learning_rate_boundaries)
            return piecewise.learning_rate_values[passed]
        if (ramp := self.linear_ramp_to_constant) is not None:
            return ramp.learning_rate * min(1.0, step / ramp.num_ramp_steps)
        cosine = self.linear_ramp_to_cosine
        assert cosine is not None
        if step < cosine.num_ramp_steps:
            return cosine.learning_rate * step / cosine.num_ramp_steps
        assert cosine.final_num_steps is not None, "end_schedules comes first"
        span = cosine.final_num_steps - cosine.num_ramp_steps
        progress = min(1.0, (step - cosine.num_ramp_steps) / span)
        weight = 0.5 * (1.0 + math.cos(math.pi * progress))
        return (
            cosine.final_learning_rate
            + (cosine.learning_rate - cosine.final_learning_rate) * weight
        )


class Sgd(Config):
    """Plain stochastic gradient descent: w ← w − lr·g."""

    lr: NonNegativeFloat = 0.01
    """Learning rate, where no `learning_rate` schedule is given."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient."""


class Adagrad(Config):
    """Adagrad (Duchi et al. 2011): one accumulator a weight. Row-wise: one a row, of the mean
    squared gradient.
    """

    lr: NonNegativeFloat = 0.01
    """Learning rate, where no `learning_rate` schedule is given."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the accumulator."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient."""


class Adam(Config):
    """Adam (Kingma and Ba 2014)."""

    lr: NonNegativeFloat = 0.001
    """Learning rate, where no `learning_rate` schedule is given."""
    beta_1: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class OptimizerConfig(Config):
    """One optimizer and its learning rate."""

    exactly_one_of: ClassVar = (("sgd", "adagrad", "rowwise_adagrad", "adam"),)

    sgd: Sgd | None = None
    adagrad: Adagrad | None = None
    rowwise_adagrad: Adagrad | None = None
    adam: Adam | None = None
    learning_rate: LearningRate | None = None
    """Schedule; it takes the place of the optimizer's own `lr`. Unset: `lr`, constant."""

    @property
    def kind(self) -> str:
        """Name of the one that is set."""
        return next(name for name in self.exactly_one_of[0] if getattr(self, name) is not None)

    @property
    def settings(self) -> Sgd | Adagrad | Adam:
        """Settings of the one that is set."""
        settings = getattr(self, self.kind)
        assert isinstance(settings, Sgd | Adagrad | Adam)
        return settings

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from 0."""
        return self.learning_rate.at(step) if self.learning_rate else self.settings.lr


def build_dense_optimizer(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]
) -> DenseOptimizer:
    """The optimizer of dense parameters; row-wise Adagrad exists for embedding tables only."""
    lr = config.learning_rate_at(0)
    settings = config.settings
    if isinstance(settings, Sgd):
        return dense_optimizer.SGD(parameters, lr=lr, weight_decay=settings.weight_decay)
    if isinstance(settings, Adam):
        betas = (settings.beta_1, settings.beta_2)
        return dense_optimizer.Adam(
            parameters,
            lr=lr,
            betas=betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
    if config.rowwise_adagrad is not None:
        raise ValueError(
            "rowwise_adagrad is for embedding tables; use adagrad for dense parameters"
        )
    return dense_optimizer.Adagrad(
        parameters, lr=lr, eps=settings.eps, weight_decay=settings.weight_decay
    )


def end_schedules(config: ConfigT, total_steps: int | None, where: str = "") -> ConfigT:
    """A copy of a config in which every cosine without an end of its own ends with training. Where
    training has no more steps than such a ramp, the ramp is a tenth of them, said in one warning.

    total_steps: updates of the whole run; None where they are not known. where: path of the config,
    for messages. Raises ConfigError.
    """
    shortened: dict[str, int] = {}
    ended: ConfigT = _end(where, config, total_steps, shortened)
    if shortened:
        assert total_steps is not None
        listed = ", ".join(f"{path} (was {steps:,})" for path, steps in shortened.items())
        logger.warning(
            "training has %s steps: the ramp of the learning rate is shortened to %s, a tenth: %s",
            f"{total_steps:,}",
            f"{_short_ramp(total_steps):,}",
            listed,
        )
    return ended


def _end(path: str, value: Any, total_steps: int | None, shortened: dict[str, int]) -> Any:
    """`shortened` gains path → num_ramp_steps as it was."""

    def below(key: object, one: Any) -> Any:
        return _end(f"{path}.{key}" if path else str(key), one, total_steps, shortened)

    if isinstance(value, LinearRampToCosine) and value.final_num_steps is None:
        if total_steps is None:
            raise ConfigError(
                f"{path}.final_num_steps: the number of training steps is not known before the "
                "data ends; set it, or training.num_train_steps"
            )
        ramp = value.num_ramp_steps
        if total_steps <= ramp:
            shortened[f"{path}.num_ramp_steps"] = ramp
            ramp = _short_ramp(total_steps)
        # Of a single step the ramp is all: the cosine keeps a length, which nothing reaches.
        end = max(total_steps, ramp + 1)
        return value.model_copy(update={"num_ramp_steps": ramp, "final_num_steps": end})
    if isinstance(value, Config):
        return value.model_copy(update={name: below(name, one) for name, one in value})
    if isinstance(value, list):
        return [below(number, one) for number, one in enumerate(value)]
    if isinstance(value, dict):
        return {key: below(key, one) for key, one in value.items()}
    return value


def _short_ramp(total_steps: int) -> int:
    return max(1, total_steps // 10)


def dense_state(
    optimizer: DenseOptimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Saved name → state tensor of the named parameters: `<name>_accumulator` of Adagrad,
    `<name>_m`, `_v` and `_step` of Adam. A checkpoint can be read into them.
    """
    return {
        f"{name}_{suffix}": tensor
        for name, parameter in parameters.items()
        for suffix, tensor in optimizer.state_of(parameter).items()
    }


def is_optimizer_state(name: str) -> bool:
    """Whether a saved name is that of an optimizer's state, of a table or of dense parameters."""
    return name.endswith(("accumulator", "_m", "_v", "_step")) or bool(
        re.fullmatch(r"tables\..*\.(m|v|step)", name)
    )


def set_learning_rate(optimizer: DenseOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter."""
    optimizer.learning_rate = lr
