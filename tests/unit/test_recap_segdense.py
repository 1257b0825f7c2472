"""projects.home.recap.data.segdense: a schema and records → rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.segdense import SegDenseLayout, read_schema
from tml.config import ConfigError, build_config
from tml.data.example import Column, Lists, encode_examples
from tml.data.parquet import DataError
from tml.data.tfrecord import BAD_RECORD, Block

PUBLISHED = Path(__file__).parents[2] / "projects/home/recap/config/home_recap_2022/segdense.json"
ENTRIES: list[dict[str, Any]] = [
    {"feature_name": "vals.cont", "dtype": "float_list", "length": 3},
    {"feature_name": "vals.bin", "dtype": "int64_list", "length": 2},
    {"feature_name": "vals.disc", "dtype": "int64_list", "length": 2},
    {"feature_name": "user.vector", "dtype": "float_list", "length": 2},
    {"feature_name": "meta.user_id", "dtype": "int64_list", "length": 1},
    {"feature_name": "tags", "dtype": "int64_list", "length": -1, "num_values": 5},
    {"feature_name": "name", "dtype": "bytes_list", "length": 1},
    {"feature_name": "like", "dtype": "int64_list", "length": 1},
    {"feature_name": "reply", "dtype": "int64_list", "length": 1},
]
RENAMED = {
    "continuous": "vals.cont",
    "binary": "vals.bin",
    "discrete": "vals.disc",
    "user": "user.vector",
    "meta__user_id": "meta.user_id",
}


def columns() -> dict[str, Column]:
    return {
        "vals.cont": np.array([[1, 2, 3], [np.nan, np.inf, 6]], dtype=np.float32),
        "vals.bin": np.array([[0, 1], [1, 0]]),
        "vals.disc": np.array([[-5, 1 << 40], [3, 4]]),
        "user.vector": np.array([[0.5, 1], [2, 3]], dtype=np.float32),
        "meta.user_id": np.array([[1 << 60], [8]]),
        "tags": Lists(np.array([1, 4, 2]), np.array([0, 2, 3])),
        "like": np.array([[1], [0]]),
        "reply": np.array([[0], [1]]),
    }


def config(
    folder: Path, entries: list[dict[str, Any]] = ENTRIES, **changes: Any
) -> RecapDataConfig:
    (folder / "schema.json").write_text(json.dumps({"schema": entries}))
    schema = {"schema_path": str(folder / "schema.json"), "renamed_features": RENAMED}
    tree = {"inputs": "*", "tasks": {"reply": None, "like": None}}
    tree |= {k: v for k, v in changes.items() if k in RecapDataConfig.model_fields}
    schema |= {k: v for k, v in changes.items() if k not in RecapDataConfig.model_fields}
    return build_config(RecapDataConfig, {**tree, "seg_dense_schema": schema}, "test")


def block(columns: dict[str, Column]) -> Block:
    return Block.of(encode_examples(columns), "file.gz")


def test_the_published_schema_has_its_22_entries() -> None:
    schema = read_schema(str(PUBLISHED))
    assert len(schema) == 22
    floats = {e.feature_name: e.length for e in schema.values() if e.dtype == "float_list"}
    assert floats == {
        "home_recap_2022_cont__segdense_vals": 6000,
        "user.timelines.twhin_user_follow_embeddings.twhin_user_follow_embeddings": 200,
        "user.timelines.twhin_user_engagement_embeddings.twhin_user_engagement_embeddings": 200,
        "original_author.timelines.twhin_author_follow_embeddings."
        "twhin_author_follow_embeddings": 200,
    }
    ints = {e.feature_name: e.length for e in schema.values() if e.dtype == "int64_list"}
    assert ints.pop("home_recap_2022_binary__segdense_vals") == 512
    assert ints.pop("home_recap_2022_discrete__segdense_vals") == 320
    assert set(ints.values()) == {1}
    assert sum(name.startswith("recap.engagement.") for name in ints) == 13
    assert {"meta.user_id", "meta.author_id", "meta.tweet_id"} < set(ints)


def test_records_become_rows_by_the_names_of_the_model(tmp_path: Path) -> None:
    layout = SegDenseLayout(config(tmp_path))
    features = layout.features
    assert features.tasks == ("reply", "like")
    assert (features.num_continuous, features.num_binary, features.num_discrete) == (3, 2, 2)
    assert (features.vectors, features.ids, features.bags) == ({"user": 2}, ("meta__user_id",), {})
    rows = layout.to_rows(block(columns()), None)
    np.testing.assert_array_equal(rows.continuous, columns()["vals.cont"])  # type: ignore[arg-type]
    assert rows.binary.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert rows.discrete.tolist() == [[-5, 1 << 40], [3, 4]]
    assert rows.labels.tolist() == [[0.0, 1.0], [1.0, 0.0]]  # columns: reply, like
    assert rows.vectors["user"].tolist() == [[0.5, 1.0], [2.0, 3.0]]
    assert rows.ids["meta__user_id"].tolist() == [1 << 60, 8]
    assert rows.weights.tolist() == [[1.0, 1.0]] * 2


def test_bags_are_read_where_features_asks_for_them(tmp_path: Path) -> None:
    layout = SegDenseLayout(config(tmp_path, features=["tags", "user"]))
    assert layout.features.bags == {"tags": 5}
    assert layout.features.num_continuous == 0
    rows = layout.to_rows(block(columns()), None)
    assert rows.bags["tags"].values.tolist() == [1, 4, 2]
    assert rows.bags["tags"].offsets.tolist() == [0, 2, 3]
    assert rows.continuous.shape == (2, 0)


def test_truncated_columns_are_those_that_are_decoded(tmp_path: Path) -> None:
    cut = {"continuous_feature_truncation": 2, "binary_feature_truncation": 1}
    layout = SegDenseLayout(config(tmp_path, preprocess={"truncate_and_slice": cut}))
    assert [f.width for f in layout.decoder.features[:2]] == [2, 1]
    rows = layout.to_rows(block(columns()), None)
    assert rows.continuous[0].tolist() == [1.0, 2.0]
    assert rows.binary.tolist() == [[0.0], [1.0]]


def test_a_default_in_the_schema_stands_for_absent_features(tmp_path: Path) -> None:
    entries = [dict(entry) for entry in ENTRIES]
    entries[0]["default"] = [7.0, 8.0, 9.0]
    layout = SegDenseLayout(config(tmp_path, entries))
    without = {name: column for name, column in columns().items() if name != "vals.cont"}
    assert layout.to_rows(block(without), None).continuous.tolist() == [[7.0, 8.0, 9.0]] * 2


def test_labels_may_be_absent_where_they_are_not_needed(tmp_path: Path) -> None:
    without = {name: column for name, column in columns().items() if name != "like"}
    layout = SegDenseLayout(config(tmp_path), needs_labels=False)
    assert layout.to_rows(block(without), None).labels.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    entries = [entry for entry in ENTRIES if entry["feature_name"] != "like"]
    layout = SegDenseLayout(config(tmp_path, entries), needs_labels=False)
    assert layout.to_rows(block(columns()), None).labels[:, 1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("vals.cont", None, "feature vals.cont is not there"),
        ("vals.bin", np.array([[1, 2, 3], [1, 2, 3]]), "vals.bin has 3 values, the schema says 2"),
        ("vals.cont", np.array([[1, 2, 3]] * 2), "vals.cont is a int64_list, the schema says flo"),
        ("like", np.array([[2], [2]]), "label like is 2; a label is 0 or 1"),
        ("reply", np.array([[-1], [-1]]), "label reply is -1; a label is 0 or 1"),
        ("tags", Lists(np.array([5, 1]), np.array([0, 1, 2])), "tags holds 5; its values are 0 to"),
    ],
)
def test_bad_records_are_refused_or_left_out_by_name(
    tmp_path: Path, name: str, column: Column | None, words: str
) -> None:
    layout = SegDenseLayout(config(tmp_path, features=["tags", "continuous", "binary"]))
    changed = columns() | {name: column}
    if column is None:
        del changed[name]
    bad = encode_examples(changed)[0]  # type: ignore[arg-type]
    records = [*encode_examples(columns()), bad]
    with pytest.raises(DataError, match=f"file.gz, record 2: .*{words}.*ignore_data_errors"):
        layout.to_rows(Block.of(records, "file.gz"), None)
    told: list[tuple[str, str]] = []
    rows = layout.to_rows(Block.of(records, "file.gz"), lambda *fault: told.append(fault))
    assert rows.labels.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    [(kind, message)] = told
    assert kind == BAD_RECORD
    assert message.startswith("file.gz, record 2: ")


def test_extracted_values_that_are_not_whole_name_the_record(tmp_path: Path) -> None:
    table = [{"name": "position", "source_tensor": "continuous", "index": 0}]
    extract = {"extract_features": {"extract_feature_table": table}}
    layout = SegDenseLayout(config(tmp_path, preprocess=extract))
    told: list[tuple[str, str]] = []
    rows = layout.to_rows(block(columns()), lambda *fault: told.append(fault))
    assert rows.ids["position"].tolist() == [1]
    assert "file.gz, record 1: column 0 of continuous, extracted as position, is nan" in told[0][1]


def test_mantissa_masks_go_by_either_name(tmp_path: Path) -> None:
    for name in ("user", "user.vector"):
        layout = SegDenseLayout(config(tmp_path, mask_mantissa_features={name: 22}))
        rows = layout.to_rows(block(columns()), None)
        torch.testing.assert_close(rows.vectors["user"], torch.tensor([[0.5, 1.0], [2.0, 3.0]]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {"liked": None}}, "tasks.liked: .* has no feature 'liked'; did you mean like"),
        ({"renamed_features": {"user": "user.vectr"}}, "did you mean user.vector"),
        ({"renamed_features": {"a": "tags", "b": "tags"}}, "a, b are all tags"),
        ({"renamed_features": {"continuous": "vals.bin"}}, "continuous must be a float_list"),
        ({"features": ["usr"]}, "seg_dense_schema.features: .* has no feature 'usr'; did you mean"),
        ({"features": ["name"]}, "name is a bytes_list .* take it out of features"),
        ({"tasks": {"vals.cont": None}}, "length 3; a label is one number"),
        ({"mask_mantissa_features": {"user": 24}}, "the mantissa of a float has 23"),
    ],
)
def test_names_that_the_schema_lacks_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        SegDenseLayout(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "wanted is"),
        ('{"schema": []}', "schema: List should have at least 1 item"),
        ('{"schema": [{"feature_name": "a", "dtype": "text", "length": 1}]}', "schema.0.dtype"),
        (json.dumps({"schema": [ENTRIES[0], ENTRIES[0]]}), "given twice: vals.cont"),
    ],
)
def test_a_schema_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_schema(str(tmp_path / "schema.json"))


def test_a_schema_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read: No such file"):
        read_schema(str(tmp_path / "absent.json"))
