"""Comparators: how alike two vectors are; larger is better.

    dot           ⟨a, b⟩
    cosine        ⟨a, b⟩ / (‖a‖ ‖b‖)
    l2            −‖a − b‖     (TransE's distance, as in LibKGE)
    squared_l2    −‖a − b‖²    (PyTorch-BigGraph's squared_l2)

`pairs` compares rows one by one, `products` each query with each candidate by one matrix product.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Comparator = Literal["dot", "cosine", "l2", "squared_l2"]

SMALLEST_SQUARE = 1e-12
"""Of a distance: the root's gradient has no bound at 0, and there is none below this one."""


def pairs(comparator: Comparator, a: Tensor, b: Tensor) -> Tensor:
    """a, b (n, D) → (n,)."""
    if comparator == "cosine":
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    if comparator in ("dot", "cosine"):
        return (a * b).sum(dim=-1)
    return _from_square((a - b).square().sum(dim=-1), comparator)


def products(comparator: Comparator, queries: Tensor, candidates: Tensor) -> Tensor:
    """queries (…, n, D), candidates (…, K, D) → (…, n, K), in float32 or wider."""
    if comparator == "cosine":
        queries, candidates = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    if comparator in ("dot", "cosine"):
        return wide(queries @ candidates.transpose(-1, -2))
    # ‖q − c‖² = ‖q‖² + ‖c‖² − 2⟨q, c⟩. Large numbers cancel: never in bfloat16.
    with torch.autocast(queries.device.type, enabled=False):
        queries, candidates = wide(queries), wide(candidates)
        squares = queries.square().sum(dim=-1).unsqueeze(-1)
        squares = squares + candidates.square().sum(dim=-1).unsqueeze(-2)
        squares = squares - 2 * (queries @ candidates.transpose(-1, -2))
        return _from_square(squares, comparator)


def wide(values: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


def _from_square(squares: Tensor, comparator: Comparator) -> Tensor:
    if comparator == "squared_l2":
        return -squares.clamp_min(0.0)  # rounding may leave it below
    return -squares.clamp_min(SMALLEST_SQUARE).sqrt()
