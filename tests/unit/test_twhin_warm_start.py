"""Warm start: rows follow their entity to its new id, new ones start as they should, pull and
freeze act on rows that had a vector, and a run that is taken up again is the unbroken one.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch import Tensor

from projects.twhin import warm_start
from projects.twhin.anchors import FOLDER, Anchors, map_rows
from projects.twhin.best import Goal, describe, write_best
from projects.twhin.config import TwhinConfig
from projects.twhin.data import EdgeLayout, to_batch
from projects.twhin.export import resolve_run
from projects.twhin.model import TwhinModel, build_relation_optimizer, table_specs
from projects.twhin.previous import open_previous
from projects.twhin.run import run
from tml import checkpoint, run_folder
from tml.checkpoint import CheckpointError
from tml.config import ConfigError, build_config, to_yaml
from tml.data.parquet import DataError
from tml.distributed import Job
from tml.embeddings import NormalRows, build_tables
from tml.logs import MetricLog

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
DIM = 8
OLD_USERS = [f"u{number}" for number in range(30)]
OLD_ITEMS = [f"i{number}" for number in range(20)]
NEW_USERS = [f"u{number}" for number in reversed(range(5, 40))]
"""u0 to u4 have vanished, u30 to u39 are new, and every id is another."""
NEW_ITEMS = ["new", *OLD_ITEMS[3:]]
SGD = {"sgd": {"lr": 0.1}}
ADAGRAD = {"adagrad": {"lr": 0.1}}


def write_graph(folder: Path, users: list[str], items: list[str], seed: int = 0) -> None:
    """Vocabularies, and edges between users and items of the same parity."""
    (folder / "vocab").mkdir(parents=True)
    for name, entities in (("user", users), ("item", items)):
        table = pa.table({"id": np.arange(len(entities)), "entity": entities})
        pq.write_table(table, folder / "vocab" / f"{name}.parquet")
    generator = np.random.default_rng(seed)
    lhs = generator.integers(len(users), size=400)
    rhs = (lhs % 2 + 2 * generator.integers(len(items) // 2, size=400)) % len(items)
    rel = generator.integers(2, size=400)
    (folder / "train").mkdir()
    pq.write_table(pa.table({"lhs": lhs, "rel": rel, "rhs": rhs}), folder / "train" / "0.parquet")


def config_of(
    folder: Path,
    rows: tuple[int, int],
    relations: tuple[str, str] = ("likes", "buys"),
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **sections: Any,
) -> TwhinConfig:
    tables = [
        {
            "name": name,
            "num_embeddings": count,
            "embedding_dim": DIM,
            "vocab": f"{folder}/vocab/{name}.parquet",
            "optimizer": optimizer or {"rowwise_adagrad": {"lr": 0.1}},
        }
        for name, count in zip(("user", "item"), rows, strict=True)
    ]
    tree = {
        "training": {"num_epochs": 2, "train_log_every_n": 4},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": name, "lhs": "user", "rhs": "item"} for name in relations],
            "loss": {"softmax": {}},
            "translation_optimizer": ADAGRAD,
            **(model or {}),
        },
        "train_data": {
            "data_root": f"{folder}/train/*.parquet",
            "per_replica_batch_size": 100,
            "global_negatives": 10,
        },
        **sections,
    }
    return build_config(TwhinConfig, tree, "test")


def old_config(folder: Path, **sections: Any) -> TwhinConfig:
    return config_of(folder, (len(OLD_USERS), len(OLD_ITEMS)), **sections)


def new_config(folder: Path, previous: Path, **settings: Any) -> TwhinConfig:
    sections = {
        key: settings.pop(key)
        for key in ("model", "optimizer", "training", "relations")
        if key in settings
    }
    warm = {"previous": str(previous), **settings}
    return config_of(folder, (len(NEW_USERS), len(NEW_ITEMS)), warm_start=warm, **sections)


@pytest.fixture(scope="module")
def old_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "graph"
    write_graph(folder, OLD_USERS, OLD_ITEMS)
    return folder


@pytest.fixture(scope="module")
def old(old_graph: Path) -> Path:
    """A finished run on the old vocabulary."""
    save_dir = old_graph.parent / "run"
    run(old_config(old_graph), save_dir)
    return save_dir


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "graph"
    write_graph(folder, NEW_USERS, NEW_ITEMS, seed=1)
    return folder


def saved(save_dir: Path) -> dict[str, Tensor]:
    return checkpoint.load_whole(save_dir / str(checkpoint.complete_steps(save_dir)[-1]))


def start(config: TwhinConfig, save_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and report of a run that has just begun."""
    save_dir.mkdir(exist_ok=True)
    tables = build_tables(table_specs(config.model), JOB, config.training.seed)
    model = TwhinModel(config.model, tables)
    _, optimizer_state = build_relation_optimizer(config.model, model)
    relations = {name: p.data for name, p in model.relation_parameters().items()}
    state = {**tables.state(), **relations, **optimizer_state}
    warm_start.begin(config, save_dir, model, state, JOB, MetricLog(save_dir, 1))
    return state, json.loads((save_dir / "warm_start.json").read_text())


