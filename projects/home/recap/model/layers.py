"""Layers that every network here is made of: linear maps, layer normalisation, MLPs.

Weights start Xavier-uniform (Glorot and Bengio 2010), biases at 0.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.home.recap.model.config import BatchNormConfig, LayerNormConfig, MlpConfig


def linear(width_in: int, width_out: int, *, bias: bool = True) -> nn.Linear:
    """x ↦ W x + b, W (width_out, width_in) Xavier-uniform, b = 0."""
    layer = nn.Linear(width_in, width_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def batch_norm(config: BatchNormConfig, width: int) -> nn.BatchNorm1d:
    """Batch normalisation of the rows that it is given: those of one micro-batch of one process."""
    return nn.BatchNorm1d(width, affine=config.affine, momentum=config.momentum)


class LayerNorm(nn.Module):
    """(B, n) → (B, n): each row minus its mean, by its standard deviation, scaled and shifted.

    With epsilon 0 a row whose values are all equal has no standard deviation: it gives the shift,
    and no gradient but the shift's. So does a row whose mean or deviation float32 cannot hold. All
    other rows are what epsilon 0 makes of them.
    """

    def __init__(self, config: LayerNormConfig, width: int) -> None:
        super().__init__()
        self._epsilon = config.epsilon
        self.weight = nn.Parameter(torch.ones(width)) if config.scale else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.center else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self._epsilon > 0 or not x.shape[-1]:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self._epsilon)
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            normed = _SafeLayerNorm.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            assert isinstance(normed, Tensor)
            return normed
        return _layer_norm_without_epsilon(x, self.weight, self.bias)[0]


def _layer_norm_without_epsilon(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, mean (B, 1), 1/std (B, 1), whether the row counts as constant (B, 1))."""
    constant = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    out, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], weight, bias, 0.0)
    # Squares of values around 1e-25 are 0 in float32, sums of values around 1e38 infinite.
    constant = constant | ~(mean.isfinite() & inverse_std.isfinite())
    shift = torch.zeros((), dtype=out.dtype, device=x.device) if bias is None else bias
    return torch.where(constant, shift.to(out.dtype), out), mean, inverse_std, constant


class _SafeLayerNorm(torch.autograd.Function):
    """Layer normalisation with epsilon 0. A constant row's 1/std counts as 0 in the backward pass,
    which makes every gradient through it 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out, mean, inverse_std, constant = _layer_norm_without_epsilon(x, weight, bias)
        mean, inverse_std = (one.masked_fill(constant, 0.0) for one in (mean, inverse_std))
        ctx.save_for_backward(x, mean, inverse_std, constant, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, mean, inverse_std, constant, weight, bias = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(),
            x,
            x.shape[-1:],
            mean,
            inverse_std,
            weight,
            bias,
            list(ctx.needs_input_grad),
        )
        if of_x is not None:  # sums of huge values times 0 are NaN
            of_x = of_x.masked_fill(constant, 0.0)
        return of_x, of_weight, of_bias


class Mlp(nn.Module):
    """(B, width_in) → (B, width_out): linear layers; after each but the last (and after the last
    where final_layer_activation is set) batch norm, ReLU and dropout, where configured.
    """

    def __init__(self, config: MlpConfig, width_in: int) -> None:
        super().__init__()
        self.width_out = config.layer_sizes[-1]
        widths = [width_in, *config.layer_sizes]
        self.layers = nn.ModuleList(linear(a, b) for a, b in pairwise(widths))
        num_activated = len(self.layers) - (not config.final_layer_activation)
        norms = config.layer_sizes[:num_activated] if config.batch_norm else []
        self.norms = nn.ModuleList(
            batch_norm(config.batch_norm, width) for width in norms if config.batch_norm
        )
        self._num_activated = num_activated
        self._dropout = config.dropout.rate if config.dropout else 0.0

    @property
    def first_layer(self) -> nn.Linear:
        """The layer that sees the input."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.after_first(self.first_layer(x))

    def after_first(self, x: Tensor) -> Tensor:
        """`forward` from the output of the first layer on."""
        x = self._activate(x, 0)
        for number, layer in enumerate(list(self.layers)[1:], start=1):
            x = self._activate(layer(x), number)
        return x

    def _activate(self, x: Tensor, number: int) -> Tensor:
        if number >= self._num_activated:
            return x
        if self.norms:
            x = self.norms[number](x)
        x = F.relu(x, inplace=True)
        return F.dropout(x, self._dropout, self.training) if self._dropout else x
