"""Operators, comparators and scores: each fast path equals the formula written edge by edge, its
gradients too.
"""

from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from projects.twhin.comparators import Comparator, pairs, products
from projects.twhin.config import DataConfig, ModelConfig
from projects.twhin.data import EdgeLayout, Group, to_batch
from projects.twhin.model import (
    EdgeVectors,
    build_operators,
    build_scoring,
    score_group,
    score_with_all,
)
from projects.twhin.operators import Operator, complex_product, conjugate, modulus
from projects.twhin.scoring import Entities, moves_to_the_query

OPERATORS = get_args(Operator)
COMPARATORS = get_args(Comparator)
DIM = 8
ROWS = 12


def model_config(operators: list[str], comparator: str, **extra: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "embeddings": {
                "tables": [{"name": "e", "num_embeddings": ROWS, "embedding_dim": DIM}],
            },
            "relations": [
                {"name": f"r{number}", "lhs": "e", "rhs": "e", "operator": operator}
                for number, operator in enumerate(operators)
            ],
            "comparator": comparator,
            "relation_init_scale": 0.7,
            **extra,
        }
    )


def naive_operator(operator: str, parameters: dict[str, Tensor], r: int, x: Tensor) -> Tensor:
    """The definitions of the module's docstring for one vector."""
    if operator == "translation":
        return x + parameters["translations"][r]
    if operator == "diagonal":
        return x * parameters["diagonals"][r]
    if operator == "linear":
        return parameters["matrices"][r] @ x
    if operator == "affine":
        return parameters["matrices"][r] @ x + parameters["translations"][r]
    if operator == "complex_diagonal":
        half = DIM // 2
        c = parameters["complex_diagonals"][r]
        product = torch.complex(c[:half], c[half:]) * torch.complex(x[:half], x[half:])
        return torch.cat([product.real, product.imag])
    return x


def naive_comparator(comparator: str, a: Tensor, b: Tensor) -> Tensor:
    if comparator == "dot":
        return a @ b
    if comparator == "cosine":
        return (a @ b) / (a.norm() * b.norm())
    distance = (a - b).norm()
    return -distance if comparator == "l2" else -(distance**2)


