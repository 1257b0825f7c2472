"""The feature spec: what it refuses, and how raw values become rows."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from projects.home.recap.data.spec import (
    FeatureSpec,
    Vocabulary,
    hash_values,
    names_of,
    num_values,
)
from tml.config import ConfigError, build_config


def spec(**values: Any) -> FeatureSpec:
    return build_config(FeatureSpec, {"labels": ["click"], **values}, "spec.yaml")


def test_a_block_gives_a_name_for_each_of_its_numbers() -> None:
    columns = spec(continuous=["age", {"column": "past", "width": 2}]).continuous
    assert names_of(columns) == ("age", "past.0", "past.1")


def test_a_label_that_is_a_feature_too_is_refused() -> None:
    for features in (
        {"continuous": ["click"]},
        {"categorical": {"x": {"column": "click", "num_values": 2}}},
        {"vectors": {"click": 3}},
        {"ids": ["click"]},
        {"timestamp": "click"},
    ):
        with pytest.raises(ConfigError, match="click: a label cannot be a feature"):
            spec(**features)


def test_a_categorical_feature_needs_exactly_one_way_to_rows() -> None:
    with pytest.raises(ConfigError, match="exactly one of num_values, hash_rows, vocabulary"):
        spec(categorical={"x": {"num_values": 3, "hash_rows": 5}})
    with pytest.raises(ConfigError, match="exactly one of"):
        spec(bags={"x": {}})


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="continuous: age: named twice"):
        spec(continuous=["age", "age"])


def test_values_become_their_row_and_all_others_row_0(tmp_path: Path) -> None:
    pl.DataFrame({"value": ["b", "a"]}).write_parquet(tmp_path / "v.parquet")
    vocabulary = Vocabulary.read(tmp_path / "v.parquet")
    assert vocabulary.rows(pa.array(["a", None, "b", "c"])).tolist() == [2, 0, 1, 0]
    assert Vocabulary(pa.array(["b", None])).rows(pa.array([None, "b"])).tolist() == [0, 1]
    assert len(vocabulary) == 3
    one = spec(categorical={"x": {"vocabulary": "v.parquet"}}).categorical["x"]
    assert num_values(one, tmp_path) == 3


def test_numbers_are_known_to_a_vocabulary_as_text() -> None:
    vocabulary = Vocabulary(pa.array(["10", "7"]))
    assert vocabulary.rows(pa.array([7, 10, 8])).tolist() == [2, 1, 0]


def test_a_vocabulary_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    one = spec(categorical={"x": {"vocabulary": "absent.parquet"}}).categorical["x"]
    with pytest.raises(ConfigError, match=r"absent\.parquet cannot be read"):
        num_values(one, tmp_path)


def test_hashed_values_spread_over_rows_1_and_on_and_null_is_0() -> None:
    rows = hash_values(pa.array(range(10_000)), 11)
    counts = [int((rows == row).sum()) for row in range(11)]
    assert counts[0] == 0
    assert min(counts[1:]) > 880
    assert max(counts[1:]) < 1120
    assert hash_values(pa.array([None, 5], pa.int64()), 11)[0] == 0
    assert hash_values(pa.array([None, None], pa.string()), 11).tolist() == [0, 0]


def test_servers_can_hash_as_the_documentation_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    section = text.split("## Values with hash_rows")[1]
    told: dict[str, Any] = {}
    exec(section.split("```python")[1].split("```")[0], told)
    vector = section.split("With hash_rows 1001: ")[1].split(".\n")[0].replace("−", "-")
    pairs = dict(one.strip("`").split(" → ") for one in vector.split(", "))
    assert len(pairs) == 7
    for shown, row in pairs.items():
        value = json.loads(shown.strip("`"))
        assert hash_values(pa.array([value]), 1001).tolist() == [int(row)]
    values = [0, 1, -1, 2**63 - 1, -(2**63), None], ["", "a", "ñ" * 300, None]
    for some in values:
        for num_rows in (2, 3, 1001, 2**31):
            wanted = [told["row"](value, num_rows) for value in some]
            assert hash_values(pa.array(some), num_rows).tolist() == wanted


def test_how_a_file_stores_a_value_does_not_change_its_row() -> None:
    for values in (pa.array([5, -1, None, 5]), pa.array(["x", None, "y", "x"])):
        stored = values.dictionary_encode()
        assert hash_values(stored, 1000).tolist() == hash_values(values, 1000).tolist()


def test_hashes_never_change() -> None:
    # splitmix64 of 0 is 0xE220A8397B1DCDAF (Vigna's reference).
    assert hash_values(pa.array([0]), 1001).tolist() == [0xE220A8397B1DCDAF % 1000 + 1]
    text = hash_values(pa.array(["post", "like", "post"]), 1_000_001).tolist()
    assert text[0] == text[2] != text[1]
    assert (
        text
        == hash_values(pa.chunked_array([["post", "like", "post"]]).chunk(0), 1_000_001).tolist()
    )
