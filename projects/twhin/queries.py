"""What one entity asks of a table: its query vector and how rows are compared with it, in numpy.

The same scores as `scoring` gives, for a single entity and without torch, whose import takes longer
than the answer. A measure is one of the comparators; larger is better.
"""

from dataclasses import dataclass

import numpy as np

from projects.twhin.exported import Exported, Floats

BLOCK_ROWS = 1 << 16
SMALLEST_NORM = 1e-12
"""What cosine divides by at least, as torch's normalize does."""


@dataclass(frozen=True)
class Query:
    """A question to the rows of a table: score(t) = measure(vector, t) + extra + bias of t."""

    vector: Floats  # (D,)
    measure: str
    extra: float = 0.0
    with_biases: bool = False
    operator: "tuple[str, Floats, Floats | None] | None" = None
    """Rows go through it first: heads of relations that cannot be moved to the query's side."""


def similar(exported: Exported, table: str, row: int) -> Query:
    """Ask for vectors like that of an entity: by cosine, or the model's distance."""
    return Query(
        np.array(exported.vectors(table)[row], np.float32), similarity(exported.comparator)
    )


def similarity(comparator: str) -> str:
    """The measure by which entities are alike: the length of a vector says how popular, not what
    its entity is, so dot becomes cosine.
    """
    return "cosine" if comparator == "dot" else comparator


def related(exported: Exported, relation: int, side: str, row: int) -> Query:
    """Ask for the `side` ("rhs" or "lhs") of edges of a relation, whose other side is `row`."""
    known = exported.relations[relation]
    table = known.lhs if side == "rhs" else known.rhs
    x = np.array(exported.vectors(table)[row], np.float32)
    biases = exported.biases(table)
    extra = 0.0 if biases is None else float(biases[row])
    measure, with_biases = exported.comparator, exported.has_biases
    inverse = side == "lhs" and exported.reciprocal
    number = relation + len(exported.relations) * inverse
    kind, parameter = known.operator, exported.relation_vector(number)
    has_matrix = kind in ("linear", "affine")
    matrix = exported.relation_matrix(number) if has_matrix else None
    if side == "rhs" or inverse:
        moved = apply_operator(kind, parameter, matrix, x[None])[0]
        return Query(moved, measure, extra, with_biases)
    if measure == "dot":
        if kind in ("translation", "affine"):  # ⟨L s + b, t⟩ = ⟨s, Lᵀ t⟩ + ⟨b, t⟩
            extra += float(parameter @ x)
        return Query(_transposed(kind, parameter, matrix, x), measure, extra, with_biases)
    if kind == "identity":
        return Query(x, measure, extra, with_biases)
    if kind == "translation" and measure in ("l2", "squared_l2"):
        return Query(x - parameter, measure, extra, with_biases)
    return Query(x, measure, extra, with_biases, (kind, parameter, matrix))


def apply_operator(kind: str, parameter: Floats, matrix: Floats | None, x: Floats) -> Floats:
    """op_r of rows (n, D) → (n, D)."""
    if kind == "diagonal":
        return x * parameter
    if kind == "complex_diagonal":
        return _as_real(_as_complex(x) * _as_complex(parameter))
    if matrix is not None:
        x = x @ matrix.T
    return x + parameter if kind in ("translation", "affine") else x


def _transposed(kind: str, parameter: Floats, matrix: Floats | None, y: Floats) -> Floats:
    """L_rᵀ y (D,)."""
    if kind == "diagonal":
        return y * parameter
    if kind == "complex_diagonal":
        return _as_real(_as_complex(y) * _as_complex(parameter).conj())
    return y if matrix is None else matrix.T @ y


def _as_complex(x: Floats) -> "np.ndarray[tuple[int, ...], np.dtype[np.complex64]]":
    half = x.shape[-1] // 2
    return (x[..., :half] + np.complex64(1j) * x[..., half:]).astype(np.complex64)


def _as_real(z: "np.ndarray[tuple[int, ...], np.dtype[np.complex64]]") -> Floats:
    return np.concatenate([z.real, z.imag], axis=-1)


def normalised(x: Floats) -> Floats:
    """Rows (n, D) of length 1."""
    norms = np.sqrt(np.einsum("nd,nd->n", x, x))
    return np.asarray(x / np.maximum(norms, SMALLEST_NORM)[:, None], np.float32)


def compare(query: Query, rows: Floats, biases: Floats | None) -> Floats:
    """Scores of rows (n, D) → (n,)."""
    if query.operator is not None:
        rows = apply_operator(*query.operator, rows)
    if query.measure in ("l2", "squared_l2"):
        difference = rows - query.vector
        squares = np.einsum("nd,nd->n", difference, difference)
        scores = -squares if query.measure == "squared_l2" else -np.sqrt(squares)
    elif query.measure == "cosine":
        scores = normalised(rows) @ normalised(query.vector[None])[0]
    else:
        scores = rows @ query.vector
    if query.with_biases:
        assert biases is not None
        scores = scores + biases
    return np.asarray(scores + np.float32(query.extra), np.float32)


def search_exactly(
    query: Query, exported: Exported, table: str, k: int
) -> "tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Floats]":
    """The k best rows of a table and their scores, best first, equal ones by their row; in blocks,
    so that memory stays flat.
    """
    rows = exported.vectors(table)
    biases = exported.biases(table) if query.with_biases else None
    best_ids, best = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        found = compare(query, np.asarray(rows[block]), None if biases is None else biases[block])
        keep = np.arange(len(found))
        if len(found) > k:  # those as good as the k-th, so that ties are settled below
            keep = np.flatnonzero(found >= np.partition(found, -k)[-k])
        best_ids = np.concatenate([best_ids, keep + start])
        best = np.concatenate([best, found[keep]])
        order = np.argsort(-best, kind="stable")[:k]
        best_ids, best = best_ids[order], best[order]
    return best_ids, best
