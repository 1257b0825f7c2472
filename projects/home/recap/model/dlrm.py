"""DLRM (arXiv 1906.00091): dot products of all pairs among the embeddings and the bottom MLP's
output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from projects.home.recap.model.config import DlrmConfig
from projects.home.recap.model.layers import Mlp
from tml.config import ConfigError


class Dlrm(nn.Module):
    """(B, width_in), of which the last columns are the embeddings, each `dim` wide → (B,
    width_out). Everything before them goes through the bottom MLP.

    Raises ConfigError where embeddings and bottom MLP differ in width, or where either is absent.
    """

    def __init__(self, config: DlrmConfig, width_in: int, embedding_dims: Sequence[int]) -> None:
        super().__init__()
        dim = config.bottom_mlp.layer_sizes[-1]
        _check(dim, embedding_dims, width_in - sum(embedding_dims))
        self._num_embeddings = len(embedding_dims)
        self._dim = dim
        self._width_bottom = width_in - sum(embedding_dims)
        self.bottom = Mlp(config.bottom_mlp, self._width_bottom)
        num_vectors = self._num_embeddings + 1
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1, device="cpu")
        # Positions in the flattened matrix of products, a list: no buffer, no state.
        self._pairs = (pairs[0] * num_vectors + pairs[1]).tolist()
        self.num_product_weights = num_vectors * num_vectors * dim
        self.top = Mlp(config.top_mlp, dim + len(self._pairs))
        self.width_out = self.top.width_out

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        dense, embeddings = x[:, : self._width_bottom], x[:, self._width_bottom :]
        bottom = self.bottom(dense)
        vectors = torch.cat([bottom, embeddings.to(bottom.dtype)], dim=1).unflatten(
            1, (self._num_embeddings + 1, self._dim)
        )
        products = (vectors @ vectors.mT).flatten(1)  # (B, n²)
        pairs = products[:, torch.tensor(self._pairs, device=x.device)]
        out: Tensor = self.top(torch.cat([bottom, pairs], dim=1))
        return out


def _check(dim: int, embedding_dims: Sequence[int], width_bottom: int) -> None:
    if not embedding_dims:
        raise ConfigError(
            "dlrm_config: there are no embeddings to multiply; set model.small_embeddings or "
            "model.large_embeddings, and use dlrm_config in model.backbone, not in a task"
        )
    if any(one != dim for one in embedding_dims):
        raise ConfigError(
            f"dlrm_config: the last width of bottom_mlp is {dim}, the widths of the embeddings are "
            f"{sorted(set(embedding_dims))}; dot products need one width"
        )
    if not width_bottom:
        raise ConfigError("dlrm_config: bottom_mlp has no inputs; the data has embeddings alone")
