"""The optimizer of the ranker: one Adam; a learning rate for the backbone, one for each tower."""

from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from projects.home.recap.model.model import RankingModel
from tml.config import Config
from tml.optimizers import LearningRate

BACKBONE = "backbone"
"""Name of the group of everything that is no tower, in records of learning rates."""


class MultiTaskLearningRates(Config):
    """A schedule for the backbone and one for each task's tower."""

    backbone_learning_rate: LearningRate
    """Everything below the towers, embeddings held whole included."""
    tower_learning_rates: dict[str, LearningRate]
    """Task → schedule; every task of the model is named."""


class AdamConfig(Config):
    """Adam (Kingma and Ba 2014); its learning rates are given beside it."""

    beta_1: float = Field(default=0.95, ge=0, lt=1)
    beta_2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-7
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient."""


class RecapOptimizerConfig(Config):
    """Adam and its learning rates."""

    exactly_one_of: ClassVar = (("multi_task_learning_rates", "single_task_learning_rate"),)

    adam: AdamConfig = AdamConfig()
    multi_task_learning_rates: MultiTaskLearningRates | None = None
    single_task_learning_rate: LearningRate | None = None
    """One schedule for everything."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest norm of the gradient of all dense parameters together; a longer one is scaled down.
    Unset: not clipped.
    """

    def learning_rates_at(self, tasks: tuple[str, ...], step: int) -> dict[str, float]:
        """Group → learning rate of the update number `step`, counted from 0."""
        if (single := self.single_task_learning_rate) is not None:
            return dict.fromkeys((BACKBONE, *tasks), single.at(step))
        several = self.multi_task_learning_rates
        assert several is not None
        rates = {BACKBONE: several.backbone_learning_rate.at(step)}
        return rates | {task: several.tower_learning_rates[task].at(step) for task in tasks}


class RecapOptimizer:
    """Adam over the groups of a model; its state is made at once, so that a checkpoint can be
    loaded into it.
    """

    def __init__(self, config: RecapOptimizerConfig, model: RankingModel) -> None:
        self._config = config
        self._tasks = model.tasks
        groups = {BACKBONE: model.backbone_parameters()}
        groups |= {task: model.tower_parameters(task) for task in model.tasks}
        self._groups = {name: list(parameters) for name, parameters in groups.items() if parameters}
        adam = config.adam
        self._adam = torch.optim.Adam(
            [{"params": parameters} for parameters in self._groups.values()],
            lr=0.0,
            betas=(adam.beta_1, adam.beta_2),
            eps=adam.epsilon,
            weight_decay=adam.weight_decay,
            fused=True,
        )
        self._parameters = dict(model.named_parameters())
        self._dense = [p for parameters in self._groups.values() for p in parameters]
        for parameter in self._dense:
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, step: int) -> dict[str, float]:
        """Update number `step`, from 0, with the gradients that are there; clears them. Returns
        the learning rates.
        """
        rates = self._config.learning_rates_at(self._tasks, step)
        for name, group in zip(self._groups, self._adam.param_groups, strict=True):
            group["lr"] = rates[name]
        if self._config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._dense, self._config.clip_grad_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return rates

    def state(self) -> dict[str, Tensor]:
        """Saved name → tensor, sharing memory with the optimizer."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return {
            f"optimizer.{names[id(parameter)]}.{key}": value
            for parameter in self._dense
            for key, value in self._adam.state[parameter].items()
        }
