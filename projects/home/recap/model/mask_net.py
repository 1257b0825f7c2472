"""MaskNet (arXiv 2102.07619): MaskBlocks side by side or one after the other.

A MaskBlock looks at the input through a mask that is made from the input itself:

    mask = W₂ relu(W₁ x + b₁) + b₂        (equation 4)
    out  = LayerNorm(W₃ (net ⊙ mask) + b₃)    (equations 5 to 8, without the paper's ReLU)

x is the input of the whole network, always; net is what the block looks at: x (parallel), or the
output of the block before (serial).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.home.recap.model.config import LayerNormConfig, MaskBlockConfig, MaskNetConfig
from projects.home.recap.model.layers import LayerNorm, Mlp, linear

EPSILON = 1e-5
"""Of the blocks' own layer norms."""


class MaskBlock(nn.Module):
    """(net (B, width_net), hidden layer of the mask (B, aggregation_size)) → (B, output_size)."""

    def __init__(self, config: MaskBlockConfig, width_net: int, width_mask: int) -> None:
        super().__init__()
        norm = LayerNormConfig(epsilon=EPSILON)
        self.input_norm = LayerNorm(norm, width_net) if config.input_layer_norm else None
        self.mask = linear(aggregation_size(config, width_mask), width_net)
        self.output = linear(width_net, config.output_size)
        self.output_norm = LayerNorm(norm, config.output_size)

    def forward(self, net: Tensor, hidden: Tensor) -> Tensor:
        """See the class."""
        if self.input_norm is not None:
            net = self.input_norm(net)
        out: Tensor = self.output_norm(self.output(net * self.mask(hidden)))
        return out


class MaskNet(nn.Module):
    """(B, width_in) → (B, width_out).

    The first layers of all masks see the same input: their weights are one matrix (Σ
    aggregation_size, width_in), initialised block by block, and one product.
    """

    def __init__(self, config: MaskNetConfig, width_in: int) -> None:
        super().__init__()
        blocks = config.mask_blocks
        self._parallel = config.use_parallel
        self._hidden_sizes = [aggregation_size(block, width_in) for block in blocks]
        self.mask_hidden = nn.Linear(width_in, sum(self._hidden_sizes))
        for weight in self.mask_hidden.weight.split(self._hidden_sizes):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.mask_hidden.bias)
        outputs = [block.output_size for block in blocks]
        nets = [width_in] * len(blocks) if self._parallel else [width_in, *outputs[:-1]]
        self.blocks = nn.ModuleList(
            MaskBlock(block, width, width_in) for block, width in zip(blocks, nets, strict=True)
        )
        width = sum(outputs) if self._parallel else outputs[-1]
        self.mlp = Mlp(config.mlp, width) if config.mlp else None
        self.width_out = self.mlp.width_out if self.mlp is not None else width

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        together = F.relu(self.mask_hidden(x), inplace=True)
        hidden = together.split(self._hidden_sizes, dim=1)
        if self._parallel:
            out = torch.cat(
                [block(x, part) for block, part in zip(self.blocks, hidden, strict=True)], dim=1
            )
        else:
            out = x
            for block, part in zip(self.blocks, hidden, strict=True):
                out = block(out, part)
        if self.mlp is not None:
            out = self.mlp(out)
        return out


def aggregation_size(config: MaskBlockConfig, width_mask: int) -> int:
    """Width of the hidden layer of a block's mask, which is made from `width_mask` numbers."""
    if config.aggregation_size is not None:
        return config.aggregation_size
    assert config.reduction_factor is not None
    return max(1, int(width_mask * config.reduction_factor))
