"""Losses over one positive score and many negative ones, summed over the examples of a batch.

Shapes: `positive` (B,), `negative` (B, K), `masked` (B, K) bool, true where a negative is not to be
counted: a padding, or an accidental hit (a sampled negative that is a true edge). Sums, not means:
the caller knows how many examples all processes have together.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(positive: Tensor, negative: Tensor, masked: Tensor) -> Tensor:
    """Σ_b [ −log σ(positive_b) − Σ_k log σ(−negative_bk) ] (Mikolov et al. 2013, eq. 4; TwHIN, eq.
    3) → scalar.
    """
    attracted = F.softplus(-positive).sum()
    repelled = F.softplus(negative).masked_fill(masked, 0.0).sum()
    return attracted + repelled


def sampled_softmax(
    positive: Tensor, negative: Tensor, masked: Tensor, temperature: float = 1.0
) -> Tensor:
    """Σ_b −log( e^positive_b / (e^positive_b + Σ_k e^negative_bk) ), scores divided by
    `temperature` → scalar.
    """
    scores = negative.masked_fill(masked, -torch.inf)
    scores = torch.cat([positive.unsqueeze(1), scores], dim=1) / temperature
    return (torch.logsumexp(scores, dim=1) - scores[:, 0]).sum()
