"""Small and large tables, hashing, bags, and the vector of the position."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.model.config import (
    ModelConfig,
    PositionDebiasConfig,
    SmallEmbeddingsConfig,
)
from projects.home.recap.model.embeddings import (
    PositionDebias,
    SmallEmbeddings,
    fill_pretrained,
    hash_to_rows,
    large_table_specs,
    small_tables,
)
from projects.home.recap.model.model import RankingModel, unused_features
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.distributed import Job
from tml.embeddings import build_tables

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
FEATURES = Features(
    tasks=("a",),
    num_continuous=2,
    num_discrete=3,
    categorical={"country": 5, "type": 4},
    bags={"topics": 6},
    ids=("author", "position"),
)


def batch(**changes: Any) -> RankingBatch:
    values: dict[str, Any] = {
        "continuous": torch.ones(3, 2),
        "binary": torch.zeros(3, 0),
        "discrete": torch.tensor([[1, -5, 2], [2**62, 7, 2], [-(2**63), 7, 0]]),
        "labels": torch.tensor([[0.0], [1.0], [0.0]]),
        "weights": torch.ones(3, 1),
        "categorical": {"country": torch.tensor([0, 4, 2]), "type": torch.tensor([3, 3, 1])},
        "bags": {"topics": Bag(torch.tensor([1, 2, 2, 5]), torch.tensor([0, 3, 3, 4]))},
        "ids": {"author": torch.tensor([10**15, 3, 3]), "position": torch.tensor([0, 300, -1])},
    }
    return RankingBatch(**{**values, **changes})


def small(**config: Any) -> SmallEmbeddings:
    settings = SmallEmbeddingsConfig.model_validate(config)
    torch.manual_seed(0)
    return SmallEmbeddings(settings, small_tables(settings, FEATURES, set()))


def weight(module: SmallEmbeddings, table: str) -> torch.Tensor:
    found: Any = module.tables[f"table_{table}"]
    return torch.as_tensor(found.weight.detach())


def test_categorical_features_look_their_rows_up() -> None:
    module = small(default_dim=3)
    assert module.dims == [3, 3, 3]
    country, kind, _ = module(batch())
    assert torch.equal(country, weight(module, "country")[[0, 4, 2]])
    assert torch.equal(kind, weight(module, "type")[[3, 3, 1]])


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_bags_are_pooled_and_an_empty_one_gives_zeros(pooling: str) -> None:
    table = {"name": "t", "embedding_dim": 2, "features": ["topics"], "pooling": pooling}
    module = small(tables=[table])
    (found,) = module(batch())
    rows = weight(module, "t")
    total = rows[1] + 2 * rows[2]
    torch.testing.assert_close(found[0], total / 3 if pooling == "mean" else total)
    assert torch.equal(found[1], torch.zeros(2))
    torch.testing.assert_close(found[2], rows[5])
    empty = Bag(torch.empty(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(module(batch(bags={"topics": empty}))[0], torch.zeros(3, 2))


def test_features_of_one_table_share_its_rows() -> None:
    table = {"name": "t", "embedding_dim": 2, "features": ["country", "type"]}
    module = small(tables=[table])
    country, kind = module(batch())
    assert weight(module, "t").shape == (5, 2)
    assert torch.equal(country[1], weight(module, "t")[4])
    assert torch.equal(kind[0], weight(module, "t")[3])


def splitmix64(value: int) -> int:
    """The published algorithm in Python's whole numbers."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_hashing_is_splitmix64_and_never_gives_row_0() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first number of the reference for seed 0
    values = [0, 1, -1, 2**63 - 1, -(2**63), 123456789123456789]
    expected = [1 + (splitmix64(v % 2**64) % 2**63) % 99 for v in values]
    assert hash_to_rows(torch.tensor(values), 100).tolist() == expected
    rows = hash_to_rows(torch.arange(20000), 11)
    assert rows.min() == 1
    assert rows.max() == 10
    assert (rows.bincount()[1:] - 2000).abs().max() < 200


