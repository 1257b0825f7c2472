"""The networks under the towers against their papers' equations, written out in numpy: MaskNet,
DCN-v2, DLRM, MLP.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from projects.home.recap.model.config import DcnConfig, DlrmConfig, MaskNetConfig, MlpConfig
from projects.home.recap.model.dcn import Dcn
from projects.home.recap.model.dlrm import Dlrm
from projects.home.recap.model.layers import Mlp
from projects.home.recap.model.mask_net import MaskNet
from tml.config import ConfigError

Doubles = NDArray[np.float64]
B, WIDTH = 5, 6


def doubles(tensor: Any) -> Doubles:
    return np.asarray(tensor.detach().double().numpy())


def affine(x: Doubles, layer: Any) -> Doubles:
    return np.asarray(x @ doubles(layer.weight).T + doubles(layer.bias))


def layer_norm(x: Doubles, epsilon: float = 1e-5) -> Doubles:
    centred = x - x.mean(1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(1, keepdims=True) + epsilon))


def shaken(module: nn.Module) -> nn.Module:
    """Biases that are not 0, so that leaving one out shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


def rows() -> Tensor:
    return torch.randn(B, WIDTH)


def mask_net(parallel: bool, sizes: list[int], mlp: list[int] | None, **block: Any) -> MaskNet:
    torch.manual_seed(0)
    blocks = [{"output_size": 4, "aggregation_size": size, **block} for size in sizes]
    tree = {
        "mask_blocks": blocks,
        "use_parallel": parallel,
        "mlp": mlp and {"layer_sizes": mlp, "final_layer_activation": True},
    }
    return MaskNet(MaskNetConfig.model_validate(tree), WIDTH)


def by_equations(net: MaskNet, x: Doubles, sizes: list[int], parallel: bool) -> Doubles:
    """MaskBlocks literally: each with its own first layer, cut out of the joint one."""
    outputs: list[Doubles] = []
    start = 0
    for block, size in zip(net.blocks, sizes, strict=True):
        joint: Any = net.mask_hidden
        weight = doubles(joint.weight)[start : start + size]
        bias = doubles(joint.bias)[start : start + size]
        start += size
        mask = affine(np.maximum(x @ weight.T + bias, 0), block.mask)
        seen = x if parallel or not outputs else outputs[-1]
        if block.input_norm is not None:
            norm: Any = block.input_norm
            seen = layer_norm(seen) * doubles(norm.weight) + doubles(norm.bias)
        norm = block.output_norm
        out = layer_norm(affine(seen * mask, block.output))
        outputs.append(out * doubles(norm.weight) + doubles(norm.bias))
    return np.concatenate(outputs, axis=1) if parallel else outputs[-1]


@pytest.mark.parametrize("mlp", [None, [3], [5, 3]])
@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
def test_mask_net_is_what_the_equations_say(
    parallel: bool, input_norm: bool, mlp: list[int] | None
) -> None:
    sizes = [3, 7, 2]
    net = mask_net(parallel, sizes, mlp, input_layer_norm=input_norm)
    shaken(net)
    x = rows()
    expected = by_equations(net, doubles(x), sizes, parallel)
    for layer in net.mlp.layers if net.mlp is not None else []:
        expected = np.maximum(affine(expected, layer), 0)
    assert net(x).shape == (B, net.width_out)
    np.testing.assert_allclose(doubles(net(x)), expected, rtol=1e-4, atol=1e-5)


def test_each_block_starts_xavier_uniform_of_its_own_shape_with_zero_biases() -> None:
    torch.manual_seed(0)
    blocks = [
        {"output_size": 4, "aggregation_size": 40},
        {"output_size": 4, "aggregation_size": 400},
    ]
    net = MaskNet(MaskNetConfig.model_validate({"mask_blocks": blocks}), 60)
    for weight, size in zip(net.mask_hidden.weight.split([40, 400]), (40, 400), strict=True):
        bound = (6 / (60 + size)) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    assert all(not bias.any() for bias in biases)


