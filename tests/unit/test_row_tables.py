"""RowTables: updates against FBGEMM's and torch's, rows that are there several times, pieces."""

import pytest
import torch
from torch import Tensor

from tml.distributed import Job
from tml.embeddings import ArrayRows, FbgemmTables, Tables, TableSpec, build_tables
from tml.optimizers import OptimizerConfig
from tml.row_tables import RowTables

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
ROWS = 50
KINDS = ["sgd", "adagrad", "rowwise_adagrad"]


def spec(kind: str, dim: int, data_type: str = "fp32") -> TableSpec:
    optimizer = OptimizerConfig.model_validate({kind: {"lr": 0.25}})
    return TableSpec("a", ROWS, dim, data_type, optimizer, 1.0)


def build(kind: str, dim: int = 4) -> Tables:
    tables = build_tables([spec(kind, dim)], JOB, seed=1)
    assert isinstance(tables, RowTables)
    return tables


def weight(tables: Tables) -> Tensor:
    found = tables.state()["tables.a.weight"]
    assert isinstance(found, Tensor)
    return found


def loss(rows: Tensor) -> Tensor:
    return (rows.sin() * torch.arange(1.0, rows.shape[1] + 1)).sum()


@pytest.mark.parametrize("dim", [4, 32])  # rows below and above SPREAD_FROM
@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_those_of_fbgemm(kind: str, dim: int) -> None:
    own, fused = build(kind, dim), FbgemmTables([spec(kind, dim)], JOB.device)
    fused.fill("a", ArrayRows(weight(own)))
    generator = torch.Generator().manual_seed(1)
    for step, number in enumerate((1, 7, 200)):  # of 200, most are there several times
        ids = torch.randint(ROWS, (number,), generator=generator)
        for tables in (own, fused):
            tables.set_learning_rates(step)
            loss(tables({"a": ids})["a"]).backward()
    assert own.state().keys() == fused.state().keys()
    for name, tensor in own.state().items():
        other = fused.state()[name].reshape(tensor.shape)
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_update_of_the_whole(kind: str) -> None:
    ids = torch.tensor([3, 3, 7, 0, 7, 9, 3])
    whole, cut = build(kind), build(kind)
    loss(whole({"a": ids})["a"]).backward()
    first, second, third = cut.cut("a", cut({"a": ids})["a"], [2, 4, 1])
    (loss(first) + loss(second) + loss(third)).backward()
    for name, tensor in whole.state().items():
        torch.testing.assert_close(tensor, cut.state()[name], rtol=1e-6, atol=1e-7)


def test_a_piece_that_nothing_uses_has_no_update() -> None:
    tables = build("adagrad")
    before = weight(tables).clone()
    first, _ = tables.cut("a", tables({"a": torch.tensor([1, 2, 3])})["a"], [1, 2])
    loss(first).backward()
    assert (weight(tables) != before).any(dim=1).nonzero().flatten().tolist() == [1]


def test_pieces_that_share_a_gradient_are_updated_by_it_each() -> None:
    tables = build("sgd")
    before = weight(tables).clone()
    first, second = tables.cut("a", tables({"a": torch.tensor([1, 2])})["a"], [1, 1])
    ((first + second) * 2.0).sum().backward()
    expected = before.clone()
    expected[[1, 2]] -= 0.5
    torch.testing.assert_close(weight(tables), expected)


def test_the_gradient_of_a_sum_and_two_lookups_make_one_update() -> None:
    tables = build("rowwise_adagrad")
    before = weight(tables).clone()
    ids = torch.tensor([4, 5])
    (tables({"a": ids})["a"].sum() + 2 * tables({"a": ids[:1]})["a"].sum()).backward()
    accumulator = tables.state()["tables.a.accumulator"]
    assert accumulator[4] == 9.0  # (1 + 2)², not 1 + 2²
    assert accumulator[5] == 1.0
    torch.testing.assert_close(weight(tables)[4:6], before[4:6] - 0.25)


def test_without_gradients_nothing_changes() -> None:
    tables = build("adagrad")
    before = weight(tables).clone()
    with torch.no_grad():
        tables.cut("a", tables({"a": torch.tensor([1, 2])})["a"], [1, 1])
    tables({"a": torch.empty(0, dtype=torch.int64)})["a"].sum().backward()
    assert weight(tables).equal(before)


def test_half_precision_rows_are_held_by_fbgemm() -> None:
    assert isinstance(build_tables([spec("adagrad", 4, "fp16")], JOB, seed=1), FbgemmTables)