def test_discrete_columns_and_ids_are_hashed() -> None:
    table = {
        "name": "t",
        "embedding_dim": 2,
        "features": ["discrete.1", "author"],
        "num_embeddings": 50,
        "hash_values": True,
    }
    module = small(tables=[table])
    discrete, author = module(batch())
    rows = weight(module, "t")
    assert torch.equal(discrete, rows[hash_to_rows(torch.tensor([-5, 7, 7]), 50)])
    assert torch.equal(author, rows[hash_to_rows(torch.tensor([10**15, 3, 3]), 50)])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"features": ["city"]},
            r"no feature 'city'; there are country, type, topics.*discrete\.0",
        ),
        ({"features": ["discrete.3"], "hash_values": True}, "no feature 'discrete.3'"),
        ({"features": ["discrete.1"]}, "'discrete.1' are no row numbers; set hash_values"),
        ({"features": ["author"], "hash_values": True}, "set num_embeddings"),
        ({"features": ["country"], "num_embeddings": 4}, "4 is less than the 5 values"),
        ({"features": ["country", "country"]}, "'country' is named twice"),
    ],
)
def test_a_table_that_does_not_fit_the_data_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tables=[{"name": "t", "embedding_dim": 2, **table}])


@pytest.mark.parametrize("value", [-1, 5])
def test_a_value_that_is_no_row_is_named(value: int) -> None:
    wrong = {"country": torch.tensor([0, value, 1]), "type": torch.tensor([3, 3, 1])}
    with pytest.raises(DataError, match=f"'country' has the value {value}.*rows 0 to 4"):
        small(default_dim=3)(batch(categorical=wrong))


def test_pretrained_rows_are_loaded_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    table = {"name": "t", "embedding_dim": 2, "features": ["country"], "pretrained": str(path)}
    rows = np.arange(10, dtype=np.float64).reshape(5, 2)
    np.save(path, rows)
    assert torch.equal(weight(small(tables=[table]), "t"), torch.tensor(rows).float())
    np.save(path, rows[:4])
    with pytest.raises(ConfigError, match=r"shape \(4, 2\), not \(5, 2\)"):
        small(tables=[table])
    rows[3, 1] = np.nan
    np.save(path, rows)
    with pytest.raises(ConfigError, match="row 3 holds NaN"):
        small(tables=[table])
    path.write_text("rows")
    with pytest.raises(ConfigError, match=r"cannot be read as a \.npy file"):
        small(tables=[table])