def by_entity(rows: Tensor, entities: list[str]) -> dict[str, Tensor]:
    return dict(zip(entities, rows, strict=True))


@pytest.mark.parametrize("source", ["run", "step", "vectors"])
def test_rows_follow_their_entity_and_new_ones_start_as_in_a_cold_start(
    source: str, old: Path, graph: Path, tmp_path: Path
) -> None:
    steps = checkpoint.complete_steps(old)
    previous = {"run": old, "step": old / str(steps[-1]), "vectors": old / "vectors"}[source]
    config = new_config(graph, previous, relations=("buys", "shares"), optimizer_state=False)
    state, report = start(config, tmp_path / "run")
    before = saved(old)
    for number, (table, was, now) in enumerate(
        [("user", OLD_USERS, NEW_USERS), ("item", OLD_ITEMS, NEW_ITEMS)]
    ):
        rows = state[f"tables.{table}.weight"]
        known = by_entity(before[f"tables.{table}.weight"], was)
        cold = NormalRows(1, number, table_specs(config.model)[number])(0, len(now))
        for row, entity in enumerate(now):
            assert rows[row].equal(known.get(entity, cold[row])), entity
        assert not state[f"tables.{table}.accumulator"].any()
    counts = {"rows": 35, "matched": 25, "new": 10, "vanished": 5, "optimizer_state": False}
    assert report["tables"]["user"] == counts
    counts = {"rows": 18, "matched": 17, "new": 1, "vanished": 3, "optimizer_state": False}
    assert report["tables"]["item"] == counts
    assert state["translations"][0].equal(before["translations"][1])  # buys was the second
    assert not state["translations"][1].any()
    assert report["relations"] == {"matched": ["buys"], "new": ["shares"], "vanished": ["likes"]}
    assert {p.name for p in (tmp_path / "run" / FOLDER).iterdir()} == {"user.npy", "item.npy"}


