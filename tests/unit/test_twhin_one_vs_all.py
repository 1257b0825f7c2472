"""1-vs-all by distinct questions: losses and gradients are those of the edges one by one, and
passes that ask for one side at a time make epochs of both.
"""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from projects.twhin import dataset_worker, gradients, one_vs_all
from projects.twhin.anchors import Anchors
from projects.twhin.config import DataConfig, ModelConfig, RuntimeConfig, TwhinConfig
from projects.twhin.data import EdgeBatch, EdgeLayout, build_reader, read_batches, to_batch
from projects.twhin.model import TwhinModel, table_specs
from projects.twhin.penalties import power_sum
from projects.twhin.precision import uses_bfloat16
from projects.twhin.run import _announce_uneven, _validate
from projects.twhin.scoring import Entities, Queries
from tml.config import ConfigError
from tml.data import flight
from tml.data.parquet import Columns, Position
from tml.distributed import Job
from tml.embeddings import ArrayRows, build_tables
from tml.train import StopSignal

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
ALL = DataConfig(data_root="x", all_negatives=True)
GROUPED = DataConfig(data_root="x", all_negatives=True, grouped=True)
ROWS, DIM = 7, 8


def model_config(
    operator: str = "identity", loss: dict[str, Any] | None = None, **extra: Any
) -> ModelConfig:
    table = {
        "name": "e",
        "num_embeddings": ROWS,
        "embedding_dim": DIM,
        "optimizer": {"sgd": {"lr": 1}},
    }
    relations = [
        {"name": "a", "lhs": "e", "rhs": "e", "operator": operator, "weight": 0.5},
        {"name": "b", "lhs": "e", "rhs": "e", "operator": extra.pop("second", operator)},
    ]
    tree = {
        "embeddings": {"tables": [table]},
        "relations": relations,
        "loss": loss or {"softmax": {"temperature": 0.5}},
        "init_scale": 1.0,
        "relation_init_scale": 0.5,
    }
    return ModelConfig.model_validate({**tree, **extra})


def columns(n: int = 40) -> Columns:
    """Of 7 entities and 2 relations: most questions are asked by several edges."""
    generator = np.random.default_rng(1)
    return {
        "lhs": generator.integers(ROWS, size=n),
        "rel": generator.integers(2, size=n),
        "rhs": generator.integers(ROWS, size=n),
    }


def batch_of(config: ModelConfig, data: DataConfig, epoch: int = 0) -> EdgeBatch:
    edges = columns()
    generator = np.random.default_rng(0)
    return to_batch(edges, EdgeLayout(config), data, generator, len(edges["rel"]), epoch)


