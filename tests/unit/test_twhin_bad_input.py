"""Bad input to run.py, each a clear error or a stated behaviour: unseen entities, relations without
edges, vectors that are no numbers, checkpoints of another vocabulary, numbers beyond fp16.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from projects.twhin import evaluate, export
from projects.twhin.config import TableConfig, TwhinConfig
from projects.twhin.export import resolve_run
from projects.twhin.run import run
from projects.twhin.vocabulary import (
    META_KEY,
    fingerprint,
    fingerprints,
    names_of,
    read_names,
    refuse_another,
)
from tml import checkpoint
from tml.checkpoint import CheckpointError
from tml.config import ConfigError, build_config, to_yaml
from tml.data.parquet import DataError
from tml.train import DivergedError

DIM = 8
USERS = [f"u{number}" for number in range(12)]
ITEMS = [f"i{number}" for number in range(9)]


def write_vocabulary(folder: Path, name: str, entities: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": np.arange(len(entities)), "entity": entities})
    pq.write_table(table, folder / f"{name}.parquet")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """User 11 and item 8 are in no training edge; relation 1 has none at all."""
    folder = tmp_path / "graph"
    generator = np.random.default_rng(0)
    for split, users, items, count in (("train", 11, 8, 200), ("test", 12, 9, 40)):
        (folder / split).mkdir(parents=True)
        lhs, rhs = generator.integers(users, size=count), generator.integers(items, size=count)
        lhs[0], rhs[0] = users - 1, items - 1
        columns = {"lhs": lhs, "rel": np.zeros(count, np.int64), "rhs": rhs}
        pq.write_table(pa.table(columns), folder / split / "0.parquet")
    write_vocabulary(folder, "user", USERS)
    write_vocabulary(folder, "item", ITEMS)
    return folder


def config_of(graph: Path, table: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    tables = [
        {
            "name": name,
            "num_embeddings": rows,
            "embedding_dim": DIM,
            "vocab": f"{graph}/{name}.parquet",
            **(table or {}),
        }
        for name, rows in (("user", len(USERS)), ("item", len(ITEMS)))
    ]
    return {
        "training": {"num_epochs": 1, **training},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": r, "lhs": "user", "rhs": "item"} for r in ("likes", "never")],
            "loss": {"softmax": {}},
        },
        "train_data": {
            "data_root": f"{graph}/train/*.parquet",
            "per_replica_batch_size": 50,
            "global_negatives": 10,
        },
        "test_data": {"data_root": f"{graph}/test/*.parquet"},
        "evaluation": {"retrieval": {"k": [3]}},
    }


def start(tree: dict[str, Any], save_dir: Path) -> None:
    run(build_config(TwhinConfig, tree, "test"), save_dir)


def test_unseen_entities_are_scored_exported_and_counted_and_a_relation_without_edges_does_no_harm(
    graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start(config_of(graph), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    test = pq.read_table(graph / "test" / "0.parquet").to_pydict()
    unseen = sum(s == 11 or t == 8 for s, t in zip(test["lhs"], test["rhs"], strict=True))
    assert report["unseen"] == unseen > 0
    assert report["link_prediction"]["edges"] == 40
    assert list(report["link_prediction"]["relations"]) == ["likes"]
    assert list(report["retrieval"]["relations"]) == ["likes"]
    vectors = tmp_path / "run" / "vectors"
    assert pq.read_table(vectors / "user.parquet").column("entity").to_pylist() == USERS
    relations = pq.read_table(vectors / "relations.parquet").to_pydict()
    assert relations["relation"] == ["likes", "never"]
    assert not any(relations["vector"][1])  # as it started: the identity
    said = capfd.readouterr().out
    assert f"{unseen} of 40 edges hold an entity unseen in training" in said


def test_a_pretrained_row_that_is_no_number_is_named(graph: Path, tmp_path: Path) -> None:
    rows = np.zeros((len(USERS), DIM), np.float32)
    rows[7, 2] = np.nan
    path = tmp_path / "rows.npy"
    np.save(path, rows)
    tree = config_of(graph)
    tree["model"]["embeddings"]["tables"][0]["pretrained"] = str(path)
    with pytest.raises(DataError, match=re.escape(f"pretrained {path}, row 7: not a finite")):
        start(tree, tmp_path / "run")


def test_pretrained_numbers_beyond_fp16_are_refused_with_the_row(
    graph: Path, tmp_path: Path
) -> None:
    rows = np.zeros((len(USERS), DIM), np.float32)
    rows[5, 1] = 7e4
    path = tmp_path / "rows.npy"
    np.save(path, rows)
    tree = config_of(graph, {"data_type": "fp16"})
    tree["model"]["embeddings"]["tables"][0]["pretrained"] = str(path)
    with pytest.raises(ConfigError, match=r"rows\.npy: row 5 holds 70000, and fp16 ends at 65,504"):
        start(tree, tmp_path / "run")


# Checkpoints of another vocabulary


@pytest.fixture
def finished(graph: Path, tmp_path: Path) -> Path:
    start(config_of(graph, num_train_steps=2), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("how", ["resume", "initial_checkpoint_dir"])
@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([*USERS, "u12"], "table 'user' has 12 rows there, 13 in the config"),
        ([*USERS[1:], USERS[0]], "table 'user' has as many rows, but other entities"),
        ([*USERS[:-1], "someone"], "table 'user' has as many rows, but other entities"),
    ],
)
def test_a_checkpoint_of_another_vocabulary_is_refused_with_the_remedy(
    how: str, entities: list[str], message: str, graph: Path, finished: Path, tmp_path: Path
) -> None:
    write_vocabulary(graph, "user", entities)
    tree = config_of(graph)
    tree["model"]["embeddings"]["tables"][0]["num_embeddings"] = len(entities)
    save_dir = finished
    if how == "initial_checkpoint_dir":
        save_dir = tmp_path / "other"
        tree["training"]["initial_checkpoint_dir"] = str(finished / "2")
    with pytest.raises(CheckpointError, match=f"{message}.*--warm_start RUN"):
        start(tree, save_dir)
    assert checkpoint.complete_steps(save_dir) == ([2] if how == "resume" else [])


def test_the_same_vocabulary_in_another_place_or_none_is_no_other_vocabulary(
    graph: Path, finished: Path
) -> None:
    shutil.copy(graph / "user.parquet", graph / "moved.parquet")
    tree = config_of(graph)
    tables = tree["model"]["embeddings"]["tables"]
    tables[0]["vocab"], tables[1]["vocab"] = f"{graph}/moved.parquet", None
    start(tree, finished)
    assert checkpoint.complete_steps(finished) == [2, 4]


def test_a_fingerprint_knows_names_their_order_and_where_each_ends(tmp_path: Path) -> None:
    def of(names: list[str]) -> str:
        return fingerprint(pa.array(names, pa.large_string()))

    different = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""], ["", "ab", "c"], []]
    assert len({of(names) for names in different}) == len(different)
    longer = pa.array(["x", "ab", "c", "y"], pa.large_string())
    assert fingerprint(longer.slice(1, 2)) == of(["ab", "c"])
    # Rows in any order, in several row groups, as small strings or large: the same vocabulary.
    table = pa.table({"id": [1, 0, 2], "entity": pa.array(["c", "ab", "d"], pa.string())})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=1)
    assert fingerprint(read_names(tmp_path / "v.parquet", "vocabulary")) == of(["ab", "c", "d"])


def test_what_an_older_checkpoint_does_not_say_is_not_compared() -> None:
    refuse_another(Path("x"), {}, {"user": {"rows": 3, "entities": "a"}})
    meta = {"vocabularies": {"user": {"rows": 3, "entities": None}, "gone": {"rows": 1}}}
    refuse_another(Path("x"), meta, {"user": {"rows": 3, "entities": "a"}})


def test_a_vocabulary_that_was_replaced_in_place_is_refused_by_export_and_evaluation(
    graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = build_config(TwhinConfig, config_of(graph), "test")
    meta = {META_KEY: fingerprints(config.model)}
    checkpoint.save(tmp_path / "run", 4, {"x": torch.zeros(1)}, meta, to_yaml(config))
    assert resolve_run(tmp_path / "run", None)[0].name == "4"
    write_vocabulary(graph, "item", ITEMS[::-1])
    with pytest.raises(CheckpointError, match="table 'item' has as many rows, but other entities"):
        resolve_run(tmp_path / "run", None)
    for program in (export.main, evaluate.main):
        assert program([f"--run={tmp_path}/run"]) == 2
        assert "is of another vocabulary: table 'item'" in " ".join(capfd.readouterr().err.split())
    (graph / "item.parquet").unlink()  # measuring needs no names
    assert resolve_run(tmp_path / "run", None)[0].name == "4"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"id": [0, 1, 3], "entity": ["a", "b", "c"]},
            "in place of the id 2 there is 3; .* 0 to 2",
        ),
        ({"id": [1, 0, 1], "entity": ["a", "b", "c"]}, "in place of the id 2 there is 1"),
        (
            {"id": [0, 1, 2], "name": ["a", "b", "c"]},
            "user.parquet cannot be read: No match for .*entity",
        ),
        ({"id": [0, 1], "entity": ["a", "b"]}, "has 2 entities, table 'user' has 3 rows"),
    ],
)
def test_a_vocabulary_that_does_not_name_each_row_once_is_refused(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "user.parquet"
    pq.write_table(pa.table(columns), path)
    tree = {"name": "user", "num_embeddings": 3, "embedding_dim": 4, "vocab": str(path)}
    with pytest.raises(DataError, match=message):
        names_of(TableConfig.model_validate(tree))


# Numbers that are none


@pytest.mark.parametrize(
    ("data_type", "lr", "message"),
    [
        # The first update goes beyond what fp16 holds; no loss has seen it when it is to be saved.
        ("fp16", 1e7, r"by step 1 row \d+ of table 'user' holds -?inf: fp16 ends at 65,504"),
        ("fp32", 1e39, "by step 1 row .* of table 'user' holds .*training has diverged"),
    ],
)
def test_an_update_that_makes_no_numbers_is_never_saved(
    data_type: str, lr: float, message: str, graph: Path, tmp_path: Path
) -> None:
    table = {"data_type": data_type, "optimizer": {"sgd": {"lr": lr}}}
    with pytest.raises(DivergedError, match=message):
        start(config_of(graph, table, num_train_steps=1), tmp_path / "run")
    assert not list((tmp_path / "run").glob("[0-9]*"))


def test_a_loss_that_is_no_number_names_the_row_of_fp16_that_overflowed(
    graph: Path, tmp_path: Path
) -> None:
    table = {"data_type": "fp16", "optimizer": {"sgd": {"lr": 1e7}}}
    tree = config_of(graph, table, train_log_every_n=2)
    with pytest.raises(
        DivergedError, match=r"by step 2 row .* of table 'user' .* set data_type to"
    ):
        start(tree, tmp_path / "run")
    assert not list((tmp_path / "run").glob("[0-9]*"))
