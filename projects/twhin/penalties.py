"""Penalties Σ_i c_i |θ_i|^p with their gradients written out: of each distinct vector once, with
how often it counts.
"""

from typing import Any

import torch
from torch import Tensor

from projects.twhin.gradients import Written


def power_sum(vectors: Tensor, counts: Tensor, power: int, *, is_complex: bool) -> Tensor:
    """Σ_i counts_i Σ |vectors_i|^power → scalar: vectors (n, D), counts (n,), power 2 or 3; of
    complex vectors, the real parts in the first half, by the modulus of each number.
    """
    found = _PowerSum.apply(vectors, counts, power, is_complex)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


class _PowerSum(Written):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, counts: Tensor, power: int, is_complex: bool) -> Tensor:
        factors = (power * counts).unsqueeze(1)
        if power == 2:
            gradient = vectors * factors
        elif not is_complex:
            gradient = vectors.abs().mul_(vectors).mul_(factors)
        else:
            # ∂|z|³ = 3 |z| z, of both parts
            parts = vectors.unflatten(1, (2, -1))  # (n, 2, D/2)
            real, imaginary = parts.unbind(1)
            moduli = (real * real).addcmul_(imaginary, imaginary).sqrt_().mul_(factors)
            gradient = (parts * moduli.unsqueeze(1)).flatten(1)
        ctx.gradients = None
        if ctx.needs_input_grad[0]:
            ctx.gradients = (gradient, None, None, None)
        # θ ∂θ is p times what is asked for.
        return torch.dot(gradient.flatten(), vectors.flatten()) / power