@pytest.mark.parametrize("data_type", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_biases_and_inverse_relations_are_carried_over(
    data_type: torch.dtype, old_graph: Path, graph: Path, tmp_path: Path
) -> None:
    short = {torch.float16: "fp16", torch.bfloat16: "bf16"}[data_type]

    def of_type(config: TwhinConfig) -> TwhinConfig:
        tree = config.model_dump(mode="json", exclude_unset=True)
        for table in tree["model"]["embeddings"]["tables"]:
            table["data_type"] = short
        return build_config(TwhinConfig, tree, "test")

    model = {"biases": True, "reciprocal": True}
    before = of_type(old_config(old_graph, model=model))
    generator = torch.Generator().manual_seed(4)
    saved = {"translations": torch.randn(4, DIM, generator=generator)}  # 2 and their inverses
    for spec in table_specs(before.model):
        kind = torch.float32 if spec.name.endswith(".bias") else data_type
        rows = torch.randn(spec.num_rows, spec.dim, generator=generator).to(kind)
        saved[f"tables.{spec.name}.weight"] = rows
    folder = checkpoint.save(tmp_path / "old", 1, saved, {}, to_yaml(before))
    # buys was the second; its inverse follows all relations.
    names = ("buys", "shares")
    now = new_config(graph, folder, model=model, relations=names, optimizer_state=False)
    state, report = start(of_type(now), tmp_path / "run")
    for table, was, names_now in (("user", OLD_USERS, NEW_USERS), ("item", OLD_ITEMS, NEW_ITEMS)):
        weights, biases = state[f"tables.{table}.weight"], state[f"tables.{table}.bias.weight"]
        known = by_entity(saved[f"tables.{table}.weight"], was)
        known_biases = by_entity(saved[f"tables.{table}.bias.weight"], was)
        assert weights.dtype == data_type
        for row, entity in enumerate(names_now):
            if entity in known:
                assert weights[row].equal(known[entity]), entity
                assert biases[row, 0] == known_biases[entity][0]
            else:
                assert not biases[row].any()
    assert state["translations"][[0, 2]].equal(saved["translations"][[1, 3]])
    assert report["relations"]["matched"] == ["buys", "buys:inverse"]


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad"])
def test_accumulators_of_matched_rows_and_relations_are_carried_over(
    kind: str, old: Path, old_graph: Path, graph: Path, tmp_path: Path
) -> None:
    optimizer = {kind: {"lr": 0.1}}
    if kind == "adagrad":
        old = tmp_path / "old"
        run(old_config(old_graph, optimizer=optimizer), old)
    config = new_config(graph, old, optimizer=optimizer)
    state, report = start(config, tmp_path / "run")
    assert report["tables"]["user"]["optimizer_state"]
    before = saved(old)
    known = by_entity(before["tables.user.accumulator"], OLD_USERS)
    for entity, value in by_entity(state["tables.user.accumulator"], NEW_USERS).items():
        expected = known.get(entity, torch.zeros_like(value))
        assert value.equal(expected.view(value.shape)), entity
    assert before["translation_accumulator"].all()
    assert state["translation_accumulator"].equal(before["translation_accumulator"])


def test_new_rows_start_where_their_edges_ask_for_them(
    old: Path, graph: Path, tmp_path: Path
) -> None:
    # "new" has two edges with known users, u39 one with a known item; the others none.
    lhs = [NEW_USERS.index(user) for user in ("u7", "u9", "u39", "u35")]
    columns = {"lhs": lhs, "rel": [0, 1, 1, 0], "rhs": [0, 0, 5, 0]}
    shutil.copytree(graph, tmp_path / "graph")
    pq.write_table(pa.table(columns), tmp_path / "graph" / "train" / "0.parquet")
    config = new_config(tmp_path / "graph", old, new_rows="neighbors")
    state, report = start(config, tmp_path / "run")
    before = saved(old)
    user, item, b = (
        before[n] for n in ("tables.user.weight", "tables.item.weight", "translations")
    )
    mean = ((user[7] + b[0]) + (user[9] + b[1])) / 2
    length = item[3:].norm(dim=1).mean()
    expected = mean / mean.norm() * length
    torch.testing.assert_close(state["tables.item.weight"][0], expected)
    # ⟨θ_s + b, θ_t⟩ is largest, at a length, where θ_s lies along θ_t.
    asked = item[OLD_ITEMS.index(NEW_ITEMS[5])]
    found = state["tables.user.weight"][NEW_USERS.index("u39")]
    torch.testing.assert_close(found, asked / asked.norm() * user[5:].norm(dim=1).mean())
    cold = NormalRows(1, 0, table_specs(config.model)[0])(0, len(NEW_USERS))
    for name in ("u35", "u38"):  # whose neighbours are new themselves, who has none
        row = NEW_USERS.index(name)
        assert state["tables.user.weight"][row].equal(cold[row])
    assert report["tables"]["item"]["from_neighbors"] == 1
    assert report["tables"]["user"]["from_neighbors"] == 1


def one_step(config: TwhinConfig, anchors: Anchors | None) -> tuple[float, dict[str, Tensor]]:
    """Loss, and rows after one update, of two edges with drawn negatives."""
    tables = build_tables(table_specs(config.model), JOB, 1)
    model = TwhinModel(config.model, tables)
    model.anchors = anchors
    tables.set_learning_rates(0)
    columns = {name: np.array(values) for name, values in EDGES.items()}
    generator = np.random.default_rng(0)
    layout = EdgeLayout(config.model)
    batch = to_batch(columns, layout, config.train_data, generator, 2)
    torch.manual_seed(3)
    loss = model(batch, config.train_data)
    loss.backward()
    weights = {name: rows.clone() for name, rows in tables.state().items()}
    return loss.item(), weights


EDGES = {"lhs": [4, 4], "rel": [0, 1], "rhs": [2, 7]}


def write_anchors(folder: Path, config: TwhinConfig) -> dict[str, Tensor]:
    """Random previous vectors, none for user 5 and item 7."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    found = {}
    for table in config.model.embeddings.tables:
        rows = torch.randn(table.num_embeddings, DIM, generator=generator)
        rows[{"user": 5, "item": 7}[table.name]] = torch.nan
        np.save(folder / f"{table.name}.npy", rows.numpy())
        found[table.name] = rows
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_the_pull_is_that_of_the_formula_for_each_edges_entities(
    reciprocal: bool, dropout: float, graph: Path, tmp_path: Path
) -> None:
    model = {"reciprocal": reciprocal, "embedding_dropout": dropout}
    config = new_config(graph, tmp_path, optimizer=SGD, model=model, pull=0.25)
    previous = write_anchors(tmp_path / "anchors", config)
    loss, free = one_step(config, None)
    anchors = Anchors(tmp_path / "anchors", ["user", "item"], 0.25, freeze=False)
    pulled_loss, pulled = one_step(config, anchors)
    first = {
        s.name: NormalRows(1, i, s)(0, s.num_rows) for i, s in enumerate(table_specs(config.model))
    }
    scale = 0.25 * (2 if reciprocal else 1)
    # User 4 has two edges, item 2 one; item 7 has one and no previous vector.
    user, item = (first[t][r] - previous[t][r] for t, r in (("user", 4), ("item", 2)))
    expected = scale * (2 * user.square().sum() + item.square().sum())
    assert pulled_loss - loss == pytest.approx(expected.item(), rel=1e-4)
    for table, row, gradient in (("user", 4, 2 * user), ("item", 2, item)):
        name = f"tables.{table}.weight"
        change = -0.1 * 2 * scale * gradient
        torch.testing.assert_close(
            pulled[name][row] - free[name][row], change, rtol=1e-4, atol=1e-5
        )
        others = torch.arange(len(free[name])) != row
        torch.testing.assert_close(pulled[name][others], free[name][others], rtol=0, atol=1e-6)


@pytest.mark.parametrize("everyone", [False, True])
def test_frozen_rows_stay_to_the_bit_and_new_ones_learn(
    everyone: bool, old: Path, graph: Path, tmp_path: Path
) -> None:
    config = new_config(graph, old, freeze=True, model={"biases": True})
    if everyone:
        update = {"all_negatives": True, "global_negatives": 0}
        config = config.model_copy(
            update={"train_data": config.train_data.model_copy(update=update)}
        )
    run(config, tmp_path / "run")
    before = by_entity(saved(old)["tables.user.weight"], OLD_USERS)
    now = by_entity(saved(tmp_path / "run")["tables.user.weight"], NEW_USERS)
    cold = NormalRows(1, 0, table_specs(config.model)[0])(0, len(NEW_USERS))
    for row, (entity, vector) in enumerate(now.items()):
        assert vector.equal(before.get(entity, cold[row])) == (entity in before), entity
    drift = json.loads((tmp_path / "run" / "metrics.json").read_text())["drift"]
    assert drift["user"]["matched"] == 25
    assert drift["user"]["distance"] == 0
    assert drift["user"]["neighbors"]["kept"] == 1


def test_biases_of_frozen_rows_stay_too_and_are_not_pulled(graph: Path, tmp_path: Path) -> None:
    config = new_config(graph, tmp_path, optimizer=SGD, model={"biases": True}, freeze=True)
    previous = write_anchors(tmp_path / FOLDER, config)
    for name, rows in previous.items():
        np.save(tmp_path / FOLDER / f"{name}.bias.npy", rows[:, :1].numpy())
    _, moved = one_step(config, warm_start.anchors(config, tmp_path))
    assert not moved["tables.user.bias.weight"].any()
    assert moved["tables.item.bias.weight"].any(dim=1).nonzero().flatten().tolist() == [7]  # new
    _, free = one_step(config, None)
    assert free["tables.user.bias.weight"][4].any()
    pulled = new_config(graph, tmp_path, optimizer=SGD, model={"biases": True}, pull=0.5)
    _, moved = one_step(pulled, warm_start.anchors(pulled, tmp_path))
    assert moved["tables.user.bias.weight"].equal(free["tables.user.bias.weight"])


def test_a_run_taken_up_again_equals_the_unbroken_one_without_its_source(
    old: Path, graph: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(old, tmp_path / "old")
    config = new_config(graph, source, pull=0.1, optimizer_state=True)
    run(config, tmp_path / "unbroken")
    short = config.training.model_copy(update={"num_train_steps": 3})
    run(config.model_copy(update={"training": short}), tmp_path / "broken", evaluates=False)
    shutil.rmtree(source)
    run(config, tmp_path / "broken")
    whole, resumed = saved(tmp_path / "unbroken"), saved(tmp_path / "broken")
    assert set(whole) == set(resumed)
    for name, tensor in whole.items():
        assert tensor.equal(resumed[name]), name
    reports = [
        json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("unbroken", "broken")
    ]
    assert reports[0]["drift"] == reports[1]["drift"]
    shutil.rmtree(tmp_path / "broken" / FOLDER)
    with pytest.raises(CheckpointError, match="was not started with warm_start, or lost it"):
        run(config, tmp_path / "broken")


def test_a_stronger_pull_leaves_rows_nearer_to_where_they_were(
    old: Path, graph: Path, tmp_path: Path
) -> None:
    distances = []
    for pull in (0.0, 1.0, 100.0):
        config = new_config(
            graph, old, pull=pull, optimizer=SGD if pull < 100 else {"sgd": {"lr": 1e-3}}
        )
        run(config, tmp_path / str(pull))
        report = json.loads((tmp_path / str(pull) / "metrics.json").read_text())
        distances.append(report["drift"]["user"]["distance"])
    assert distances[0] > distances[1] > distances[2]


def test_without_accumulators_that_fit_a_run_starts_with_none(
    old: Path, graph: Path, tmp_path: Path
) -> None:
    for name, previous, optimizer in (
        ("vectors", old / "vectors", None),
        ("other", old, {"adagrad": {"lr": 0.1}}),
    ):
        state, report = start(new_config(graph, previous, optimizer=optimizer), tmp_path / name)
        assert not state["tables.user.accumulator"].any()
        assert not report["tables"]["user"]["optimizer_state"]


def test_tables_are_chosen_by_name(old: Path, graph: Path, tmp_path: Path) -> None:
    state, report = start(new_config(graph, old, tables=["item"]), tmp_path / "run")
    assert list(report["tables"]) == ["item"]
    spec = table_specs(new_config(graph, old).model)[0]
    assert state["tables.user.weight"].equal(NormalRows(1, 0, spec)(0, spec.num_rows))


def test_a_run_stands_for_the_step_that_is_exported_of_it(old_graph: Path, tmp_path: Path) -> None:
    training = {"num_epochs": 2, "checkpoint_every_n": 4}
    run(old_config(old_graph, training=training), tmp_path / "run")
    assert checkpoint.complete_steps(tmp_path / "run") == [4, 8]
    run_folder.write_json(tmp_path / "run" / "metrics.json", {"step": 8, "best_step": 8})
    for split, step in (("validation", 4), ("test", 8)):  # by test no step is chosen unasked
        write_best(tmp_path / "run", describe(4, split, Goal(), 0.5))
        folder, _ = resolve_run(tmp_path / "run", None)
        assert folder == tmp_path / "run" / str(step)
        assert open_previous(tmp_path / "run").folder == folder


def test_a_row_of_the_file_is_not_written_through(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones((2, DIM), np.float32))
    map_rows(tmp_path, "t")[0] = 7.0
    assert map_rows(tmp_path, "t")[0].eq(1).all()


# What cannot be started from


def spoil_nan(source: Path) -> Path:
    path = source / "vectors" / "user.parquet"
    columns = pq.read_table(path)
    rows = np.stack(columns.column("vector").to_pylist()).astype(np.float32)
    rows[7, 3] = np.nan
    at = columns.schema.get_field_index("vector")
    spoiled = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
    pq.write_table(columns.set_column(at, "vector", spoiled), path)
    return source / "vectors"


def spoil_names(source: Path) -> Path:
    path = source / "vectors" / "item.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["entity"]), path)
    return source / "vectors"


def spoil_double(source: Path) -> Path:
    path = source / "vectors" / "item.parquet"
    columns = pq.read_table(path)
    names = ["i1", *columns.column("entity").to_pylist()[1:]]
    at = columns.schema.get_field_index("entity")
    pq.write_table(columns.set_column(at, "entity", pa.array(names)), path)
    return source / "vectors"


def lose_names(source: Path) -> Path:
    """The exported vectors are gone, and the vocabulary of the config is of other data by now."""
    shutil.rmtree(source / "vectors")
    vocab = source.parent / "vocab.parquet"
    pq.write_table(pa.table({"id": np.arange(30), "entity": OLD_USERS[::-1]}), vocab)
    for config in source.glob("*/config.yaml"):
        text = config.read_text()
        lines = [
            f"      vocab: {vocab}" if "user.parquet" in line else line
            for line in text.splitlines()
        ]
        config.write_text("\n".join(lines))
    return source


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (spoil_nan, {}, r"table 'user', entity 'u7' \(row 7 .*not a finite number"),
        (spoil_names, {}, "item.parquet has no column entity"),
        (spoil_double, {}, "the previous vocabulary has the entity 'i1' twice"),
        (lose_names, {}, "entities of table 'user' .* are not known: .*vocab.parquet is of other"),
        (lambda source: source / "absent", {}, "there is no folder"),
        (lambda source: source.parent, {}, "neither a run folder with a complete step"),
        (lambda source: source / "vectors", {"optimizer_state": True}, "exported vectors .* none"),
        (Path, {"optimizer_state": True, "optimizer": SGD}, "trained with rowwise_adagrad and is"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_error(
    spoil: Callable[[Path], Path],
    settings: dict[str, Any],
    message: str,
    old: Path,
    graph: Path,
    tmp_path: Path,
) -> None:
    source = shutil.copytree(old, tmp_path / "old")
    previous = spoil(source)
    with pytest.raises((ConfigError, DataError), match=message):
        run(new_config(graph, previous, **settings), tmp_path / "run")
    left = (
        {path.name for path in (tmp_path / "run").glob("*")}
        if (tmp_path / "run").exists()
        else set()
    )
    assert not left & {"warm_start", "warm_start.tmp", "warm_start.json"}


def test_vectors_of_another_dimension_or_without_names_here_are_refused(
    old: Path, graph: Path, tmp_path: Path
) -> None:
    tree = new_config(graph, old).model_dump()
    for table in tree["model"]["embeddings"]["tables"]:
        table["embedding_dim"] = 16
    with pytest.raises(ConfigError, match="have dimension 8, table 'user' has embedding_dim 16"):
        run(TwhinConfig.model_validate(tree), tmp_path / "run")
    tree = new_config(graph, old).model_dump()
    tree["model"]["embeddings"]["tables"][1]["vocab"] = None
    with pytest.raises(ConfigError, match=r"table 'item' has no vocab.*warm_start\.tables"):
        run(TwhinConfig.model_validate(tree), tmp_path / "run")


def test_a_run_is_not_started_from_the_folder_that_it_would_overwrite(
    old: Path, graph: Path
) -> None:
    before = checkpoint.complete_steps(old)
    with pytest.raises(ConfigError, match="is the run folder itself"):
        run(new_config(graph, old / "vectors"), old, overwrite=True)
    assert checkpoint.complete_steps(old) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warm_start": {"previous": "x", "freeze": True, "pull": 1.0}}, "need no pull"),
        ({"warm_start": {"previous": "x", "tables": ["usr"]}}, "unknown table 'usr'; there are"),
        ({"training": {"initial_checkpoint_dir": "y"}}, "leave one of them out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    change: dict[str, Any], message: str, graph: Path
) -> None:
    tree = new_config(graph, Path("x")).model_dump()
    with pytest.raises(ConfigError, match=message):
        build_config(TwhinConfig, {**tree, **change}, "test")


def test_a_table_is_shown_by_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"rows": 4, "matched": 3, "new": 1, "vanished": 0, "optimizer_state": True}
    found = {"matched": ["likes", "follows"], "new": [], "vanished": ["reads"]}
    report = {"tables": {"a[b]": row}, "relations": found}
    Console(width=80).print(warm_start._render(report))
    said = capsys.readouterr().out
    assert "a[b]" in said
    assert "75.0%" in said
    assert "relations: 2 matched, 1 vanished" in said
