"""How tasks share a network, against small references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from projects.home.recap.model.config import MmoeConfig, ModelConfig, PleConfig
from projects.home.recap.model.multi_task import Gate, Mmoe, Ple, Sharing

B, WIDTH = 5, 6
EXPERT = {"layer_sizes": [4], "final_layer_activation": True}
TOWER = {"mlp_config": {"layer_sizes": [1]}}


def sharing(backbone: bool = True, **config: Any) -> Sharing:
    torch.manual_seed(0)
    tree = {
        "tasks": {"a": TOWER, "b": TOWER},
        "featurization_config": {"log1p_abs_config": {}},
        "backbone": {"mlp_config": {"layer_sizes": [3]}} if backbone else None,
        **config,
    }
    return Sharing(ModelConfig.model_validate(tree), WIDTH, ())


def test_share_all_gives_every_task_the_same_output() -> None:
    module, x = sharing(), torch.randn(B, WIDTH)
    one, two = module(x)
    assert one is two
    assert module.width_out == 3
    assert module.backbone is not None
    torch.testing.assert_close(one, module.backbone(x))


def test_share_partial_adds_the_inputs() -> None:
    module, x = sharing(multi_task_type="share_partial"), torch.randn(B, WIDTH)
    assert module.backbone is not None
    assert module.width_out == 3 + WIDTH
    torch.testing.assert_close(module(x)[1], torch.cat([module.backbone(x), x], dim=1))


def test_share_none_gives_every_task_a_backbone_of_its_own() -> None:
    module, x = sharing(multi_task_type="share_none"), torch.randn(B, WIDTH)
    one, two = module(x)
    torch.testing.assert_close(one, module.own[0](x))
    torch.testing.assert_close(two, module.own[1](x))
    assert not torch.equal(one, two)
    assert module.backbone is None


@pytest.mark.parametrize("kind", ["share_all", "share_none", "share_partial"])
def test_without_a_backbone_towers_see_the_inputs(kind: str) -> None:
    x = torch.randn(B, WIDTH)
    module = sharing(backbone=False, multi_task_type=kind)
    assert all(torch.equal(out, x) for out in module(x))
    assert module.width_out == WIDTH


def test_a_gates_weights_sum_to_1() -> None:
    weights = Gate(WIDTH, 3).weights(torch.randn(B, WIDTH))
    torch.testing.assert_close(weights.sum(1), torch.ones(B))
    assert (weights > 0).all()


def weighted(gate: Any, x: Tensor, outputs: list[Tensor]) -> Tensor:
    """Σ_e softmax(W x)_e · output_e, row by row."""
    rows = []
    for number in range(len(x)):
        scores = gate.linear.weight @ x[number]
        shares = scores.exp() / scores.exp().sum()
        rows.append(sum(shares[e] * out[number] for e, out in enumerate(outputs)))
    return torch.stack([torch.as_tensor(row) for row in rows])


def test_mmoe_mixes_experts_by_a_gate_a_task() -> None:
    torch.manual_seed(0)
    config = MmoeConfig.model_validate({"num_experts": 3, "expert": EXPERT})
    module, x = Mmoe(config, WIDTH, 2), torch.randn(B, WIDTH)
    outputs = [expert(x) for expert in module.experts.networks]
    for gate, found in zip(module.gates, module(x), strict=True):
        torch.testing.assert_close(found, weighted(gate, x, outputs))


def test_ple_gives_each_task_its_own_and_the_shared_experts_level_by_level() -> None:
    torch.manual_seed(0)
    tree = {"num_levels": 2, "num_shared_experts": 2, "num_task_experts": 1, "expert": EXPERT}
    module, x = Ple(PleConfig.model_validate(tree), WIDTH, 2), torch.randn(B, WIDTH)
    first: Any = module.levels[0]
    last: Any = module.levels[1]
    shared = [expert(x) for expert in first.shared.networks]
    own = [[expert(x) for expert in experts.networks] for experts in first.own]
    tasks = [weighted(first.gates[t], x, [*own[t], *shared]) for t in range(2)]
    common = weighted(first.shared_gate, x, [*own[0], *own[1], *shared])
    assert last.shared_gate is None
    shared = [expert(common) for expert in last.shared.networks]
    for t, found in enumerate(module(x)):
        own_t = [expert(tasks[t]) for expert in last.own[t].networks]
        torch.testing.assert_close(found, weighted(last.gates[t], tasks[t], [*own_t, *shared]))


@pytest.mark.parametrize(
    "config",
    [
        {"mmoe_config": {"expert": EXPERT}},
        {"ple_config": {"expert": EXPERT, "num_levels": 3}},
    ],
)
def test_every_parameter_of_the_experts_learns(config: dict[str, Any]) -> None:
    module = sharing(**config)
    outputs = module(torch.randn(64, WIDTH))
    assert module.width_out == 4
    torch.stack([(out * torch.randn(4)).sum() for out in outputs]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.dim() > 1)