def test_a_model_that_is_loaded_needs_no_file_of_initial_values(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.npy")
    tree = large_config(pretrained=absent).model_dump()
    table = {"name": "t", "embedding_dim": 2, "features": ["country"], "pretrained": absent}
    tree["small_embeddings"] = {"tables": [table]}
    tree["featurization_config"] = {"z_score_log_config": {"statistics_path": absent}}
    config = ModelConfig.model_validate(tree)
    with pytest.raises(ConfigError, match="absent"):
        RankingModel(config, FEATURES)
    model = RankingModel(config.without_files(), FEATURES)
    assert {"featurization.z_mean", "featurization.z_std"} <= set(model.state_dict())
    tables = build_tables(large_table_specs(config, FEATURES), JOB, seed=0)
    with pytest.raises(ConfigError, match="absent"):
        fill_pretrained(config, FEATURES, tables)
    fill_pretrained(config.without_files(), FEATURES, tables)


def test_features_without_use_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    tree = large_config().model_dump()
    features = replace(FEATURES, num_binary=2, categorical={"country": 5, "type": 4, "alone": 3})
    assert unused_features(ModelConfig.model_validate(tree), features) == [
        "3 of 3 discrete columns"
    ]
    tree["small_embeddings"] = None
    tree["featurization_config"]["feature_names_to_concat"] = []
    config = ModelConfig.model_validate(tree)
    with caplog.at_level(logging.INFO):
        RankingModel(config, features)
        RankingModel(config, features)
    told = "country, alone, 3 of 3 discrete columns, 2 binary features"
    assert caplog.text.count(f"not inputs of the model: {told};") == 1


def large_config(**table: Any) -> ModelConfig:
    tables = [
        {"name": "t.1", "embedding_dim": 4, "features": ["topics", "type"], **table},
        {
            "name": "authors",
            "embedding_dim": 4,
            "features": ["author"],
            "num_embeddings": 20,
            "hash_values": True,
        },
    ]
    tree = {
        "tasks": {"a": {"mlp_config": {"layer_sizes": [1]}}},
        "featurization_config": {"log1p_abs_config": {}},
        "small_embeddings": {"default_dim": 2},
        "large_embeddings": {"tables": tables, "optimizer": {"sgd": {"lr": 0.5}}},
    }
    return ModelConfig.model_validate(tree)


def test_large_rows_are_pooled_and_their_tables_learn_once_an_update() -> None:
    config = large_config()
    tables = build_tables(large_table_specs(config, FEATURES), JOB, seed=3)
    torch.manual_seed(0)
    model = RankingModel(config, FEATURES, tables)
    before = tables.state()["tables.t.1.weight"].clone()
    rows = model.lookup(batch())
    torch.testing.assert_close(rows["topics"][0], (before[1] + 2 * before[2]) / 3)
    assert torch.equal(rows["topics"][1], torch.zeros(4))
    torch.testing.assert_close(rows["type"], before[[3, 3, 1]])
    assert rows["author"].shape == (3, 4)
    assert model.input_width == 2 + 2 + 3 * 4  # `country` alone is left to small_embeddings
    sum(r.sum() for r in rows.values()).backward()  # type: ignore[union-attr]
    after = tables.state()["tables.t.1.weight"]
    # SGD of .5: row 1 is seen once in `type` and a third time in `topics`.
    torch.testing.assert_close(after[1], before[1] - 0.5 * (1 + 1 / 3))
    torch.testing.assert_close(after[3], before[3] - 0.5 * 2)
    assert torch.equal(after[0], before[0])
    assert not any("authors" in name for name in model.state_dict())


def test_micro_batches_with_rows_looked_up_once_give_the_gradient_of_the_whole() -> None:
    config = large_config()
    tables = build_tables(large_table_specs(config, FEATURES), JOB, seed=3)
    model = RankingModel(config, FEATURES, tables)
    whole = batch()
    rows = {name: r.detach().requires_grad_() for name, r in model.lookup(whole).items()}
    model.losses(model(whole, rows), whole).sum().backward()
    expected = {name: r.grad for name, r in rows.items()}
    again = {name: r.detach().requires_grad_() for name, r in rows.items()}
    for start, stop in ((0, 2), (2, 3)):
        part = whole.slice(start, stop)
        of_part = {name: r[start:stop] for name, r in again.items()}
        model.losses(model(part, of_part), part).sum().backward()
    for name, r in again.items():
        torch.testing.assert_close(r.grad, expected[name])


def test_large_tables_can_start_from_a_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    config = large_config(pretrained=str(tmp_path / "rows.npy"))
    tables = build_tables(large_table_specs(config, FEATURES), JOB, seed=3)
    fill_pretrained(config, FEATURES, tables)
    assert torch.equal(tables.state()["tables.t.1.weight"], torch.from_numpy(rows))


def test_forward_asks_for_the_rows_of_large_tables() -> None:
    config = large_config()
    model = RankingModel(config, FEATURES)
    with pytest.raises(ValueError, match="give forward the rows"):
        model(batch())


def position_config(**changes: Any) -> PositionDebiasConfig:
    return PositionDebiasConfig.model_validate(changes)


def positions(drop: float) -> PositionDebias:
    torch.manual_seed(0)
    return PositionDebias(position_config(drop_probability=drop), FEATURES)


def test_positions_beyond_the_last_count_as_the_last_and_negative_ones_as_unknown() -> None:
    module = positions(0.0)
    found = module(batch())
    assert found.shape == (3, 64)
    assert torch.equal(found[0], module.embedding.weight[0])
    assert torch.equal(found[1], module.embedding.weight[255])
    assert torch.equal(found[2], torch.zeros(64))


def test_positions_are_dropped_at_their_rate_in_training_and_always_in_inference() -> None:
    module = positions(0.5)
    rows = torch.zeros(4000, dtype=torch.int64)
    many = batch(labels=torch.zeros(4000, 1), ids={"position": rows})
    dropped = (module(many) == 0).all(1)
    assert dropped.float().mean() == pytest.approx(0.5, abs=0.03)
    assert not module.eval()(many).any()


def test_a_position_feature_that_the_data_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no id feature 'rank'; there are author, position"):
        PositionDebias(position_config(position_feature_name="rank"), FEATURES)
