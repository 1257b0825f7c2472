"""Dense optimizers against those of torch.optim, to the last bit."""

import pytest
import torch

from tml.dense_optimizer import SGD, Adagrad, Adam, DenseOptimizer

Parameters = list[torch.nn.Parameter]


def build(
    kind: str, parameters: Parameters, reference: Parameters, weight_decay: float
) -> tuple[DenseOptimizer, torch.optim.Optimizer]:
    """Ours for `parameters` and torch's for `reference`."""
    rest = {"lr": 0.3, "weight_decay": weight_decay}
    if kind == "sgd":
        return SGD(parameters, **rest), torch.optim.SGD(reference, **rest)
    if kind == "adagrad":
        return (
            Adagrad(parameters, eps=1e-8, **rest),
            torch.optim.Adagrad(reference, eps=1e-8, **rest),
        )
    betas = (0.8, 0.95)
    return (
        Adam(parameters, betas=betas, eps=1e-7, **rest),
        torch.optim.Adam(reference, betas=betas, eps=1e-7, **rest),
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_updates_are_those_of_torch(kind: str, weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 4), (7,), (2,)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    reference = [torch.nn.Parameter(start.clone()) for start in starts]
    ours, theirs = build(kind, parameters, reference, weight_decay)
    for step in range(6):
        rate = 0.3 / (step + 1)
        ours.learning_rate = rate
        theirs.param_groups[0]["lr"] = rate
        for own, other in zip(parameters[:2], reference[:2], strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        ours.step()
        theirs.step()
        for own, other in zip(parameters, reference, strict=True):
            assert own.data.equal(other.data)
    assert parameters[2].data.equal(starts[2]), "a parameter without a gradient was changed"


def test_gradients_are_let_go_of() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(2)
    optimizer.zero_grad()
    assert parameter.grad is None
    optimizer.step()
    assert parameter.data.tolist() == [1.0, 1.0]
