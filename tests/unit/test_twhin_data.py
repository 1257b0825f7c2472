"""Edges → batches: order, groups, negatives from the right table, ids in range."""

from typing import Any

import numpy as np
import pytest

from projects.twhin.config import DataConfig, ModelConfig
from projects.twhin.data import EdgeBatch, EdgeLayout, to_batch
from tml.data.parquet import Columns, DataError

MODEL = ModelConfig.model_validate(
    {
        "embeddings": {
            "tables": [
                {"name": "user", "num_embeddings": 40, "embedding_dim": 4},
                {"name": "tweet", "num_embeddings": 7, "embedding_dim": 4},
                {"name": "author", "num_embeddings": 3, "embedding_dim": 4},
            ]
        },
        "relations": [
            {"name": "fav", "lhs": "user", "rhs": "tweet"},
            {"name": "wrote", "lhs": "author", "rhs": "tweet"},
            {"name": "reply", "lhs": "user", "rhs": "tweet"},
        ],
    }
)
LAYOUT = EdgeLayout(MODEL)


def columns(*edges: tuple[int, int, int]) -> Columns:
    array = np.array(edges, dtype=np.int64).reshape(-1, 3)
    return {"lhs": array[:, 0], "rel": array[:, 1], "rhs": array[:, 2]}


def batch(edges: Columns, seed: int = 0, **settings: Any) -> EdgeBatch:
    config = DataConfig(data_root="x", **settings)
    return to_batch(edges, LAYOUT, config, np.random.default_rng(seed), len(edges["rel"]))


def test_edges_are_grouped_by_tables_and_sorted_by_relation_and_none_is_lost() -> None:
    edges = [(1, 2, 3), (2, 1, 4), (5, 0, 6), (0, 1, 0), (7, 2, 1)]
    made = batch(columns(*edges), global_negatives=2)
    assert [(g.lhs_table, g.rhs_table) for g in made.groups] == [
        ("user", "tweet"),
        ("author", "tweet"),
    ]
    assert made.groups[0].relation.tolist() == [0, 2, 2]
    found = [
        (int(lhs), int(rel), int(rhs))
        for g in made.groups
        for lhs, rel, rhs in zip(g.lhs, g.relation, g.rhs, strict=True)
    ]
    assert sorted(found) == sorted(edges)


@pytest.mark.parametrize(("rows", "kind"), [(2**31 - 1, np.int32), (2**31 + 1, np.int64)])
def test_edges_are_held_in_the_smallest_type_that_takes_every_id(rows: int, kind: type) -> None:
    user, *others = MODEL.embeddings.tables
    tables = [*others, user.model_copy(update={"num_embeddings": rows})]
    embeddings = MODEL.embeddings.model_copy(update={"tables": tables})
    layout = EdgeLayout(MODEL.model_copy(update={"embeddings": embeddings}))
    assert layout.smallest_type() is kind


def test_global_negatives_come_from_the_right_table_uniformly_a_set_a_chunk() -> None:
    edges = columns(*[(i % 40, 0, i % 7) for i in range(1000)])
    (group,) = batch(edges, global_negatives=50, chunk_size=100).groups
    assert group.lhs_negatives.shape == group.rhs_negatives.shape == (10, 50)
    assert set(group.lhs_negatives.flatten().tolist()) == set(range(40))
    counts = np.bincount(group.rhs_negatives.flatten().numpy(), minlength=7)
    assert len(counts) == 7
    expected = 500 / 7
    assert (abs(counts - expected) < 5 * expected**0.5).all()


def test_negatives_are_a_function_of_the_seed() -> None:
    edges = columns(*[(i % 40, 0, i % 7) for i in range(100)])
    one, same, other = (batch(edges, seed, global_negatives=9).groups[0] for seed in (1, 1, 2))
    assert one.lhs_negatives.equal(same.lhs_negatives)
    assert not one.lhs_negatives.equal(other.lhs_negatives)


def test_lookups_name_every_table_also_those_without_ids() -> None:
    made = batch(columns((1, 0, 2)), global_negatives=3, chunk_size=5)
    ids = made.ids(["user", "tweet", "author"])
    assert {name: len(found) for name, found in ids.items()} == {
        "user": 4,
        "tweet": 4,
        "author": 0,
    }
    empty = batch(columns())
    assert empty.groups == ()
    assert all(not len(x) for x in empty.ids(["user", "tweet"]).values())


def test_ids_out_of_range_are_refused_with_file_row_relation_and_remedy() -> None:
    good = (39, 0, 6)
    LAYOUT.check(columns(good, good), "f.parquet", 0)
    with pytest.raises(
        DataError, match=r"f\.parquet, row 101: rhs 7 of relation 'fav'.*'tweet' has 7"
    ):
        LAYOUT.check(columns(good, (0, 0, 7)), "f.parquet", 100)
    with pytest.raises(DataError, match=r"lhs 3 of relation 'wrote'.*'author' has 3 rows"):
        LAYOUT.check(columns((3, 1, 0)), "f.parquet", 0)
    with pytest.raises(DataError, match="lhs -1"):
        LAYOUT.check(columns((-1, 0, 0)), "f.parquet", 0)
    with pytest.raises(DataError, match="row 0: rel 3 is out of range 0 to 2"):
        LAYOUT.check(columns((0, 3, 0)), "f.parquet", 0)
    with pytest.raises(DataError, match=str(2**32)):
        LAYOUT.check(columns((2**32, 0, 0)), "f.parquet", 0)
