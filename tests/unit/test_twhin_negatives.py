"""Negatives drawn by degree, and how often each is expected."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from projects.twhin.config import DataConfig, ModelConfig
from projects.twhin.data import EdgeLayout, to_batch
from projects.twhin.negatives import NegativeSampler

DEGREES = np.array([0, 8, 3, 0, 99])


def test_rows_are_drawn_by_the_power_of_one_plus_their_degree() -> None:
    sampler = NegativeSampler(5, DEGREES, 0.5)
    wanted = np.sqrt(1 + DEGREES) / np.sqrt(1 + DEGREES).sum()
    drawn = sampler.draw(np.random.default_rng(0), (200, 100))
    assert drawn.shape == (200, 100)
    shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    assert shares == pytest.approx(wanted, abs=0.01)
    assert np.exp(sampler.log_counts(np.arange(5), 40)) == pytest.approx(40 * wanted, rel=1e-5)


def test_a_power_of_zero_is_uniform() -> None:
    sampler = NegativeSampler(5)
    assert np.exp(sampler.log_counts(np.arange(5), 40)) == pytest.approx(np.full(5, 8.0))
    shares = np.bincount(sampler.draw(np.random.default_rng(0), (20_000,)), minlength=5) / 20_000
    assert shares == pytest.approx(np.full(5, 0.2), abs=0.01)


def layout(**softmax: bool) -> EdgeLayout:
    tables = [
        {"name": name, "num_embeddings": rows, "embedding_dim": 4}
        for name, rows in (("user", 6), ("tweet", 3))
    ]
    relations = [
        {"name": "fav", "lhs": "user", "rhs": "tweet"},
        {"name": "knows", "lhs": "user", "rhs": "user", "sampling_rate": 0.25},
        {"name": "reply", "lhs": "user", "rhs": "tweet"},
    ]
    return EdgeLayout(
        ModelConfig.model_validate(
            {
                "embeddings": {"tables": tables},
                "relations": relations,
                "loss": {"softmax": softmax},
            }
        )
    )


def test_degrees_are_counted_by_tables_and_side_over_all_row_groups(tmp_path: Path) -> None:
    edges = {
        "lhs": np.array([0, 0, 5, 1, 1, 1, 1]),
        "rel": np.array([0, 2, 0, 1, 1, 1, 0]),
        "rhs": np.array([1, 1, 2, 4, 4, 0, 1]),
    }
    pq.write_table(pa.table(edges), tmp_path / "part.parquet", row_group_size=2)
    data = DataConfig(
        data_root=f"{tmp_path}/*.parquet", global_negatives=2, degree_power=1.0, offset=1
    )
    known = layout()
    known.count_degrees(data)
    counts = {
        (pair, side): np.exp(known.sampler(pair, side, 1.0).log_counts(np.arange(rows), 1))
        for pair, side, rows in ((0, 0, 6), (0, 1, 3), (1, 0, 6), (1, 1, 6))
    }
    assert counts[0, 0] == pytest.approx(np.array([2, 2, 1, 1, 1, 2]) / 9)
    assert counts[0, 1] == pytest.approx(np.array([1, 3, 2]) / 6)
    assert counts[1, 0] == pytest.approx(np.array([1, 4, 1, 1, 1, 1]) / 9)
    assert counts[1, 1] == pytest.approx(np.array([2, 1, 1, 1, 3, 1]) / 9)


def test_expected_counts_come_with_the_batch_where_the_loss_asks_for_them() -> None:
    columns = {name: np.array([0, 1, 1]) for name in ("lhs", "rhs")} | {"rel": np.zeros(3, int)}
    data = DataConfig(data_root="x", global_negatives=4, chunk_size=2)
    for asked in (False, True):
        (group,) = to_batch(columns, layout(log_q=asked), data, np.random.default_rng(0), 3).groups
        if not asked:
            assert group.lhs_log_counts is None
            continue
        assert group.lhs_log_counts is not None
        assert group.rhs_log_counts is not None
        assert group.lhs_log_counts.exp().tolist() == [[pytest.approx(4 / 6)] * 4] * 2
        assert group.rhs_log_counts.exp().tolist() == [[pytest.approx(4 / 3)] * 4] * 2


def test_a_relation_loses_edges_by_its_sampling_rate() -> None:
    n = 8000
    rel = np.arange(n) % 2
    columns = {"lhs": np.zeros(n, int), "rel": rel, "rhs": np.zeros(n, int)}
    data = DataConfig(data_root="x", global_negatives=1)
    batch = to_batch(columns, layout(), data, np.random.default_rng(0), n)
    fav, knows = batch.groups
    assert len(fav.lhs) == n // 2
    assert len(knows.lhs) == pytest.approx(n / 8, rel=0.1)
    assert batch.num_edges_all == n