def learn(
    config: ModelConfig,
    data: DataConfig,
    passes: int = 1,
    *,
    written: bool = True,
    by_edge: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of the first passes over the same edges, and its gradients."""
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
    if config.biases:
        start = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
        tables.fill("e.bias", ArrayRows(start))
    model = TwhinModel(config, tables, seed=2)
    model.writes_gradients = written
    if by_edge:  # a warm start looks rows up edge by edge
        model.anchors = Anchors(Path(), [], 0.0, freeze=False)
    before = {name: tensor.clone() for name, tensor in tables.state().items()}
    value = torch.stack([model(batch_of(config, data, epoch), data) for epoch in range(passes)])
    (value.sum() * 0.25).backward()
    gradients = {name: before[name] - tensor for name, tensor in tables.state().items()}
    for name, parameter in model.relation_parameters().items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return value.sum().detach(), gradients


def assert_same(found: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("loss", [{"softmax": {"temperature": 0.5}}, {"logistic": {}}])
@pytest.mark.parametrize(
    "model",
    [
        {"operator": "complex_diagonal", "regularization": {"n3": 0.1}},
        {"operator": "complex_diagonal", "second": "diagonal", "regularization": {"n3": 0.1}},
        {"operator": "affine", "biases": True, "regularization": {"l2": 0.1}},
        {"operator": "translation", "comparator": "l2", "biases": True},
        {"operator": "translation", "comparator": "squared_l2", "regularization": {"n3": 0.1}},
        {"operator": "identity", "comparator": "cosine"},
    ],
    ids=["complex", "mixed", "affine", "l2", "squared", "cosine"],
)
def test_two_grouped_passes_equal_one_epoch_of_both_sides_by_autograd(
    model: dict[str, Any], loss: dict[str, Any], reciprocal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three questions a block: seams, and a last block of fewer.
    monkeypatch.setattr(one_vs_all, "BLOCK_SCORES", {"cpu": 3 * ROWS})
    config = model_config(loss=loss, reciprocal=reciprocal, **model)
    expected = learn(config, ALL, written=False)
    assert_same(learn(config, ALL), expected)
    assert_same(learn(config, GROUPED, passes=2), expected)
    assert_same(learn(config, GROUPED, passes=2, by_edge=True), expected)
    assert_same(learn(config, GROUPED, passes=2, written=False), expected)


def test_three_answers_to_two_questions_by_hand() -> None:
    # Scores 0 and log 2: probabilities 1/3 and 2/3. Question 0 has the answers 1 and 1 (weights 1
    # and 2), question 1 the answer 0 (weight 1).
    queries = torch.tensor([[1.0], [1.0]], requires_grad=True)
    candidates = torch.tensor([[0.0], [float(np.log(2))]], requires_grad=True)
    answers = one_vs_all.Answers(
        torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([1.0, 2.0, 1.0])
    )
    objective = one_vs_all.Objective(temperature=1.0)
    loss = one_vs_all.full_loss(
        "dot", Queries(queries, None), Entities(candidates), answers, objective
    )
    assert loss.item() == pytest.approx(3 * np.log(3 / 2) + np.log(3))
    loss.backward()
    # ∂x: [3/3, 6/3 − 3] and [1/3 − 1, 2/3].
    expected = torch.tensor([[1.0 - 2 / 3], [-1.0 + 2 / 3]])
    torch.testing.assert_close(candidates.grad, expected)
    log_2 = float(np.log(2))
    torch.testing.assert_close(queries.grad, torch.tensor([[-log_2], [2 / 3 * log_2]]))


def test_one_side_of_one_edge_by_hand() -> None:
    config = model_config("identity", {"logistic": {}}, second="identity")
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
    model = TwhinModel(config, tables)
    w = tables.state()["tables.e.weight"]
    edge = {"lhs": np.array([1]), "rel": np.array([1]), "rhs": np.array([2])}
    softplus = torch.nn.functional.softplus
    for asks, asking, true in (("rhs", 1, 2), ("lhs", 2, 1)):
        scores = w @ w[asking]
        others = torch.arange(ROWS) != true
        expected = softplus(-scores[true]) + softplus(scores[others]).sum()
        data = ALL.model_copy(update={"asks": asks})
        batch = to_batch(edge, EdgeLayout(config), data, np.random.default_rng(0), 1)
        with torch.no_grad():
            torch.testing.assert_close(model(batch, data), expected)
            # Of drawn negatives: those of the other side are neither drawn nor counted.
            drawn = DataConfig(data_root="x", global_negatives=5, asks=asks)
            batch = to_batch(edge, EdgeLayout(config), drawn, np.random.default_rng(0), 1)
            (group,) = batch.groups
            ids = {"lhs": group.lhs_negatives[0], "rhs": group.rhs_negatives[0]}
            assert {side: len(found) for side, found in ids.items()} == {
                "lhs": 5 * (asks == "lhs"),
                "rhs": 5 * (asks == "rhs"),
            }
            counted = ids[asks][ids[asks] != true]
            expected = softplus(-scores[true]) + softplus(scores[counted]).sum()
            for written in (True, False):
                model.writes_gradients = written
                torch.testing.assert_close(model(batch, drawn), expected)


@pytest.mark.parametrize("loss", [{"softmax": {}}, {"logistic": {}}])
@pytest.mark.parametrize("drawn", [{"global_negatives": 4}, {"in_batch_negatives": 5}])
def test_the_sides_asked_for_add_up_to_both(loss: dict[str, Any], drawn: dict[str, int]) -> None:
    """With reciprocal relations, whose sides share no term."""
    config = model_config("complex_diagonal", loss, reciprocal=True, regularization={"n3": 0.1})
    if "global_negatives" in drawn:
        values = []
        model = TwhinModel(config, build_tables(table_specs(config), JOB, 3), seed=2)
        for asks in ("both", "lhs", "rhs"):
            data = DataConfig(data_root="x", asks=asks, chunk_size=10, **drawn)
            batch = batch_of(config, data.model_copy(update={"asks": "both"}))
            batch = EdgeBatch(batch.groups, batch.num_edges_all, data.sides(0))
            values.append(model(batch, data).item())
    else:
        values = [
            learn(config, DataConfig(data_root="x", asks=asks, **drawn))[0].item()
            for asks in ("both", "lhs", "rhs")
        ]
    assert values[0] == pytest.approx(values[1] + values[2], rel=1e-5)
    assert min(values) > 0


def test_a_modulus_of_zero_has_no_slope_and_counts_multiply() -> None:
    vectors = torch.tensor([[3.0, 0.0, 4.0, 0.0], [1.0, 2.0, 0.0, 0.0]], requires_grad=True)
    counts = torch.tensor([2.0, 1.0])
    value = power_sum(vectors, counts, 3, is_complex=True)
    assert value.item() == 2 * 5**3 + 1 + 2**3
    value.backward()
    # 3 |z| z
    expected = torch.tensor([[2 * 45.0, 0.0, 2 * 60.0, 0.0], [3.0, 12.0, 0.0, 0.0]])
    torch.testing.assert_close(vectors.grad, expected)


def test_huge_and_equal_vectors_have_finite_gradients() -> None:
    for comparator, scale in (("dot", 1e4), ("l2", 1e4), ("l2", 1e-9)):
        config = model_config(loss={"softmax": {}}, comparator=comparator, init_scale=scale)
        value, gradients = learn(config, ALL)
        assert torch.isfinite(value)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.fixture
def edges(tmp_path: Path) -> str:
    path = tmp_path / "edges.parquet"
    pq.write_table(pa.table(columns(50)), path, row_group_size=20)
    return str(path)


def reader_of(config: ModelConfig, data: DataConfig, passes: int) -> Any:
    return build_reader(data, EdgeLayout(config), JOB, 5, passes, 1)


def test_two_passes_ask_every_edge_for_each_side_once_and_questions_come_together(
    edges: str,
) -> None:
    config = model_config()
    data = GROUPED.model_copy(update={"data_root": edges, "per_replica_batch_size": 8})
    reader = reader_of(config, data, 2)
    seen: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    for read in reader.batches(Position()):
        seen[read.epoch].update(zip(*(read.columns[c].tolist() for c in columns()), strict=True))
    everything = Counter(zip(*(column.tolist() for column in columns(50).values()), strict=True))
    assert seen == [everything, everything]

    batches = read_batches(reader, EdgeLayout(config), data, JOB, 5, Position(), 0)
    sides = [batch.sides for batch, _ in batches]
    assert sides == [("rhs",)] * 7 + [("lhs",)] * 7

    for epoch, asking in ((0, "lhs"), (1, "rhs")):
        rows = [read.columns for read in reader.batches(Position(epoch)) if read.epoch == epoch]
        asked, relation = (np.concatenate([r[name] for r in rows]) for name in (asking, "rel"))
        keys = asked * 2 + relation
        changes = 1 + np.count_nonzero(np.diff(keys))
        assert changes == len(np.unique(keys))
        assert (np.diff(keys) < 0).any()  # in no order of theirs


def test_a_grouped_pass_is_taken_up_in_its_middle(edges: str) -> None:
    config = model_config()
    data = GROUPED.model_copy(update={"data_root": edges, "per_replica_batch_size": 8})
    reader = reader_of(config, data, 4)
    whole = list(reader.batches(Position()))
    for steps in (3, 7, 10):
        position = Position.from_json(whole[steps - 1].after.to_json())
        rest = list(reader_of(config, data, 4).batches(position))
        assert len(rest) == len(whole) - steps
        for read, again in zip(whole[steps:], rest, strict=True):
            assert read.epoch == again.epoch
            assert all((read.columns[name] == again.columns[name]).all() for name in columns())


def test_a_data_set_worker_says_which_pass_its_edges_are_of(edges: str) -> None:
    config = model_config()
    data = GROUPED.model_copy(update={"data_root": edges, "per_replica_batch_size": 8})
    reader = reader_of(config, data, 2)
    server = flight._Server(
        "grpc://127.0.0.1:0", lambda rank, size: dataset_worker._Served(reader), dict
    )
    try:
        remote = flight.Remote((f"127.0.0.1:{server.port}",), 0, 1, {}, wait_s=5)
        served = list(dataset_worker.ServedReader(remote).batches(Position()))
    finally:
        server.shutdown()
    assert [read.epoch for read in served] == [0] * 7 + [1] * 7
    for read, here in zip(served, reader.batches(Position()), strict=True):
        assert all((read.columns[name] == here.columns[name]).all() for name in columns())


@pytest.mark.parametrize(
    ("steps", "asks", "said"),
    [
        (7, "both", "7 steps ask for tails in 7 and for heads in 0 of them"),
        (53, "both", "53 steps ask for tails in 30 and for heads in 23 of them"),
        (40, "both", ""),
        (60, "both", ""),
        (7, "rhs", ""),
    ],
)
def test_steps_that_ask_for_one_side_more_are_said(
    steps: int, asks: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {
        "training": {"num_epochs": 6, "num_train_steps": steps},
        "model": model_config().model_dump(exclude_none=True),
        "train_data": {"data_root": "x", "all_negatives": True, "grouped": True, "asks": asks},
    }
    _announce_uneven(TwhinConfig.model_validate(tree), steps, 60)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize("loss", [{"softmax": {}}, {"logistic": {}}])
def test_the_validation_loss_is_that_of_the_passes_of_training(
    loss: dict[str, Any], edges: str
) -> None:
    model_of = model_config(loss=loss)
    data = GROUPED.model_copy(update={"data_root": edges, "per_replica_batch_size": 8})
    tree = {
        "training": {"num_epochs": 2},
        "model": model_of.model_dump(exclude_none=True),
        "train_data": data.model_dump(),
        "validation_data": {"data_root": edges},
    }
    config, layout = TwhinConfig.model_validate(tree), EdgeLayout(model_of)
    assert config.validation_data is not None
    model = TwhinModel(model_of, build_tables(table_specs(model_of), JOB, 3, as_a_whole=True))
    passes = read_batches(reader_of(model_of, data, 2), layout, data, JOB, 5, Position(), 0)
    with torch.no_grad():
        sums = [(model(batch, data).item(), batch.num_edges_all) for batch, _ in passes]
    expected = sum(value for value, _ in sums) / sum(count for _, count in sums)
    found = _validate(config, config.validation_data, layout, JOB, model, StopSignal())
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_two_processes_refuse_all_negatives() -> None:
    two = Job(rank=0, world_size=2, local_world_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"\(all negatives\), which works in one process alone"):
        build_tables(table_specs(model_config()), two, 0, as_a_whole=True)


def test_auto_precision_is_that_of_the_machine_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for has_tiles, name in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_tiles: has)
        runtime = RuntimeConfig(enable_amp="auto")
        assert uses_bfloat16(runtime, JOB.device) == has_tiles
        assert f"score products in {name}" in caplog.messages[-1]
    for given in (False, True):
        assert uses_bfloat16(RuntimeConfig(enable_amp=given), JOB.device) == given


def two_tables(loss: dict[str, Any], optimizer: dict[str, Any], **extra: Any) -> ModelConfig:
    """Users who are asked for items alone."""
    table = {"num_embeddings": ROWS, "embedding_dim": DIM, "optimizer": optimizer}
    tree = {
        "embeddings": {"tables": [{"name": "user", **table}, {"name": "item", **table}]},
        "relations": [{"name": "likes", "lhs": "user", "rhs": "item", "operator": "identity"}],
        "loss": loss,
        "init_scale": 1.0,
    }
    return ModelConfig.model_validate({**tree, **extra})


def train_on(config: ModelConfig, edges: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Tables after one update an edge (user, item), asked for its item."""
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
    model = TwhinModel(config, tables)
    data = ALL.model_copy(update={"asks": "rhs"})
    for user, item in edges:
        edge = {"lhs": np.array([user]), "rel": np.array([0]), "rhs": np.array([item])}
        batch = to_batch(edge, EdgeLayout(config), data, np.random.default_rng(0), 1)
        model(batch, data).backward()
    return {name: tensor.clone() for name, tensor in tables.state().items()}


def test_rows_that_ask_nothing_stay_with_the_momentum_of_adam() -> None:
    config = two_tables({"softmax": {}}, {"adam": {"lr": 0.1}})
    one, two = train_on(config, [(0, 1)]), train_on(config, [(0, 1), (2, 3)])
    assert two["tables.user.weight"][0].equal(one["tables.user.weight"][0])
    assert not two["tables.user.weight"][2].equal(one["tables.user.weight"][2])
    assert two["tables.user.m"][0].equal(one["tables.user.m"][0])
    assert not two["tables.item.weight"][1].equal(one["tables.item.weight"][1])


@pytest.mark.parametrize(("loss", "learns"), [({"softmax": {}}, False), ({"logistic": {}}, True)])
def test_biases_that_cancel_do_not_learn_from_rounding(loss: dict[str, Any], learns: bool) -> None:
    """Adagrad would make a whole step of a gradient of 1e-8."""
    config = two_tables(loss, {"adagrad": {"lr": 0.1}}, biases=True)
    state = train_on(config, [(user, user) for user in range(ROWS)])
    assert bool(state["tables.user.bias.weight"].any()) == learns
    assert state["tables.item.bias.weight"].any()


def test_unlikely_answers_make_no_denormal_numbers() -> None:
    """With them, products run a hundred times slower."""
    own = one_vs_all.Answers(torch.tensor([0]), torch.tensor([0]), torch.ones(1))
    smallest = torch.finfo(torch.float32).tiny
    row = torch.tensor([[0.0, -88.0, -100.0, -1e4]])
    softmax, logistic = row.clone(), row.clone()
    one_vs_all._softmax(softmax, torch.ones(1), own, 1.0, learns=True)
    one_vs_all._logistic(logistic, torch.ones(1), own, 1.0, learns=True)
    positive, drawn, hidden = row[:, 0], row[:, 1:].clone(), torch.full((1, 3), -torch.inf)
    found = [softmax, logistic]
    for negative in (drawn.clone(), hidden.clone()):
        gradients._softmax(positive, negative, None, 1.0)
        found.append(negative)
    for negative in (drawn, hidden):
        loss, _ = gradients._logistic(positive, negative, None, counts_positive=True)
        assert loss == pytest.approx(math.log(2), abs=1e-7)
        found.append(negative)
    for derivative in found:
        assert not ((derivative != 0) & (derivative.abs() < smallest)).any()
        assert (derivative[:, 1:].abs() < 1e-27).all()
