"""projects.home.recap.data.preprocess: what happens to rows between file and batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.data.config import Preprocess, RecapDataConfig
from projects.home.recap.data.preprocess import (
    Preprocessor,
    concatenate,
    mask_mantissa,
    round_to,
    scatter,
    take_rows,
    weigh,
)
from tml.config import ConfigError, build_config
from tml.data.parquet import DataError

HOUR = 3_600_000
RAW = Features(
    tasks=("like", "reply"),
    num_continuous=4,
    num_binary=3,
    num_discrete=2,
    vectors={"user": 2},
    ids=("served_timestamp", "impressed_timestamp", "liked_at"),
    continuous_names=("c0", "c1", "c2", "c3"),
)


def preprocessor(mask: dict[str, int] | None = None, **keys: Any) -> Preprocessor:
    return Preprocessor(build_config(Preprocess, keys, "test"), RAW, mask)


def rows(
    labels: list[list[float]], ids: dict[str, list[int]] | None = None, **changes: Any
) -> RankingBatch:
    count = len(labels)
    values = {
        "continuous": torch.arange(count * 4.0).reshape(count, 4),
        "binary": torch.arange(count * 3.0).reshape(count, 3),
        "discrete": torch.arange(count * 2).reshape(count, 2),
        "labels": torch.tensor(labels),
        "weights": torch.ones(count, 2),
        "vectors": {"user": torch.zeros(count, 2)},
        "ids": {name: torch.tensor(values) for name, values in (ids or {}).items()},
    }
    return RankingBatch(**{**values, **changes})


def test_a_label_counts_within_the_window_after_the_impression_alone() -> None:
    step = preprocessor(
        rectify_labels={
            "label_rectification_window_in_hours": 2,
            "label_to_engaged_timestamp_field": {"like": "liked_at"},
        }
    )
    start = 100 * HOUR
    cases = [  # served, impressed, liked, whether it counts
        (start, start + HOUR, start + 3 * HOUR, 1),  # the last moment after the impression
        (start, start + HOUR, start + 3 * HOUR + 1, 0),
        (start, 0, start + 2 * HOUR, 1),  # no impression: serving counts
        (start, 0, start + 2 * HOUR + 1, 0),
        (start, start + HOUR, start + HOUR - 1, 0),  # before it was shown
        (start, start, 0, 0),  # no engagement
    ]
    ids = {
        "served_timestamp": [case[0] for case in cases],
        "impressed_timestamp": [case[1] for case in cases],
        "liked_at": [case[2] for case in cases],
    }
    found = step.rows(rows([[1.0, 1.0]] * len(cases), ids)).labels
    assert found[:, 0].tolist() == [case[3] for case in cases]
    assert found[:, 1].tolist() == [1] * len(cases)  # a label without a timestamp stays


def test_negatives_are_dropped_and_the_others_weigh_more() -> None:
    step = preprocessor(downsample_negatives={"batch_multiplier": 2, "engagements_list": ["like"]})
    labels = [[float(i in (1, 6)), 1.0] for i in range(8)]
    found = step.sample(rows(labels), np.random.default_rng(1))
    # 4 of 8 rows: both likes, and 2 of the 6 others with weight 6 / 2.
    likes = found.labels[:, 0]
    assert (len(found), likes.sum()) == (4, 2)
    assert found.weights.tolist() == [[1.0, 1.0] if like else [3.0, 3.0] for like in likes]
    assert found.weights[:, 0].sum() == 8
    again = step.sample(rows(labels), np.random.default_rng(1))
    assert torch.equal(found.continuous, again.continuous)


def test_dropping_negatives_leaves_labels_and_the_sum_of_weights_unbiased() -> None:
    step = preprocessor(downsample_negatives={"batch_multiplier": 4, "engagements_list": ["like"]})
    rng = np.random.default_rng(1)
    # Of 8 rows 2 are kept; with one like that is usual, with more there is no room for others.
    for num_likes in (1, 2, 3):
        labels = [[float(i < num_likes), 0.0] for i in range(8)]
        drawn = [step.sample(rows(labels), rng) for _ in range(2000)]
        assert all(len(batch) == 2 for batch in drawn)
        assert all(float(batch.weights[:, 0].sum()) == 8 for batch in drawn)
        weighted = torch.stack([(b.labels * b.weights)[:, 0].sum() for b in drawn]).mean()
        assert float(weighted) == pytest.approx(num_likes, rel=0.05)


def test_negatives_are_dropped_by_rectified_labels() -> None:
    step = preprocessor(
        rectify_labels={"label_to_engaged_timestamp_field": {"like": "liked_at"}},
        downsample_negatives={"batch_multiplier": 2, "engagements_list": ["like"]},
    )
    late = {
        "served_timestamp": [HOUR] * 4,
        "impressed_timestamp": [0] * 4,
        "liked_at": [9 * HOUR, 9 * HOUR, 9 * HOUR, 2 * HOUR],
    }
    found = step.sample(step.rows(rows([[1.0, 0.0]] * 4, late)), np.random.default_rng(1))
    # Of four likes one is in time: it is kept with weight 1, and one of the three others with 3.
    assert sorted(found.weights[:, 0].tolist()) == [1.0, 3.0]
    assert found.labels[:, 0].sum() == 1


def test_columns_are_extracted_before_they_are_cut_away() -> None:
    step = preprocessor(
        truncate_and_slice={"continuous_feature_truncation": 2, "binary_feature_truncation": 1},
        extract_features={
            "extract_feature_table": [
                {"name": "position", "source_tensor": "continuous", "index": 3},
                {"name": "kind", "source_tensor": "discrete", "index": 1},
            ]
        },
    )
    assert (step.features.num_continuous, step.features.num_binary) == (2, 1)
    assert step.features.continuous_names == ("c0", "c1")
    assert step.features.ids == (*RAW.ids, "position", "kind")
    assert (step.needed_columns("continuous"), step.needed_columns("binary")) == (4, 1)
    found = step.rows(rows([[0.0, 0.0]] * 2))
    assert found.continuous.tolist() == [[0, 1], [4, 5]]
    assert found.ids["position"].tolist() == [3, 7]
    assert found.ids["kind"].tolist() == [1, 3]


def test_only_whole_numbers_are_extracted() -> None:
    table = [{"name": "position", "source_tensor": "continuous", "index": 0}]
    step = preprocessor(extract_features={"extract_feature_table": table})
    for value in (0.5, float("nan"), float("inf")):
        values = torch.zeros(2, 4)
        values[1, 0] = value
        with pytest.raises(DataError, match=f"extracted as position, is {value:g}; only whole"):
            step.rows(rows([[0.0, 0.0]] * 2, continuous=values))


def test_masks_choose_columns_after_the_truncation(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.array([True, False, True]))
    cut = {
        "continuous_feature_truncation": 3,
        "continuous_feature_mask_path": str(tmp_path / "mask.npy"),
    }
    step = preprocessor(truncate_and_slice=cut)
    assert step.features.continuous_names == ("c0", "c2")
    assert step.rows(rows([[0.0, 0.0]])).continuous.tolist() == [[0, 2]]
    with pytest.raises(ConfigError, match="wanted are 4 booleans"):
        preprocessor(truncate_and_slice={**cut, "continuous_feature_truncation": None})


@pytest.mark.parametrize(
    ("kind", "values", "rounded"),
    [
        ("bfloat16", [1.00390625, 3.0], [1.0, 3.0]),  # 8 bits: 1 + 2^-8 is a tie, to even
        ("float16", [1 + 2**-12, 65519.0], [1.0, 65504.0]),
        ("float32", [1 + 2**-12], [1 + 2**-12]),
        ("bool", [0.0, -0.5, 7.0], [0.0, 1.0, 1.0]),
        ("uint8", [-3.0, 2.9, 300.0, float("nan")], [0.0, 2.0, 255.0, 0.0]),
        ("int8", [-300.0, -2.9, float("inf")], [-128.0, -2.0, 127.0]),
    ],
)
def test_values_are_rounded_as_if_stored(
    kind: str, values: list[float], rounded: list[float]
) -> None:
    assert round_to(torch.tensor(values), kind).tolist() == rounded


def test_low_bits_of_the_mantissa_are_cleared() -> None:
    values = torch.tensor([1 + 2**-3 + 2**-23, -(1 + 2**-20), float("inf"), 0.0])
    values.view(torch.int32)[3] = 0x7F800001  # a NaN that is told from infinity by its lowest bit
    found = mask_mantissa(values, 20)
    assert found[:3].tolist() == [1.125, -1.0, float("inf")]
    assert found[3].isnan()
    step = preprocessor({"user": 23}, downcast={"features": {"binary": "bool"}})
    batch = step.rows(rows([[0.0, 0.0]], vectors={"user": torch.tensor([[1.5, -3.9]])}))
    assert batch.vectors["user"].tolist() == [[1.0, -2.0]]
    assert batch.binary.tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"downcast": {"features": {"discrete": "int8"}}}, "'discrete' is none of continuous,"),
        ({"truncate_and_slice": {"continuous_feature_truncation": 5}}, "5 columns are wanted, co"),
        (
            {"rectify_labels": {"label_to_engaged_timestamp_field": {"like": "when"}}},
            "no timestamp 'when'",
        ),
        (
            {"rectify_labels": {"label_to_engaged_timestamp_field": {"hate": "liked_at"}}},
            "'hate' is none of the tasks: like, reply",
        ),
        (
            {"downsample_negatives": {"batch_multiplier": 2, "engagements_list": ["hate"]}},
            "'hate' is none of the tasks",
        ),
        (
            {
                "extract_features": {
                    "extract_feature_table": [{"name": "x", "source_tensor": "binary", "index": 3}]
                }
            },
            "index 3; binary has 3 columns",
        ),
    ],
)
def test_names_that_the_data_lacks_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preprocessor(**keys)


def test_rates_become_weights_of_each_task() -> None:
    tasks = {
        "like": {"pos_downsampling_rate": 0.5, "neg_downsampling_rate": 0.01},
        "reply": None,
    }
    tree = {"feature_spec": "spec.yaml", "inputs": "*", "tasks": tasks}
    config = build_config(RecapDataConfig, tree, "test")
    batch = rows([[1.0, 0.0], [0.0, 1.0]], weights=torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
    found = weigh(batch, ("like", "reply"), config).weights
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0], [300.0, 3.0]]))


def test_rows_are_taken_and_joined_with_their_lists() -> None:
    bag = Bag(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 2, 2, 6]))
    batch = rows([[0.0, 0.0]] * 3, {"id": [7, 8, 9]}, bags={"tags": bag})
    taken = take_rows(batch, torch.tensor([2, 0, 1]))
    assert taken.ids["id"].tolist() == [9, 7, 8]
    assert taken.bags["tags"].values.tolist() == [3, 4, 5, 6, 1, 2]
    assert taken.bags["tags"].offsets.tolist() == [0, 4, 6, 6]
    joined = concatenate([taken, batch.slice(2, 3)])
    assert joined.ids["id"].tolist() == [9, 7, 8, 9]
    assert joined.bags["tags"].offsets.tolist() == [0, 4, 6, 6, 10]
    assert joined.bags["tags"].values.tolist() == [3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    mixed = scatter([batch, batch.slice(0, 1)], torch.tensor([3, 0, 1, 2]))
    assert mixed.ids["id"].tolist() == [8, 9, 7, 7]
    assert mixed.continuous[:, 0].tolist() == [4, 8, 0, 0]
    assert mixed.bags["tags"].offsets.tolist() == [0, 0, 4, 6, 8]
    assert mixed.bags["tags"].values.tolist() == [3, 4, 5, 6, 1, 2, 1, 2]
