"""The size of a model, worked out without its memory: what `main.py --describe` prints."""

from typing import Any

import torch
from torch import nn

from projects.home.recap.data.batch import Features
from projects.home.recap.model import embeddings
from projects.home.recap.model.config import ModelConfig
from projects.home.recap.model.dlrm import Dlrm
from projects.home.recap.model.model import RankingModel


def describe(config: ModelConfig, features: Features) -> dict[str, Any]:
    """Input width, parameters (by part too), tasks, and floating-point operations an example.

    Operations are those of matrix products: two a weight forward, six in training (one product
    forward, two backward).
    """
    with torch.device("meta"):
        model = RankingModel(config, features)
    products = num_products(model)
    parts = {
        "inputs": sum(_size(m) for m in (model.featurization, model.position, model.small) if m),
        "backbone": _size(model.sharing),
        "towers": _size(model.towers),
        "large_embeddings": sum(
            t.num_rows * t.dim for t in embeddings.large_tables(config, features)
        ),
    }
    return {
        "input_width": model.input_width,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "tasks": list(model.tasks),
        "flops_per_example": 6 * products,
        "flops_forward": 2 * products,
    }


def num_products(model: nn.Module) -> int:
    """Multiplications of the matrix products for one example, forward."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return weights + sum(m.num_product_weights for m in model.modules() if isinstance(m, Dlrm))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
