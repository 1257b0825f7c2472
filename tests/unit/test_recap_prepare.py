"""prepare: joins, splits, vocabularies, statistics and rates, with numbers worked out by hand."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from projects.home.recap import prepare
from projects.home.recap.preparation.config import PrepareConfig
from projects.home.recap.preparation.derive import bucketise, quantile_edges
from projects.home.recap.preparation.rates import log_odds_of_rate
from tml.config import ConfigError, build_config
from tml.data.parquet import DataError

CONFIG: dict[str, Any] = {
    "table": "rows",
    "time": {"column": "day", "format": "%Y%m%d"},
    "split": {
        "by_time": {"train_until": "2024-01-03", "validation": ["2024-01-04", None]},
    },
    "labels": {"click": None},
}
# Six rows: user a on days 1, 1, 2, 3; user b on day 2; on day 4, for validation, user a.
ROWS: dict[str, list[Any]] = {
    "user": ["a", "a", "a", "a", "b", "a"],
    "day": [20240101, 20240101, 20240102, 20240103, 20240102, 20240104],
    "click": [1, 0, 1, 0, 0, 1],
    "size": [1.0, 2.0, 3.0, 6.0, None, 1000.0],
    "color": ["red", "blue", "red", "red", "blue", "green"],
    "tags": ["x,y", "x", "", None, "y,z", "x,new"],
    "watched": [9, 0, 9, 0, 0, 9],
}


def make(
    folder: Path, rows: dict[str, list[Any]], *tables: dict[str, list[Any]], **config: Any
) -> dict[str, Any]:
    """Prepare `rows` (and `other` tables) in folder/out; returns the summary."""
    folder.mkdir(exist_ok=True)
    inputs = {"rows": folder / "rows.csv"}
    pl.DataFrame(rows).write_csv(inputs["rows"])
    for number, table in enumerate(tables):
        inputs[f"other{number}"] = folder / f"other{number}.csv"
        pl.DataFrame(table).write_csv(inputs[f"other{number}"])
    tree = {**CONFIG, **config}
    tree = {key: value for key, value in tree.items() if value is not None}
    built = build_config(PrepareConfig, tree, "test")
    return prepare.prepare(built, inputs, folder / "out", overwrite=True)


def read(folder: Path, split: str = "train") -> pl.DataFrame:
    return pl.read_parquet(folder / "out" / split / "*.parquet")


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def close(values: Any, wanted: list[float]) -> bool:
    return list(values) == pytest.approx(wanted, abs=1e-5, nan_ok=True)


# Rates


def test_a_training_row_sees_the_labels_of_earlier_days_and_a_validation_row_all_of_training(
    tmp_path: Path,
) -> None:
    make(tmp_path, ROWS, target_encodings=[{"keys": ["user"], "prior": 2}])
    # Day 1 sees nothing. Day 2 sees day 1: of user a 1 click of 2, the mean is 1/2; of user b
    # nothing. Day 3 sees days 1 and 2: of user a 2 of 3, the mean is 2/4.
    day_2 = logit((1 + 2 * 0.5) / (2 + 2)) - logit(0.5)
    day_3 = logit((2 + 2 * 0.5) / (3 + 2)) - logit(0.5)
    train = read(tmp_path)
    assert day_2 == 0
    assert close(train["user:click"], [0, 0, day_2, day_3, 0])
    assert close(train["user:count"], [0, 0, math.log(3), math.log(4), 0])
    # Validation: user a has 2 clicks of 4, the mean is 2/5.
    seen = logit((2 + 2 * 0.4) / (4 + 2)) - logit(0.4)
    validation = read(tmp_path, "validation")
    assert close(validation["user:click"], [seen])
    assert close(validation["user:count"], [math.log(5)])


def test_labels_of_the_same_day_later_days_and_validation_change_no_rate(tmp_path: Path) -> None:
    encodings = [{"keys": ["user"], "prior": 2}, {"keys": ["user", "color"], "prior": 1}]
    make(tmp_path / "1", ROWS, target_encodings=encodings)
    changed = {**ROWS, "click": [1, 0, 1, 1, 0, 0]}  # those of day 3 and of validation
    make(tmp_path / "2", changed, target_encodings=encodings)
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    rates = [name for name in one.columns if ":" in name]
    assert len(rates) == 4
    assert one.select(rates).equals(two.select(rates))
    validation = read(tmp_path / "1", "validation"), read(tmp_path / "2", "validation")
    assert not validation[0].select(rates).equals(validation[1].select(rates))  # day 3 counts


def test_a_row_held_out_of_the_training_span_sees_earlier_days_alone(tmp_path: Path) -> None:
    # Held out: user h on day 2. Training: users a to d on days 1, 2, 3 under the same item.
    rows: dict[str, list[Any]] = {
        "user": ["a", "b", "h", "c", "d", "v"],
        "item": [7, 7, 7, 7, 7, 7],
        "day": [20240101, 20240101, 20240102, 20240102, 20240103, 20240104],
        "click": [1, 0, 1, 1, 0, 1],
    }
    split = {**CONFIG["split"], "hold_out": {"share": 0.2, "key": "user"}}
    encodings = [{"keys": ["item"], "prior": 2}]
    for seed in range(100):  # until the hash holds out h alone
        config = {"split": split, "target_encodings": encodings, "ids": ["item"], "seed": seed}
        summary = make(tmp_path, rows, categorical={"user": None}, **config)
        held = read(tmp_path, "held_out") if "held_out" in summary["rows"] else None
        if held is not None and len(held) == 1 and len(read(tmp_path)) == 4:
            vocabulary = pl.read_parquet(tmp_path / "out" / "vocabularies" / "user.parquet")
            if "h" not in vocabulary["value"]:
                break
    else:
        raise AssertionError("no seed holds out h")
    # Two rows of day 1, one of them a click, of a mean of 1/2: no more is known on day 2.
    assert close(held["item:count"], [math.log1p(2)])
    assert close(held["item:click"], [logit((1 + 2 * 0.5) / 4) - logit(0.5)])
    assert close(read(tmp_path)["item:count"], [0, 0, math.log1p(2), math.log1p(3)])
    assert close(read(tmp_path, "validation")["item:count"], [math.log1p(4)])


def test_a_row_of_a_fold_sees_the_other_folds_only(tmp_path: Path) -> None:
    encodings = [{"keys": ["user"], "prior": 0, "fold": "kfold", "folds": 2}]
    rows = {**ROWS, "click": [0, 0, 0, 0, 0, 1]}
    for at in range(5):
        rows["click"] = [int(row == at) for row in range(5)] + [1]
        make(tmp_path, rows, target_encodings=encodings)
        alone = read(tmp_path)["user:click"][at]
        # The only click is the row's own, so nothing that it sees was clicked.
        assert alone <= 0


def test_a_null_key_knows_nothing(tmp_path: Path) -> None:
    rows = {**ROWS, "user": [None, None, None, "a", "b", None]}
    make(tmp_path, rows, target_encodings=[{"keys": ["user"]}])
    assert close(read(tmp_path)["user:count"], [0, 0, 0, 0, 0])
    assert close(read(tmp_path, "validation")["user:click"], [0])


def test_the_log_odds_of_a_rate_stay_finite() -> None:
    import numpy as np

    values = log_odds_of_rate(
        np.array([0.0, 5.0, 0.0]), np.array([5.0, 5.0, 0.0]), np.array([0.5, 0.5, np.nan]), 0.0
    )
    assert np.isfinite(values).all()
    assert values[0] < -10
    assert values[1] > 10
    assert values[2] == 0


def test_a_history_gives_counts_and_rates_by_key_and_by_joined_key(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {**ROWS, "item": [1, 1, 2, 2, 1, 3]}
    items = {"item": [1, 2, 3], "maker": ["m", "m", "n"]}
    events = {
        "who": ["a", "a", "a", "b"],
        "what": ["shown", "shown", "like", "shown"],
        "item": [1, 2, 2, 3],
    }
    make(
        tmp_path,
        rows,
        items,
        events,
        inputs={"other1": {"rename": {"who": "user"}}},
        joins=[{"table": "other0", "key": "item"}],
        histories=[
            {
                "table": "other1",
                "relation": "what",
                "shown": "shown",
                "prior": 1,
                "joins": [{"table": "other0", "key": "item"}],
                "keys": [["user"], ["user", "maker"]],
            }
        ],
    )
    train = read(tmp_path)
    assert close(train["other1:user:shown"], [math.log(3)] * 4 + [math.log(2)])
    assert close(train["other1:user:like"], [math.log(2)] * 4 + [0])
    # Likes over shown: 1/3 in all; of user a (1 + 1/3) / (2 + 1).
    user_a = logit((1 + 1 / 3) / 3) - logit(1 / 3)
    user_b = logit((0 + 1 / 3) / 2) - logit(1 / 3)
    assert close(train["other1:user:like/shown"], [user_a] * 4 + [user_b])
    assert close(train["other1:user+maker:shown"], [math.log(3)] * 4 + [0])
    assert close(read(tmp_path, "validation")["other1:user+maker:shown"], [0])  # a, maker n


# What is learned


def test_a_value_that_only_validation_has_maps_to_0_and_moves_nothing(tmp_path: Path) -> None:
    features: dict[str, Any] = {
        "continuous": [
            {"column": "size", "transform": "standardise"},
            {"name": "rank", "column": "size", "transform": "quantile"},
        ],
        "derive": [{"name": "level", "buckets_of": "size", "num_buckets": 2}],
        "categorical": {"color": None, "level": None},
        "bags": {"tags": None},
    }
    make(tmp_path / "1", ROWS, **features)
    changed = {name: values[:-1] for name, values in ROWS.items()}
    for name, value in (("size", -5e6), ("color", "violet"), ("tags", "q,q,q"), ("user", "z")):
        changed[name] = [*changed[name], value]
    changed["day"], changed["click"] = ROWS["day"], [1, 0, 1, 0, 0, 0]
    changed["watched"] = ROWS["watched"]
    make(tmp_path / "2", changed, **features)
    for name in ("statistics.json", "learned.json", "spec.yaml"):
        one, two = ((tmp_path / n / "out" / name).read_text() for n in ("1", "2"))
        assert one == two
    for name in ("color", "level", "tags"):
        path = f"out/vocabularies/{name}.parquet"
        assert pl.read_parquet(tmp_path / "1" / path).equals(pl.read_parquet(tmp_path / "2" / path))
    assert read(tmp_path / "1").equals(read(tmp_path / "2"))
    validation = read(tmp_path / "1", "validation")
    assert validation["categorical.color"].to_list() == [0]
    assert validation["bags.tags"].to_list() == [[1, 0]]


def test_numbers_lists_and_vocabularies_are_as_worked_out_by_hand(tmp_path: Path) -> None:
    summary = make(
        tmp_path,
        ROWS,
        continuous=[
            {"column": "size", "transform": "standardise"},
            {"name": "raw", "column": "size"},
        ],
        categorical={"color": None, "common": {"column": "color", "min_count": 3}},
        bags={"tags": None},
        derive=[{"name": "pair", "cross": ["user", "color"]}, {"name": "gone", "is_null": "size"}],
        binary=["gone"],
    )
    train = read(tmp_path)
    # Sizes 1, 2, 3, 6: mean 3, deviation sqrt(14 / 4).
    scaled = [(x - 3) / math.sqrt(3.5) for x in (1, 2, 3, 6)]
    assert close(train["size"], [*scaled, math.nan])
    assert close(train["raw"], [1, 2, 3, 6, math.nan])
    assert train["gone"].to_list() == [0, 0, 0, 0, 1]
    # red is there three times, blue twice.
    assert train["categorical.color"].to_list() == [1, 2, 1, 1, 2]
    assert train["categorical.common"].to_list() == [1, 0, 1, 1, 0]
    # x and y are there twice, z once.
    assert train["bags.tags"].to_list() == [[1, 2], [1], [], [], [2, 3]]
    assert summary["features"]["categorical"] == {"color": 3, "common": 2}
    assert summary["unknown"]["common"] == {"train": 0.4, "validation": 1.0}
    assert summary["rows"] == {"train": 5, "validation": 1}
    assert summary["positives"] == {"click": {"train": 2, "validation": 1}}
    statistics = json.loads((tmp_path / "out/statistics.json").read_text())
    logs = [math.log(1 + x) for x in (1, 2, 3, 6, 0)]  # the missing size counts as 0
    assert statistics["names"] == ["size", "raw"]
    assert statistics["mean"][1] == pytest.approx(sum(logs) / 5)


def test_buckets_hold_their_upper_edge_and_null_stays_null() -> None:
    values = pl.Series([1.0, 2.0, 3.0, 4.0, None, math.nan])
    edges = quantile_edges(values, 2)
    assert edges == [2.0]
    assert bucketise(values, edges).to_list() == [0, 0, 1, 1, None, None]


def test_hour_weekday_and_items_of_text(tmp_path: Path) -> None:
    rows = {**ROWS, "hourmin": [0, 59, 100, 2359, 1305, 1]}
    make(
        tmp_path,
        rows,
        derive=[
            {"name": "hour", "hour_of": "hourmin", "format": "hourmin"},
            {"name": "weekday", "weekday_of": "day", "format": "%Y%m%d"},
            {"name": "second", "item_of": "tags", "index": 1},
        ],
        ids=["hour", "weekday"],
        categorical={"second": None},
    )
    train = read(tmp_path)
    assert train["hour"].to_list() == [0, 0, 1, 23, 13]
    assert train["weekday"].to_list() == [1, 1, 2, 3, 2]  # 1 January 2024 was a Monday
    assert train["categorical.second"].to_list() == [1, 0, 0, 0, 2]


# Labels and outcomes


@pytest.mark.parametrize(
    "features",
    [
        {"continuous": ["watched"]},
        {"continuous": ["click"]},
        {"categorical": {"hidden": {"column": "watched"}}},
        {"bags": {"watched": None}},
        {"binary": ["click"]},
        {"target_encodings": [{"keys": ["user", "watched"]}]},
        {"derive": [{"name": "w", "is_null": "watched"}], "binary": ["w"]},
        {"inputs": {"rows": {"derive": [{"name": "w", "is_null": "watched"}]}}, "binary": ["w"]},
        {
            "derive": [
                {"name": "w", "cross": ["user", "watched"]},
                {"name": "v", "cross": ["w", "color"]},
            ],
            "categorical": {"v": None},
        },
    ],
)
def test_a_feature_made_of_an_outcome_or_a_label_is_refused(
    tmp_path: Path, features: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="not known when the prediction is made"):
        make(tmp_path, ROWS, outcomes=["watched"], **features)
    assert not (tmp_path / "out").exists()


def test_an_outcome_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outcomes: there is no column 'wathced'"):
        make(tmp_path, ROWS, outcomes=["wathced"], continuous=["watched"])


def test_a_label_is_no_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ids: 'click' is a label"):
        make(tmp_path, ROWS, ids=["click"])


def test_a_label_may_be_whether_a_column_has_a_value_which_is_then_no_feature(
    tmp_path: Path,
) -> None:
    labels = {"is_red": {"column": "color", "equals": "red"}}
    make(tmp_path, ROWS, labels=labels, categorical={"user": None})
    assert read(tmp_path)["label.is_red"].to_list() == [1, 0, 1, 1, 0]
    with pytest.raises(ConfigError, match="'color' is made of color"):
        make(tmp_path, ROWS, labels=labels, categorical={"color": None})


def test_a_label_that_is_not_0_or_1_is_an_error_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2 has 3 in 'click'"):
        make(tmp_path, {**ROWS, "click": [1, 0, 3, 0, 0, 1]})


# Joins and splits


def test_a_join_adds_columns_keeps_the_order_and_leaves_nulls(tmp_path: Path) -> None:
    users = {"user": ["b", "c"], "age": [30, 40]}
    make(
        tmp_path,
        ROWS,
        users,
        joins=[{"table": "other0", "key": "user", "prefix": "user_"}],
        continuous=["user_age"],
    )
    nan = math.nan
    assert close(read(tmp_path)["user_age"], [nan, nan, nan, nan, 30])


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    users = {"user": ["b", "b"], "age": [30, 40]}
    with pytest.raises(DataError, match="user 'b' is there more than once"):
        make(tmp_path, ROWS, users, joins=[{"table": "other0", "key": "user"}])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["1", "01", "x"], "cannot be compared"),
        (["1", "01", "3"], "item 1 is there more than once"),
        ([1.0, 1.5, 3.0], "holds 1.5, that of the rows whole numbers"),
    ],
)
def test_keys_that_become_one_in_the_type_of_the_rows_double_no_row(
    tmp_path: Path, keys: list[Any], message: str
) -> None:
    rows: dict[str, list[Any]] = {**ROWS, "item": [1, 1, 2, 2, 1, 3]}
    items = {"item": keys, "maker": ["m", "n", "o"]}
    text = ["item"] if isinstance(keys[0], str) else []
    with pytest.raises(DataError, match=message):
        make(
            tmp_path,
            rows,
            items,
            joins=[{"table": "other0", "key": "item"}],
            inputs={"other0": {"text": text}},
        )


def test_a_joined_column_that_the_rows_have_needs_a_prefix(tmp_path: Path) -> None:
    users = {"user": ["b"], "size": [30]}
    with pytest.raises(ConfigError, match="have size already; set another prefix"):
        make(tmp_path, ROWS, users, joins=[{"table": "other0", "key": "user"}])


def test_days_outside_all_spans_are_left_out(tmp_path: Path) -> None:
    spans = {
        "train_from": "2024-01-02",
        "train_until": "2024-01-02",
        "validation": ["2024-01-03", "2024-01-03"],
        "test": ["2024-01-04", None],
    }
    summary = make(tmp_path, ROWS, split={"by_time": spans})
    assert summary["rows"] == {"train": 2, "validation": 1, "test": 1}


def test_the_last_days_or_a_share_of_users_can_be_held_out_of_training(tmp_path: Path) -> None:
    split = {**CONFIG["split"], "hold_out": {"last_days": 1}}
    summary = make(tmp_path, ROWS, split=split)
    assert summary["rows"] == {"train": 4, "held_out": 1, "validation": 1}

    many = {name: values[:5] * 200 + values[5:] for name, values in ROWS.items()}
    many["user"] = [f"u{i // 10}" for i in range(1001)]
    split = {**CONFIG["split"], "hold_out": {"share": 0.3, "key": "user"}}
    summary = make(tmp_path, many, split=split, categorical={"user": None})
    assert 200 < summary["rows"]["held_out"] < 400
    assert summary["rows"]["held_out"] % 10 == 0  # users stay together
    assert summary["unknown"]["user"]["held_out"] == 1.0


def test_splits_may_be_files_and_na_is_a_text(tmp_path: Path) -> None:
    for name, colors in (("train", ["NA", "NA", "b"]), ("test", ["c", "NA"])):
        text = "color,click\n" + "".join(f"{color},{i % 2}\n" for i, color in enumerate(colors))
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    tree = {
        "split": {"by_table": {"train": "train", "validation": "test"}},
        "labels": {"click": None},
        "categorical": {"color": None},
    }
    config = build_config(PrepareConfig, tree, "test")
    inputs = {name: tmp_path / f"{name}.csv.gz" for name in ("train", "test")}
    prepare.prepare(config, inputs, tmp_path / "out")
    assert read(tmp_path)["categorical.color"].to_list() == [1, 1, 2]
    assert read(tmp_path, "validation")["categorical.color"].to_list() == [0, 1]


def test_a_span_without_rows_is_an_error_that_names_the_days(tmp_path: Path) -> None:
    spans = {"train_until": "2024-01-05", "validation": ["2024-01-06", None]}
    with pytest.raises(
        DataError, match=r"no row falls into validation; .* 2024-01-01 to 2024-01-04"
    ):
        make(tmp_path, ROWS, split={"by_time": spans})


def test_validation_may_not_begin_before_training_ends() -> None:
    spans = {"train_until": "2024-01-05", "validation": ["2024-01-05", None]}
    with pytest.raises(ConfigError, match="not after train_until"):
        build_config(PrepareConfig, {**CONFIG, "split": {"by_time": spans}}, "test")


# The folder and the command line


def test_an_error_leaves_no_half_folder_and_an_earlier_output_stays(tmp_path: Path) -> None:
    make(tmp_path, ROWS)
    before = (tmp_path / "out/summary.json").read_text()
    with pytest.raises(ConfigError, match="no column 'absent'"):
        make(tmp_path, ROWS, continuous=["absent"])
    assert (tmp_path / "out/summary.json").read_text() == before
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_that_is_not_its_own_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds something else"):
        make(tmp_path, ROWS)
    assert (tmp_path / "out/thesis.tex").exists()


def test_the_command_line_takes_inputs_and_changes_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pl.DataFrame(ROWS).write_csv(tmp_path / "rows.csv")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    flags = ["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]
    given = ["--input", f"rows={tmp_path / 'rows.csv'}"]
    span = ["--set", "split.by_time.train_until=2024-01-01"]
    span += ["--set", "split.by_time.validation=[2024-01-02, 2024-01-02]"]
    assert prepare.main([*flags, *given, *span, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 2, "validation": 2}
    assert prepare.main([*flags, *given]) == 2
    assert "not empty" in capsys.readouterr().err
    assert prepare.main([*flags, "--overwrite"]) == 2
    assert "missing: rows" in capsys.readouterr().err
    assert prepare.main([*flags, *given, "--overwrite"]) == 0
    assert "rows and positives" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kuairand", "census_income"])
def test_the_shipped_configs_load_and_use_no_outcome(name: str) -> None:
    from tml.config import load_config

    folder = Path(prepare.__file__).parent / "config" / "prepare"
    config = load_config(PrepareConfig, folder / f"{name}.yaml")
    outcomes = {"play_time_ms", "profile_stay_time", "comment_stay_time", "is_follow"}
    assert name != "kuairand" or outcomes <= set(config.outcomes)
    label = config.label_column(list(config.labels)[-1])
    with pytest.raises(ConfigError, match="not known when the prediction is made"):
        load_config(PrepareConfig, folder / f"{name}.yaml", [f"categorical.{label}=null"])
