"""PlainTables: updates against torch's dense optimizers and FBGEMM's, on the rows that have a
gradient and on no other.
"""

import pytest
import torch
from torch import Tensor

from tml.config import ConfigError
from tml.distributed import Job
from tml.embeddings import ArrayRows, FbgemmTables, PlainTables, Tables, TableSpec, build_tables
from tml.optimizers import OptimizerConfig

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
ROWS, DIM = 20, 4
IDS = [torch.tensor([3, 3, 7, 0]), torch.tensor([7, 9]), torch.tensor([0, 7, 7])]


def spec(kind: str, data_type: str = "fp32", rows: int = ROWS) -> TableSpec:
    optimizer = OptimizerConfig.model_validate({kind: {"lr": 0.25}})
    return TableSpec("a", rows, DIM, data_type, optimizer, 1.0)


def build(kind: str, data_type: str = "fp32") -> Tables:
    tables = build_tables([spec(kind, data_type)], JOB, seed=1, as_a_whole=True)
    assert isinstance(tables, PlainTables)
    return tables


def weight(tables: Tables) -> Tensor:
    found = tables.state()["tables.a.weight"]
    assert isinstance(found, Tensor)
    return found


def loss(rows: Tensor) -> Tensor:
    return (rows.sin() * torch.arange(1.0, DIM + 1)).sum()


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_updates_equal_those_of_fbgemm(kind: str) -> None:
    plain, fused = build(kind), FbgemmTables([spec(kind)], JOB.device)
    fused.fill("a", ArrayRows(weight(plain)))
    assert weight(plain).equal(weight(fused))
    for step, ids in enumerate(IDS):
        for tables in (plain, fused):
            tables.set_learning_rates(step)
            loss(tables({"a": ids})["a"]).backward()
    assert plain.state().keys() == fused.state().keys()
    for name, tensor in plain.state().items():
        other = fused.state()[name].reshape(tensor.shape)
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


def test_adam_is_that_of_torch_for_sparse_gradients() -> None:
    tables = build("adam")
    parameter = torch.nn.Parameter(weight(tables).clone())
    reference = torch.optim.SparseAdam([parameter], lr=0.25)
    for ids in IDS:
        loss(tables({"a": ids})["a"]).backward()
        reference.zero_grad()
        loss(torch.nn.functional.embedding(ids, parameter, sparse=True)).backward()
        reference.step()
    torch.testing.assert_close(weight(tables), parameter.data, rtol=1e-5, atol=1e-6)
    state = tables.state()
    assert state["tables.a.step"].item() == 3
    touched = {int(row) for ids in IDS for row in ids}
    for name in ("m", "v"):
        assert set(state[f"tables.a.{name}"].any(dim=1).nonzero().flatten().tolist()) == touched


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_rows_and_the_whole_table_make_one_update(kind: str) -> None:
    tables = build(kind)
    parameter = torch.nn.Parameter(weight(tables).clone())
    reference: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD([parameter], lr=0.25),
        "adagrad": lambda: torch.optim.Adagrad([parameter], lr=0.25, eps=1e-8),
        "adam": lambda: torch.optim.Adam([parameter], lr=0.25),
    }[kind]()
    for ids in IDS:
        rows = tables({"a": ids})["a"]
        (loss(rows) + (rows @ tables.whole("a").T).square().sum()).backward()
        reference.zero_grad()
        rows = parameter[ids]
        (loss(rows) + (rows @ parameter.T).square().sum()).backward()
        reference.step()
    torch.testing.assert_close(weight(tables), parameter.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data_type", ["fp16", "bf16"])
@pytest.mark.parametrize("as_a_whole", [False, True])
def test_half_precision_rows_are_summed_and_updated_in_float32(
    data_type: str, as_a_whole: bool
) -> None:
    tables = build("adagrad", data_type)
    before = weight(tables).clone()
    assert before.dtype == (torch.float16 if data_type == "fp16" else torch.bfloat16)
    ids = torch.zeros(4096, dtype=torch.int64)
    rows = tables.whole("a")[:1].expand(4096, DIM) if as_a_whole else tables({"a": ids})["a"]
    assert rows.dtype == torch.float32
    (rows * 1.001).sum().backward()
    # A sum in bfloat16 would stop at 256.
    accumulator = tables.state()["tables.a.accumulator"][0]
    torch.testing.assert_close(
        accumulator, torch.full((DIM,), (4096 * 1.001) ** 2), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        weight(tables)[0].float(), before[0].float() - 0.25, rtol=0.01, atol=0.01
    )
    assert weight(tables)[1:].equal(before[1:])


def test_without_gradients_nothing_changes_and_no_rows_are_no_step() -> None:
    tables = build("adam")
    before = weight(tables).clone()
    with torch.no_grad():
        tables({"a": IDS[0]})
        tables.whole("a")
    tables({"a": IDS[0][:0]})["a"].sum().backward()
    assert weight(tables).equal(before)
    assert tables.state()["tables.a.step"].item() == 0


def test_the_rate_is_that_of_the_step() -> None:
    ramp = {"linear_ramp_to_constant": {"learning_rate": 1.0, "num_ramp_steps": 4}}
    optimizer = OptimizerConfig.model_validate({"sgd": {}, "learning_rate": ramp})
    tables = build_tables([TableSpec("a", ROWS, DIM, "bf16", optimizer, 1.0)], JOB, seed=1)
    assert tables.set_learning_rates(2) == {"a": 0.5}
    tables.fill("a", ArrayRows(torch.zeros(ROWS, DIM)))
    tables({"a": torch.tensor([2])})["a"].sum().backward()
    assert (weight(tables)[2] == -0.5).all()


@pytest.mark.parametrize(
    ("kind", "data_type", "as_a_whole", "message"),
    [
        ("adam", "fp32", False, "table 'a' has the optimizer adam"),
        ("sgd", "bf16", False, "table 'a' has the data type bf16"),
        ("sgd", "fp32", True, "all rows of a table are looked up"),
    ],
)
def test_several_processes_are_refused(
    kind: str, data_type: str, as_a_whole: bool, message: str
) -> None:
    job = Job(rank=0, world_size=2, local_world_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"{message}.*one process alone, not in 2"):
        build_tables([spec(kind, data_type)], job, seed=1, as_a_whole=as_a_whole)


@pytest.mark.parametrize("plain", [False, True])
def test_rows_that_do_not_fit_fp16_are_refused_with_their_place(plain: bool) -> None:
    tables = build_tables([spec("sgd", "fp16")], JOB, seed=1, as_a_whole=plain)
    rows = torch.zeros(ROWS, DIM)
    rows[13, 2] = 1e5
    with pytest.raises(ConfigError, match=r"row 13 holds 100000, and fp16 ends at 65,504"):
        tables.fill("a", ArrayRows(rows))
