"""Several processes: TorchRec's sharded tables make the updates that the formulas say, also with a
process without edges.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from projects.twhin.model import TwhinModel, table_specs
from tests import programs
from tests.integration import twhin_step
from tml.embeddings import NormalRows, RowSource, Tables


class DenseTables(Tables):
    """The reference: plain parameters, gradients by autograd, updated by nobody."""

    def __init__(self, specs: list[Any]) -> None:
        super().__init__(specs)
        self.weights = {
            s.name: NormalRows(4, i, s)(0, s.num_rows).requires_grad_() for i, s in enumerate(specs)
        }

    def forward(self, ids: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.weights[name][ids[name]] for name in self.weights}

    def set_learning_rates(self, step: int) -> dict[str, float]:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def fill(self, name: str, rows: RowSource) -> None:
        raise NotImplementedError


def reference(optimizer: str, world_size: int) -> dict[str, Tensor]:
    """Two steps on all processes' batches together, by the formulas of SGD, Adagrad and row-wise
    Adagrad.
    """
    config = twhin_step.model_config(optimizer)
    tables = DenseTables(table_specs(config))
    model = TwhinModel(config, tables)
    torch.nn.init.ones_(model.translations)
    total = sum(twhin_step.EDGES[:world_size])
    accumulators: dict[str, Tensor] = {}
    for _ in range(2):
        model.zero_grad()
        batches = [twhin_step.make_batch(config, rank, total) for rank in range(world_size)]
        torch.stack([model(batch, twhin_step.DATA) for batch in batches]).sum().div(
            total
        ).backward()
        for spec in tables.specs:
            weight, lr = tables.weights[spec.name], spec.optimizer.settings.lr
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            with torch.no_grad():
                if optimizer == "sgd":
                    weight -= lr * gradient
                    continue
                square = gradient**2
                if optimizer == "rowwise_adagrad":
                    square = square.mean(dim=1, keepdim=True)
                accumulators[spec.name] = accumulators.get(spec.name, 0.0) + square
                weight -= lr * gradient / (accumulators[spec.name].sqrt() + 1e-8)
    found = {f"tables.{n}.weight": w.detach() for n, w in tables.weights.items()}
    found |= {f"tables.{n}.accumulator": a for n, a in accumulators.items()}
    assert model.translations.grad is not None
    return found | {"t_gradient": model.translations.grad}


def run_step(folder: Path, optimizer: str, world_size: int) -> dict[str, Tensor]:
    output = folder / f"{optimizer}-{world_size}.pt"
    launch = programs.torchrun(world_size, always=True)
    done = programs.run(*launch, twhin_step.__file__, str(output), optimizer)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = torch.load(output)
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("steps")


@pytest.mark.parametrize(
    ("optimizer", "world_size"),
    [
        ("rowwise_adagrad", 1),
        ("rowwise_adagrad", 2),
        ("rowwise_adagrad", 3),
        ("sgd", 2),
        ("adagrad", 2),
    ],
)
def test_processes_together_make_the_update_of_the_formulas(
    folder: Path, optimizer: str, world_size: int
) -> None:
    expected = reference(optimizer, world_size)
    found = run_step(folder, optimizer, world_size)
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        wanted = expected[name].reshape(tensor.shape)
        torch.testing.assert_close(
            tensor, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
