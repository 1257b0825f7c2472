"""Relation operators: what a relation does to its left-hand vector before the comparator sees it.

    operator            op_r(x)             parameters of all R relations             start
    identity            x
    translation         x + b_r             translations (R, D)                       0
    diagonal            d_r ⊙ x             diagonals (R, D)                          1
    linear              A_r x               matrices (R, D, D)                        I
    affine              A_r x + b_r         matrices (R, D, D), translations (R, D)   I, 0
    complex_diagonal    c_r ⊙ x over ℂ      complex_diagonals (R, D)                  1 + 0i

(PyTorch-BigGraph, arXiv 1903.12287, section 3.2; with dot, diagonal is DistMult, linear RESCAL,
complex_diagonal ComplEx.) Complex vectors have their D/2 real parts in the first half, the
imaginary parts in the second.

All are affine, op_r(x) = L_r x + b_r, hence ⟨op_r(x), y⟩ = ⟨x, L_rᵀ y⟩ + ⟨b_r, y⟩: `apply` gives
op_r, `transpose` and `offset` what a query for left-hand entities needs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Operator = Literal["translation", "identity", "diagonal", "linear", "affine", "complex_diagonal"]

PARAMETERS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "translation": ("translations",),
    "diagonal": ("diagonals",),
    "linear": ("matrices",),
    "affine": ("matrices", "translations"),
    "complex_diagonal": ("complex_diagonals",),
}
"""Operator → the names of its parameters, under which they are saved."""
LINEAR_PART_IS_IDENTITY = ("identity", "translation")


class Operators(nn.Module):
    """The operators of all relations; `kinds` names that of each.

    Every parameter has a row for each relation, those of other operators stay as they are. Where no
    relation has any parameter, there are the translations that the saved format has always had.
    """

    def __init__(
        self, kinds: Sequence[str], dim: int, init_scale: float | None = None, seed: int = 0
    ) -> None:
        """init_scale: standard deviation of all parameters; None: operators start as the
        identity.
        """
        super().__init__()
        self.kinds = tuple(kinds)
        self.dim = dim
        wanted = dict.fromkeys(name for kind in self.kinds for name in PARAMETERS[kind])
        generator = torch.Generator().manual_seed(seed)
        for name in wanted or ("translations",):
            start = _identity(name, len(self.kinds), dim)
            if init_scale is not None:
                start = torch.empty_like(start).normal_(std=init_scale, generator=generator)
            self.register_parameter(name, nn.Parameter(start))
        distinct = sorted(set(self.kinds))
        self._distinct = distinct
        numbers = torch.tensor([distinct.index(kind) for kind in self.kinds])
        self.register_buffer("kind_numbers", numbers, persistent=False)

    def apply_to(self, x: Tensor, relation: Tensor) -> Tensor:
        """op_r of each row: x (n, D), relation (n,) → (n, D)."""
        return self._by_kind(x, relation, self._moved)

    def transpose(self, y: Tensor, relation: Tensor) -> Tensor:
        """L_rᵀ y of each row: (n, D)."""
        return self._by_kind(y, relation, self._transposed)

    def offset(self, relation: Tensor) -> Tensor | None:
        """b_r of each row (n, D); None where no operator has any."""
        if all("translations" not in PARAMETERS[kind] for kind in self._distinct):
            return None
        like = self.get_parameter("translations").new_zeros(1).expand(len(relation), self.dim)
        return self._by_kind(like, relation, self._offset)

    @property
    def mixes_complex(self) -> bool:
        """Whether some relations are complex and some are not."""
        return "complex_diagonal" in self._distinct and len(self._distinct) > 1

    def is_complex(self, relation: Tensor) -> Tensor:
        """Whether the operator of each row is complex: (n,) bool."""
        flags = [kind == "complex_diagonal" for kind in self._distinct]
        return torch.tensor(flags, device=relation.device)[
            self.get_buffer("kind_numbers")[relation]
        ]

    def powers(self, relation: Tensor, power: int, counts: Tensor | None = None) -> Tensor:
        """Σ over the rows' parameters of |θ|^power, complex numbers by their modulus → scalar.
        counts (n,): what each row counts; None: 1.
        """
        total = torch.zeros((), device=relation.device)
        if counts is None:
            counts = torch.ones(len(relation), device=relation.device)
        start = 0
        for kind, numbers in self._runs(relation):
            own = counts[start : start + len(numbers)]
            start += len(numbers)
            for name in PARAMETERS[kind]:
                parameter = self.get_parameter(name)
                if name == "matrices":  # once for each relation: a row's matrix is large
                    found, place = torch.unique_consecutive(numbers, return_inverse=True)
                    each = parameter.unbind()
                    sums = [_powers(each[r].flatten(), power) for r in found.tolist()]
                    total = total + torch.stack(sums)[place] @ own
                else:
                    rows = F.embedding(numbers, parameter)
                    is_complex = name == "complex_diagonals"
                    total = total + _powers(modulus(rows) if is_complex else rows, power) @ own
        return total

    def _by_kind(
        self, x: Tensor, relation: Tensor, act: Callable[[str, Tensor, Tensor], Tensor]
    ) -> Tensor:
        if len(self._distinct) == 1:
            return act(self._distinct[0], x, relation)
        runs = list(self._runs(relation))
        parts = x.split([len(numbers) for _, numbers in runs])
        done = [act(kind, part, numbers) for (kind, numbers), part in zip(runs, parts, strict=True)]
        return torch.cat(done)

    def _runs(self, relation: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(operator, relation) of each longest stretch of rows with the same operator."""
        if len(self._distinct) == 1:
            yield self._distinct[0], relation
            return
        kinds = self.get_buffer("kind_numbers")[relation]
        found, counts = torch.unique_consecutive(kinds, return_counts=True)
        parts = relation.split(counts.tolist())
        yield from zip((self._distinct[kind] for kind in found.tolist()), parts, strict=True)

    def _moved(self, kind: str, x: Tensor, relation: Tensor) -> Tensor:
        if kind == "diagonal":
            return x * self._rows("diagonals", relation)
        if kind == "complex_diagonal":
            return complex_product(self._rows("complex_diagonals", relation), x)
        if kind in ("linear", "affine"):
            x = self._multiply(x, relation, transpose=False)
        if kind in ("translation", "affine"):
            x = x + self._rows("translations", relation)
        return x

    def _transposed(self, kind: str, y: Tensor, relation: Tensor) -> Tensor:
        if kind == "diagonal":
            return y * self._rows("diagonals", relation)
        if kind == "complex_diagonal":
            return complex_product(conjugate(self._rows("complex_diagonals", relation)), y)
        if kind in ("linear", "affine"):
            return self._multiply(y, relation, transpose=True)
        return y

    def _offset(self, kind: str, zeros: Tensor, relation: Tensor) -> Tensor:
        has_offset = "translations" in PARAMETERS[kind]
        return self._rows("translations", relation) if has_offset else zeros

    def _rows(self, name: str, relation: Tensor) -> Tensor:
        # Not parameter[relation]: the backward pass of indexing adds in an order that changes from
        # run to run.
        return F.embedding(relation, self.get_parameter(name))

    def _multiply(self, x: Tensor, relation: Tensor, *, transpose: bool) -> Tensor:
        """A_r x, or A_rᵀ x, by one product for each stretch of rows with the same relation."""
        found, counts = torch.unique_consecutive(relation, return_counts=True)
        # unbind, not matrices[r]: each index would fill all R matrices with zeros going backward.
        each = self.get_parameter("matrices").unbind()
        parts = [
            part @ (each[r] if transpose else each[r].T)
            for r, part in zip(found.tolist(), x.split(counts.tolist()), strict=True)
        ]
        return torch.cat(parts)


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """Products of complex numbers; (…, D): D/2 real parts, then D/2 imaginary parts."""
    a_real, a_imaginary = a.chunk(2, dim=-1)
    b_real, b_imaginary = b.chunk(2, dim=-1)
    real = a_real * b_real - a_imaginary * b_imaginary
    imaginary = a_real * b_imaginary + a_imaginary * b_real
    return torch.cat([real, imaginary], dim=-1)


def conjugate(a: Tensor) -> Tensor:
    """Complex conjugates of (…, D)."""
    real, imaginary = a.chunk(2, dim=-1)
    return torch.cat([real, -imaginary], dim=-1)


def modulus(a: Tensor) -> Tensor:
    """|a| of complex numbers: (…, D) → (…, D/2); its gradient at 0 is 0."""
    real, imaginary = a.chunk(2, dim=-1)
    squares = real.square() + imaginary.square()
    return squares.clamp_min(1e-30).sqrt()


def _powers(values: Tensor, power: int) -> Tensor:
    """(…, D) → (…)."""
    powers = values.square() if power == 2 else values.abs().pow(power)
    return powers.sum(dim=-1)


def _identity(name: str, num_relations: int, dim: int) -> Tensor:
    """The parameter's values with which its operator changes nothing."""
    if name == "translations":
        return torch.zeros(num_relations, dim)
    if name == "matrices":
        return torch.eye(dim).repeat(num_relations, 1, 1)
    start = torch.ones(num_relations, dim)
    if name == "complex_diagonals":
        start[:, dim // 2 :] = 0.0
    return start
