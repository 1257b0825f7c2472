"""DCN-v2 (arXiv 2008.13535): cross layers, and a deep part beside or after them."""

import torch
from torch import Tensor, nn

from projects.home.recap.model.config import DcnConfig
from projects.home.recap.model.layers import Mlp, linear


class CrossLayer(nn.Module):
    """(x₀, x) ↦ x₀ ⊙ (W x + b) + x (equation 1); with a rank, W = U V (equation 2)."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.down = linear(width, rank, bias=False) if rank else None
        self.up = linear(rank or width, width)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        inner = x if self.down is None else self.down(x)
        return torch.addcmul(x, first, self.up(inner))


class Dcn(nn.Module):
    """(B, width_in) → (B, width_out): the cross layers' output, concatenated with the deep part's
    (parallel), or the deep part over the cross layers (stacked); then the output MLP.
    """

    def __init__(self, config: DcnConfig, width_in: int) -> None:
        super().__init__()
        self._parallel = config.use_parallel
        self.cross = nn.ModuleList(
            CrossLayer(width_in, config.projection_dim) for _ in range(config.poly_degree)
        )
        width = width_in
        self.deep = Mlp(config.parallel_mlp, width_in) if config.parallel_mlp else None
        if self.deep is not None:
            width = self.deep.width_out + (width_in if self._parallel else 0)
        self.output = Mlp(config.output_mlp, width) if config.output_mlp else None
        self.width_out = self.output.width_out if self.output is not None else width

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out = x
        for layer in self.cross:
            out = layer(x, out)
        if self.deep is not None:
            out = torch.cat([out, self.deep(x)], dim=1) if self._parallel else self.deep(out)
        if self.output is not None:
            out = self.output(out)
        return out