def make_group(config: ModelConfig, data: DataConfig, n: int = 14) -> Group:
    generator = np.random.default_rng(2)
    columns = {
        "lhs": generator.integers(ROWS, size=n),
        "rel": generator.integers(len(config.relations), size=n),
        "rhs": generator.integers(ROWS, size=n),
    }
    (group,) = to_batch(columns, EdgeLayout(config), data, generator, n).groups
    return group


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("comparator", COMPARATORS)
@pytest.mark.parametrize(
    "operators", [[one] * 3 for one in OPERATORS] + [list(OPERATORS)], ids=lambda o: o[0] + o[-1]
)
@pytest.mark.parametrize("candidates", ["sampled", "all"])
def test_scores_of_both_sides_and_their_gradients_equal_the_formula(
    operators: list[str], comparator: str, reciprocal: bool, candidates: str
) -> None:
    config = model_config(operators, comparator, reciprocal=reciprocal)
    data = DataConfig(data_root="x", global_negatives=4, in_batch_negatives=5, chunk_size=5)
    group = make_group(config, data)
    operators_module = build_operators(config, seed=1).double()
    scoring = build_scoring(config, operators_module)
    parameters = dict(operators_module.named_parameters())
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator).requires_grad_()
    biases = torch.randn(ROWS, dtype=torch.float64, generator=generator).requires_grad_()

    def entities(ids: Tensor) -> Entities:
        return Entities(table[ids], biases[ids])

    def score(s: int, r: int, t: int, *, inverse: bool) -> Tensor:
        row = r + len(operators) if inverse else r
        start, end = (t, s) if inverse else (s, t)
        moved = naive_operator(operators[r], parameters, row, table[start])
        return naive_comparator(comparator, moved, table[end]) + biases[s] + biases[t]

    if candidates == "all":
        everyone = Entities(table, biases)
        lhs, rhs = entities(group.lhs), entities(group.rhs)
        found = score_with_all(group, lhs, rhs, (everyone, everyone), scoring)
    else:
        looked_up = [entities(ids) for _, ids in group.lookups()]
        found = score_group(group, EdgeVectors(*looked_up), scoring, data)

    n = len(group.lhs)
    everything = list(range(ROWS))
    expected: dict[str, list[Tensor]] = {"lhs": [], "rhs": [], "lhs_true": [], "rhs_true": []}
    for i, (s, r, t) in enumerate(
        zip(group.lhs.tolist(), group.relation.tolist(), group.rhs.tolist(), strict=True)
    ):
        heads, tails = everything, everything
        if candidates == "sampled":
            start = i // 6 * 6
            missing = [0] * max(0, start + 6 - n)  # padding, compared where it is not masked
            heads = group.lhs_negatives[i // 5].tolist() + group.lhs[start : start + 6].tolist()
            tails = group.rhs_negatives[i // 5].tolist() + group.rhs[start : start + 6].tolist()
            heads, tails = heads + missing, tails + missing
        expected["lhs"].append(torch.stack([score(h, r, t, inverse=reciprocal) for h in heads]))
        expected["rhs"].append(torch.stack([score(s, r, h, inverse=False) for h in tails]))
        expected["lhs_true"].append(score(s, r, t, inverse=reciprocal))
        expected["rhs_true"].append(score(s, r, t, inverse=False))

    weights = torch.rand(n, dtype=torch.float64, generator=generator)
    gradients = []
    for values in (
        {
            "lhs": found.sides[0].negative,
            "rhs": found.sides[1].negative,
            "lhs_true": found.sides[0].positive,
            "rhs_true": found.sides[1].positive,
        },
        {name: torch.stack(rows) for name, rows in expected.items()},
    ):
        total = torch.zeros((), dtype=torch.float64)
        for side, scores in zip(("lhs", "rhs"), found.sides, strict=True):
            kept = values[side].masked_fill(scores.mask(), 0.0)
            total = total + (kept.sin().sum(dim=1) * weights).sum() + kept.sum() * 0
            total = total + (values[f"{side}_true"].cos() * weights).sum()
        learned = [table, biases, *parameters.values()]
        gradients.append((total, torch.autograd.grad(total, learned, allow_unused=True)))
    for side, scores in zip(("lhs", "rhs"), found.sides, strict=True):
        mask = scores.mask()
        torch.testing.assert_close(
            scores.negative[~mask], torch.stack(expected[side])[~mask], rtol=1e-6, atol=1e-6
        )
        true = torch.stack(expected[f"{side}_true"])
        torch.testing.assert_close(scores.positive, true, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_start_as_the_identity(operator: str) -> None:
    config = model_config([operator], "dot", relation_init_scale=None)
    x = torch.randn(3, DIM)
    moved = build_operators(config).apply_to(x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(moved, x)


def test_random_parameters_depend_on_the_seed_and_have_the_scale() -> None:
    config = model_config(["complex_diagonal"] * 500, "dot", relation_init_scale=0.2)
    first, same, other = (
        build_operators(config, seed).get_parameter("complex_diagonals") for seed in (1, 1, 2)
    )
    assert first.equal(same)
    assert not first.equal(other)
    assert first.std().item() == pytest.approx(0.2, rel=0.05)


def test_where_heads_can_be_asked_for_by_one_product() -> None:
    by_product = {
        comparator: [one for one in OPERATORS if moves_to_the_query(comparator, [one])]
        for comparator in cast("tuple[Comparator, ...]", COMPARATORS)
    }
    assert by_product["dot"] == list(OPERATORS)
    assert by_product["l2"] == by_product["squared_l2"] == ["translation", "identity"]
    assert by_product["cosine"] == ["identity"]
    assert not moves_to_the_query("l2", ["translation", "diagonal"])


def test_complex_numbers_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])  # 1 + 2i, 3 − i
    assert complex_product(a, b).tolist() == [5.0, 5.0]
    assert conjugate(a).tolist() == [1.0, -2.0]
    assert modulus(torch.tensor([3.0, 0.0, 4.0, 0.0])).tolist() == [5.0, pytest.approx(0, abs=1e-9)]


def test_comparators_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    wanted = {"dot": 8.0, "cosine": 0.8, "l2": -(13**0.5), "squared_l2": -13.0}
    for comparator in cast("tuple[Comparator, ...]", COMPARATORS):
        assert pairs(comparator, a, b).item() == pytest.approx(wanted[comparator], rel=1e-6)
        assert products(comparator, a, b).item() == pytest.approx(wanted[comparator], rel=1e-6)


@pytest.mark.parametrize("comparator", COMPARATORS)
def test_equal_vectors_and_vectors_of_zeros_have_finite_gradients(comparator: Comparator) -> None:
    a = torch.zeros(2, DIM)
    a[0] = 1.0
    a.requires_grad_()
    for value in (pairs(comparator, a, a * 1.0), products(comparator, a, a * 1.0)):
        (gradient,) = torch.autograd.grad(value.sum(), a)
        assert torch.isfinite(gradient).all()


def test_distances_are_never_computed_in_bfloat16() -> None:
    a = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 10
    b = a + 0.01
    exact = products("l2", a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = products("l2", a, b)
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.02)
