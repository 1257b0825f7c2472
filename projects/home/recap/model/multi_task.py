"""What lies between the inputs and the towers: a network, and how tasks share it.

share_all, share_partial, share_none; multi-gate mixture of experts (MMoE, Ma et al. 2018);
progressive layered extraction (PLE, Tang et al. 2020).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from projects.home.recap.model.config import (
    MlpConfig,
    MmoeConfig,
    ModelConfig,
    PleConfig,
    TaskModel,
)
from projects.home.recap.model.dcn import Dcn
from projects.home.recap.model.dlrm import Dlrm
from projects.home.recap.model.layers import Mlp, linear
from projects.home.recap.model.mask_net import MaskNet

Network = Mlp | Dcn | Dlrm | MaskNet


def build_network(config: TaskModel, width_in: int, embedding_dims: Sequence[int] = ()) -> Network:
    """The network that a TaskModel names. embedding_dims: widths of the embeddings, the last
    columns of the input; a DLRM needs them.
    """
    if config.mlp_config is not None:
        return Mlp(config.mlp_config, width_in)
    if config.dcn_config is not None:
        return Dcn(config.dcn_config, width_in)
    if config.mask_net_config is not None:
        return MaskNet(config.mask_net_config, width_in)
    assert config.dlrm_config is not None
    return Dlrm(config.dlrm_config, width_in, embedding_dims)


class Sharing(nn.Module):
    """(B, width_in) → for each task (B, width_out): what its tower sees."""

    def __init__(self, config: ModelConfig, width_in: int, embedding_dims: Sequence[int]) -> None:
        super().__init__()
        num_tasks = len(config.tasks)
        self._partial = config.multi_task_type == "share_partial" and config.backbone is not None
        self.backbone: Network | None = None
        self.own = nn.ModuleList()
        self.experts: Mmoe | Ple | None = None
        width = width_in
        if config.backbone is not None and config.multi_task_type == "share_none":
            networks = [
                build_network(config.backbone, width_in, embedding_dims) for _ in config.tasks
            ]
            self.own = nn.ModuleList(networks)
            width = networks[0].width_out
        elif config.backbone is not None:
            self.backbone = build_network(config.backbone, width_in, embedding_dims)
            width = self.backbone.width_out + (width_in if self._partial else 0)
        if config.mmoe_config is not None:
            self.experts = Mmoe(config.mmoe_config, width, num_tasks)
        elif config.ple_config is not None:
            self.experts = Ple(config.ple_config, width, num_tasks)
        self.width_out = self.experts.width_out if self.experts is not None else width
        self._num_tasks = num_tasks

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        if self.own:
            return [network(x) for network in self.own]
        shared = x if self.backbone is None else self.backbone(x)
        if self._partial:
            shared = torch.cat([shared, x.to(shared.dtype)], dim=1)
        if self.experts is not None:
            found: list[Tensor] = self.experts(shared)
            return found
        return [shared] * self._num_tasks


class Experts(nn.Module):
    """(B, width_in) → (B, E, width_out): expert networks side by side."""

    def __init__(self, config: MlpConfig, width_in: int, num_experts: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(Mlp(config, width_in) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.stack([network(x) for network in self.networks], dim=1)


class Gate(nn.Module):
    """(x (B, width_in), experts (B, E, D)) → (B, D): their mean, weighted by softmax(W x)."""

    def __init__(self, width_in: int, num_experts: int) -> None:
        super().__init__()
        self.linear = linear(width_in, num_experts, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """(B, E), a row sums to 1."""
        return torch.softmax(self.linear(x), dim=1)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """See the class."""
        weights = self.weights(x).to(experts.dtype)
        return torch.bmm(weights.unsqueeze(1), experts).squeeze(1)


class Mmoe(nn.Module):
    """Experts of all tasks, and a gate a task (equations 6 and 7): (B, width_in) → a task (B,
    width_out).
    """

    def __init__(self, config: MmoeConfig, width_in: int, num_tasks: int) -> None:
        super().__init__()
        self.experts = Experts(config.expert, width_in, config.num_experts)
        self.gates = nn.ModuleList(Gate(width_in, config.num_experts) for _ in range(num_tasks))
        self.width_out = config.expert.layer_sizes[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        experts = self.experts(x)
        return [gate(x, experts) for gate in self.gates]


class PleLevel(nn.Module):
    """One level: (shared input, a task's input each) → (shared output or None, a task's output
    each).

    A task's gate weighs its own experts and the shared ones; the shared gate, which the last level
    does not have, all experts.
    """

    def __init__(self, config: PleConfig, width_in: int, num_tasks: int, *, is_last: bool) -> None:
        super().__init__()
        own, shared = config.num_task_experts, config.num_shared_experts
        self.shared = Experts(config.expert, width_in, shared)
        self.own = nn.ModuleList(Experts(config.expert, width_in, own) for _ in range(num_tasks))
        self.gates = nn.ModuleList(Gate(width_in, own + shared) for _ in range(num_tasks))
        self.shared_gate = None if is_last else Gate(width_in, own * num_tasks + shared)

    def forward(self, shared: Tensor, tasks: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """See the class."""
        of_all = self.shared(shared)
        of_tasks = [experts(x) for experts, x in zip(self.own, tasks, strict=True)]
        outputs = [
            gate(x, torch.cat([own, of_all], dim=1))
            for gate, x, own in zip(self.gates, tasks, of_tasks, strict=True)
        ]
        if self.shared_gate is None:
            return None, outputs
        return self.shared_gate(shared, torch.cat([*of_tasks, of_all], dim=1)), outputs


class Ple(nn.Module):
    """(B, width_in) → a task (B, width_out), through `num_levels` levels."""

    def __init__(self, config: PleConfig, width_in: int, num_tasks: int) -> None:
        super().__init__()
        self.width_out = config.expert.layer_sizes[-1]
        widths = [width_in, *[self.width_out] * config.num_levels]
        self.levels = nn.ModuleList(
            PleLevel(config, width, num_tasks, is_last=number == config.num_levels - 1)
            for number, (width, _) in enumerate(pairwise(widths))
        )
        self._num_tasks = num_tasks

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        shared: Tensor | None = x
        tasks = [x] * self._num_tasks
        for level in self.levels:
            shared, tasks = level(shared, tasks)
        return tasks