def test_a_reduction_factor_gives_the_width_of_the_masks_hidden_layer() -> None:
    block = {"output_size": 4, "reduction_factor": 0.5}
    net = MaskNet(MaskNetConfig.model_validate({"mask_blocks": [block, block]}), WIDTH)
    assert net.mask_hidden.out_features == 2 * 3


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("parallel", [True, False])
def test_dcn_is_what_the_equations_say(parallel: bool, rank: int | None) -> None:
    torch.manual_seed(0)
    mlp = {"layer_sizes": [4], "final_layer_activation": True}
    tree = {
        "poly_degree": 3,
        "projection_dim": rank,
        "parallel_mlp": mlp,
        "use_parallel": parallel,
        "output_mlp": {"layer_sizes": [2]},
    }
    net = Dcn(DcnConfig.model_validate(tree), WIDTH)
    shaken(net)
    x = rows()
    first = crossed = doubles(x)
    layer: Any
    for layer in net.cross:
        inner = crossed if layer.down is None else crossed @ doubles(layer.down.weight).T
        crossed = first * affine(inner, layer.up) + crossed
    assert net.deep is not None
    assert net.output is not None
    deep = np.maximum(affine(first if parallel else crossed, net.deep.layers[0]), 0)
    together = np.concatenate([crossed, deep], axis=1) if parallel else deep
    expected = affine(together, net.output.layers[0])
    np.testing.assert_allclose(doubles(net(x)), expected, rtol=1e-4, atol=1e-5)
    assert net.width_out == 2


def test_dlrm_multiplies_all_pairs_of_embeddings_and_the_bottom_output() -> None:
    torch.manual_seed(0)
    tree = {"bottom_mlp": {"layer_sizes": [5, 3]}, "top_mlp": {"layer_sizes": [2]}}
    net = Dlrm(DlrmConfig.model_validate(tree), WIDTH + 6, [3, 3])
    shaken(net)
    x = torch.randn(B, WIDTH + 6)
    dense = doubles(x)[:, :WIDTH]
    hidden = np.maximum(affine(dense, net.bottom.layers[0]), 0)
    bottom = affine(hidden, net.bottom.layers[1])
    one, two = doubles(x)[:, WIDTH : WIDTH + 3], doubles(x)[:, WIDTH + 3 :]
    pairs = [(one * bottom).sum(1), (two * bottom).sum(1), (two * one).sum(1)]
    expected = affine(np.concatenate([bottom, np.stack(pairs, 1)], 1), net.top.layers[0])
    np.testing.assert_allclose(doubles(net(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "width", "message"),
    [([], 6, "no embeddings"), ([4, 3], 13, "need one width"), ([3, 3], 6, "no inputs")],
)
def test_dlrm_refuses_what_it_cannot_multiply(dims: list[int], width: int, message: str) -> None:
    tree = {"bottom_mlp": {"layer_sizes": [3]}, "top_mlp": {"layer_sizes": [2]}}
    with pytest.raises(ConfigError, match=message):
        Dlrm(DlrmConfig.model_validate(tree), width, dims)


def test_an_mlp_normalises_and_activates_all_layers_but_the_last() -> None:
    torch.manual_seed(0)
    tree = {"layer_sizes": [4, 3, 2], "batch_norm": {"affine": False}}
    net = Mlp(MlpConfig.model_validate(tree), WIDTH)
    shaken(net)
    x = rows()
    out = doubles(x)
    for layer in list(net.layers)[:2]:
        out = affine(out, layer)
        out = np.maximum((out - out.mean(0)) / np.sqrt(out.var(0) + 1e-5), 0)
    np.testing.assert_allclose(doubles(net(x)), affine(out, net.layers[2]), rtol=1e-4, atol=1e-5)
    final = Mlp(MlpConfig.model_validate({**tree, "final_layer_activation": True}), WIDTH)
    assert len(final.norms) == 3
    assert (final(x) >= 0).all()


def test_dropout_is_for_training() -> None:
    torch.manual_seed(0)
    tree = {"layer_sizes": [400], "final_layer_activation": True, "dropout": {"rate": 0.25}}
    net = Mlp(MlpConfig.model_validate(tree), WIDTH)
    with torch.no_grad():
        net.first_layer.bias.fill_(10.0)
    assert (net(rows()) == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert (net.eval()(rows()) > 0).all()
