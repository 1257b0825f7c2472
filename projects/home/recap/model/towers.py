"""The towers: a network a task, over what the tasks share, to a logit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.home.recap.model.config import TaskModel
from projects.home.recap.model.layers import Mlp
from projects.home.recap.model.multi_task import build_network
from tml.config import ConfigError


class Tower(nn.Module):
    """(B, width_in) → (B,): a task's network, and its affine map."""

    def __init__(self, task: str, config: TaskModel, width_in: int) -> None:
        super().__init__()
        self.network = build_network(config, width_in)
        if self.network.width_out != 1:
            raise ConfigError(
                f"model.tasks.{task}: the last width of a tower must be 1, not "
                f"{self.network.width_out}"
            )
        self._affine = config.affine_map

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self._logit(self.network(x))

    def after_first(self, x: Tensor) -> Tensor:
        """What is left to do when the first layer of an MLP is done: x (B, its width)."""
        assert isinstance(self.network, Mlp)
        return self._logit(self.network.after_first(x))

    def _logit(self, x: Tensor) -> Tensor:
        logit = x.squeeze(1)
        if self._affine is not None:
            logit = logit.float() * self._affine.scale + self._affine.bias
        return logit


class Towers(nn.ModuleDict):
    """A task's input (B, width_in) each → (B, T) float32 logits.

    Where all towers are MLPs over the same input, their first layers are one matrix product: small
    ones reach two thirds of its rate. Each tower keeps its own parameters.
    """

    def __init__(self, tasks: Mapping[str, TaskModel], width_in: int) -> None:
        super().__init__({module_name(task): Tower(task, tasks[task], width_in) for task in tasks})
        networks = [tower.network for tower in self._towers()]
        self._joint = len(networks) > 1 and all(isinstance(network, Mlp) for network in networks)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """See the class."""
        towers = self._towers()
        if self._joint and all(x is inputs[0] for x in inputs):
            firsts = self._first_layers(inputs[0])
            pairs = zip(towers, firsts, strict=True)
            logits = [tower.after_first(first) for tower, first in pairs]
        else:
            logits = [tower(x) for tower, x in zip(towers, inputs, strict=True)]
        return torch.stack([logit.float() for logit in logits], dim=1)

    def of(self, task: str) -> Tower:
        """The tower of a task."""
        tower = self[module_name(task)]
        assert isinstance(tower, Tower)
        return tower

    def _towers(self) -> list[Tower]:
        return [tower for tower in self.values() if isinstance(tower, Tower)]

    def _first_layers(self, x: Tensor) -> list[Tensor]:
        layers = [t.network.first_layer for t in self._towers() if isinstance(t.network, Mlp)]
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        parts = F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=1)
        # Copies: what follows writes into them, and reads them many times.
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def module_name(task: str) -> str:
    """Name of a task as a module, which may hold no dot and not be a dictionary's method."""
    return "task_" + task.replace(".", "__")
