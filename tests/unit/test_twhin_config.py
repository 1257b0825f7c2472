"""TwhinConfig: the published shape loads, and the rules between fields."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from projects.twhin.config import TwhinConfig
from tml.config import ConfigError, build_config, load_config

GOLDEN = Path(__file__).parents[1] / "golden"
SHIPPED = sorted((Path(__file__).parents[2] / "projects" / "twhin" / "config").glob("*.yaml"))


def minimal() -> dict[str, Any]:
    return {
        "model": {
            "embeddings": {
                "tables": [
                    {"name": "user", "num_embeddings": 3, "embedding_dim": 4},
                    {"name": "tweet", "num_embeddings": 5, "embedding_dim": 4},
                ]
            },
            "relations": [{"name": "fav", "lhs": "user", "rhs": "tweet"}],
        },
        "train_data": {"data_root": "x/*.parquet", "in_batch_negatives": 1},
    }


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(TwhinConfig, tree, "test")
    return str(caught.value)


def test_yaml_of_the_published_shape_loads_unchanged() -> None:
    config = load_config(TwhinConfig, GOLDEN / "published_local.yaml")
    tables = config.model.embeddings.tables
    assert [(t.name, t.num_embeddings, t.optimizer.learning_rate_at(0)) for t in tables] == [
        ("user", 424_241, 0.01),
        ("tweet", 72_543, 0.005),
    ]
    assert [r.name for r in config.model.relations] == ["fav", "reply", "retweet", "magic_recs"]
    assert config.train_data.limit == 9990
    assert config.validation_data is not None
    assert config.validation_data.offset == 9990
    assert config.model.loss.logistic is not None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    tree = yaml.safe_load(path.read_text())
    base = None
    if "tables" not in tree["model"]["embeddings"]:
        base = tmp_path / "graph.yaml"  # what prepare.py says of the data
        relations = tree["evaluation"].get("relations", ["knows"])
        graph = {
            "model": {
                "embeddings": {"tables": [{"name": "user", "num_embeddings": 3}]},
                "relations": [{"name": name, "lhs": "user", "rhs": "user"} for name in relations],
            },
            "train_data": {"data_root": "x/*.parquet"},
            "validation_data": {"data_root": "y/*.parquet"},
        }
        base.write_text(yaml.safe_dump(graph))
    config = load_config(TwhinConfig, path, base=base)
    data = config.train_data
    assert data.global_negatives > 0 or data.all_negatives


def test_unknown_keys_are_refused_in_relations_too() -> None:
    tree = minimal()
    tree["model"]["relations"][0]["colour"] = 2
    assert "model.relations.0.colour: unknown key" in refusal(tree)


def test_a_relation_naming_an_unknown_table_is_refused_with_those_there() -> None:
    tree = minimal()
    tree["model"]["relations"][0]["rhs"] = "twet"
    message = refusal(tree)
    assert "relations.0.rhs" in message
    assert "'twet'; there are user, tweet" in message


@pytest.mark.parametrize(("field", "value"), [("embedding_dim", 8), ("data_type", "fp16")])
def test_tables_of_unequal_dimension_or_data_type_are_refused(field: str, value: object) -> None:
    tree = minimal()
    tree["model"]["embeddings"]["tables"][1][field] = value
    assert f"all tables must have the same {field}" in refusal(tree)


def test_names_given_twice_are_refused() -> None:
    tree = minimal()
    tree["model"]["relations"] *= 2
    assert "relations: the name 'fav' is given twice" in refusal(tree)


def test_an_unknown_operator_is_refused_with_the_known_ones() -> None:
    tree = minimal()
    tree["model"]["relations"][0]["operator"] = "rotation"
    assert "'translation', 'identity', 'diagonal'" in refusal(tree)


def test_training_without_negatives_is_refused() -> None:
    tree = minimal()
    tree["train_data"]["in_batch_negatives"] = 0
    assert "global_negatives or in_batch_negatives" in refusal(tree)


def test_defaults_fill_what_tables_leave_out_and_nothing_else() -> None:
    tree = minimal()
    for table in tree["model"]["embeddings"]["tables"]:
        del table["embedding_dim"]
    tree["model"]["embeddings"]["defaults"] = {
        "embedding_dim": 16,
        "optimizer": {"sgd": {"lr": 0.5}},
    }
    tree["model"]["embeddings"]["tables"][1]["optimizer"] = {"sgd": {"lr": 0.25}}
    tables = build_config(TwhinConfig, tree, "test").model.embeddings.tables
    assert [t.embedding_dim for t in tables] == [16, 16]
    assert [t.optimizer.learning_rate_at(0) for t in tables] == [0.5, 0.25]


def test_an_unknown_relation_to_evaluate_is_refused() -> None:
    tree = minimal() | {"evaluation": {"relations": ["fave"]}}
    assert "unknown relation 'fave'; there are fav" in refusal(tree)


def test_an_operator_of_all_relations_takes_the_place_of_their_own() -> None:
    tree = minimal()
    tree["model"]["relations"][0]["operator"] = "translation"
    tree["model"]["operator"] = "diagonal"
    assert build_config(TwhinConfig, tree, "test").model.relations[0].operator == "diagonal"


def test_complex_numbers_need_a_dimension_of_two_halves_that_fbgemm_takes() -> None:
    tree = minimal()
    tree["model"]["operator"] = "complex_diagonal"
    assert "complex_diagonal of relation 'fav' needs an embedding_dim that is a multiple of 8" in (
        refusal(tree)
    )
    for table in tree["model"]["embeddings"]["tables"]:
        table["embedding_dim"] = 16
    build_config(TwhinConfig, tree, "test")


def test_all_negatives_need_no_others_and_take_none() -> None:
    tree = minimal()
    tree["train_data"] |= {"all_negatives": True}
    assert "takes the place of drawn negatives" in refusal(tree)
    tree["train_data"]["in_batch_negatives"] = 0
    build_config(TwhinConfig, tree, "test")


def test_all_negatives_of_a_large_table_are_refused_with_the_numbers() -> None:
    tree = minimal()
    tree["model"]["embeddings"]["tables"][0]["num_embeddings"] = 1_000_000
    tree["train_data"] |= {
        "in_batch_negatives": 0,
        "all_negatives": True,
        "per_replica_batch_size": 1000,
    }
    message = refusal(tree)
    assert "1,000 edges a batch × 1,000,000 rows of table 'user' are 1,000,000,000" in message
    assert "make per_replica_batch_size 268 at most" in message
    tree["train_data"]["per_replica_batch_size"] = 268
    build_config(TwhinConfig, tree, "test")
    tree["training"] = {"gradient_accumulation": 2}
    assert "536 edges a batch" in refusal(tree)
    # By distinct questions, a block of them at a time.
    tree["train_data"] |= {"grouped": True, "asks": "rhs"}
    build_config(TwhinConfig, tree, "test")


def test_grouped_passes_need_all_negatives_and_ask_for_both_sides_as_often() -> None:
    tree = minimal()
    tree["train_data"] |= {"grouped": True}
    assert "train_data: grouped: it saves products with all rows of a table" in refusal(tree)
    tree["train_data"] |= {"all_negatives": True, "in_batch_negatives": 0}
    for passes in (1, 3):
        tree["training"] = {"num_epochs": passes}
        message = refusal(tree)
        assert "training.num_epochs: with train_data.grouped a pass asks for one side" in message
        assert f"make it {passes + 1} (two passes are one epoch" in message
    data = build_config(TwhinConfig, {**tree, "training": {"num_epochs": 2}}, "test").train_data
    assert [data.sides(epoch) for epoch in range(4)] == [("rhs",), ("lhs",)] * 2
    for side in ("lhs", "rhs"):
        tree["train_data"]["asks"] = side
        data = build_config(TwhinConfig, tree, "test").train_data
        assert [data.sides(epoch) for epoch in range(3)] == [(side,)] * 3
    tree["validation_data"] = {**tree["train_data"]}
    assert "validation_data.grouped: it is for passes of training" in refusal(tree)


def test_passes_by_turns_are_measured_after_both_sides() -> None:
    tree = minimal()
    tree["train_data"] |= {"all_negatives": True, "in_batch_negatives": 0, "grouped": True}
    tree |= {"training": {"num_epochs": 4}, "validation_data": {"data_root": "v"}}
    for during in ({}, {"every_n_epochs": 1}, {"every_n_epochs": 3}, {"every_n_epochs": 0.5}):
        tree["evaluation"] = {"during_training": during}
        message = refusal(tree)
        assert "evaluation.during_training.every_n_epochs: with train_data.grouped" in message
        assert "make every_n_epochs 2 or a multiple" in message
        one_side = {**tree, "train_data": {**tree["train_data"], "asks": "rhs"}}
        build_config(TwhinConfig, one_side, "test")
    for during in ({"every_n_epochs": 2}, {"every_n_epochs": 4}):
        tree["evaluation"] = {"during_training": during}
        build_config(TwhinConfig, tree, "test")
    tree["evaluation"] = {"during_training": {"every_n": 3}}  # a pass's steps are not known here
    message = refusal(tree)
    assert "every_n: with train_data.grouped a pass asks for one side, and every 3 ste" in message
    assert "give every_n_epochs in place of every_n, 2 or a multiple" in message
    tree["train_data"]["asks"] = "rhs"
    build_config(TwhinConfig, tree, "test")


def test_ranking_during_training_without_validation_data_names_both_remedies() -> None:
    message = refusal({**minimal(), "evaluation": {"during_training": {}}})
    assert "evaluation.during_training: it ranks validation_data, which is unset" in message
    assert "`prepare --valid" in message
    assert "--set evaluation.during_training=null" in message


def test_grouped_passes_are_refused_where_a_question_is_not_scored_once() -> None:
    tree = minimal()
    tree["train_data"] |= {"all_negatives": True, "in_batch_negatives": 0, "grouped": True}
    tree["training"] = {"num_epochs": 2}
    tree["model"]["loss"] = {"margin_ranking": {}}
    assert "train_data.grouped: a question is scored once with the losses softmax" in refusal(tree)
    tree["model"]["loss"] = {"logistic": {"negatives": "mean"}}
    assert "train_data.grouped" in refusal(tree)
    tree["model"] |= {"loss": {"softmax": {}}, "comparator": "l2"}
    build_config(TwhinConfig, tree, "test")
    tree["model"]["relations"][0]["operator"] = "diagonal"
    assert "no candidate goes through a relation's operator" in refusal(tree)
    build_config(TwhinConfig, {**tree, "model": {**tree["model"], "reciprocal": True}}, "test")
    tree["train_data"]["asks"] = "rhs"
    build_config(TwhinConfig, tree, "test")


def test_precision_is_given_or_chosen() -> None:
    tree = minimal()
    for value in (True, False, "auto"):
        tree["runtime"] = {"enable_amp": value}
        assert build_config(TwhinConfig, tree, "test").runtime.enable_amp == value
    tree["runtime"] = {"enable_amp": "some"}
    assert "runtime.enable_amp" in refusal(tree)


def test_validation_compares_with_all_only_where_training_does() -> None:
    tree = minimal()
    tree["validation_data"] = {"data_root": "x/*.parquet", "all_negatives": True}
    assert "validation_data.all_negatives: train_data must have it too" in refusal(tree)


def test_only_drawn_negatives_can_be_corrected() -> None:
    tree = minimal()
    tree["model"]["loss"] = {"softmax": {"log_q": True}}
    assert "log_q: only negatives that are drawn" in refusal(tree)
    tree["train_data"] |= {"in_batch_negatives": 0, "global_negatives": 5}
    build_config(TwhinConfig, tree, "test")
    tree["validation_data"] = {"data_root": "x/*.parquet", "in_batch_negatives": 5}
    assert "use validation_data.global_negatives alone" in refusal(tree)


def test_degrees_decide_only_how_global_negatives_are_drawn() -> None:
    tree = minimal()
    tree["train_data"]["degree_power"] = 0.75
    assert "degree_power: it decides how global_negatives are drawn" in refusal(tree)
    tree["train_data"]["degree_power"] = 0
    tree["validation_data"] = {
        "data_root": "x/*.parquet",
        "global_negatives": 5,
        "degree_power": 0.75,
    }
    assert "validation_data.degree_power: degrees are counted where" in refusal(tree)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user.bias", "'user.bias' may be the name of a file, or of the biases, of the table 'use"),
        ("user.ids", "'user.ids' may be the name of a file"),
        ("relations", "'relations' is the name of an exported file"),
        ("relation_matrices", "'relation_matrices' is the name of an exported file"),
        ("../user", "'../user' cannot be the name of a file"),
    ],
)
def test_a_table_may_not_have_the_name_of_another_file(name: str, message: str) -> None:
    tree = minimal()
    tree["model"]["embeddings"]["tables"][1]["name"] = name
    tree["model"]["relations"][0]["rhs"] = name
    assert message in refusal(tree)
    tree["model"]["embeddings"]["tables"][1]["name"] = "user_eng"
    tree["model"]["relations"][0]["rhs"] = "user_eng"
    build_config(TwhinConfig, tree, "test")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("relations", 0, "sampling_rate"), 1.5),
        (("relations", 0, "weight"), 0),
        (("embedding_dropout",), 1.0),
        (("regularization",), {"n3": -0.1}),
        (("loss",), {"margin_ranking": {"margin": 0}}),
        (("comparator",), "l1"),
    ],
)
def test_numbers_out_of_range_are_refused(path: tuple[Any, ...], value: object) -> None:
    tree = minimal()
    at = tree["model"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert ".".join(map(str, path)) in refusal(tree)
