"""The ranker's configuration: the published file's values, and rules between its parts."""

from pathlib import Path
from typing import Any

import pytest

from projects.home.recap.config import RecapConfig
from projects.home.recap.predict import read_weights
from tml.config import ConfigError, build_config, load_config, read_yaml, to_yaml

CONFIGS = Path(__file__).parents[2] / "projects/home/recap/config"
LOCAL_PROD = CONFIGS / "local_prod.yaml"


@pytest.fixture(scope="module")
def published() -> RecapConfig:
    return load_config(RecapConfig, LOCAL_PROD)


def tree() -> dict[str, Any]:
    return read_yaml(LOCAL_PROD)


def test_the_published_file_has_the_published_values(published: RecapConfig) -> None:
    training = published.training
    assert (training.num_train_steps, training.num_eval_steps) == (10, 5)
    assert (training.checkpoint_every_n, training.eval_timeout_in_s) == (5, 7200)
    assert len(published.model.tasks) == 10
    assert len(published.train_data.tasks) == 13
    assert published.train_data.global_batch_size == 128
    assert len(published.validation_data) == 12
    report = "recap.engagement.is_report_tweet_clicked"
    dropout = published.model.tasks[report].mlp_config
    assert dropout is not None
    assert dropout.dropout is not None
    assert dropout.dropout.rate == 0.2
    rates = published.validation_data["is_report_tweet_clicked"].task_data(report)
    assert (rates.pos_downsampling_rate, rates.neg_downsampling_rate) == (1.0, 0.000014)


def test_each_task_has_its_own_learning_rate(published: RecapConfig) -> None:
    at = published.optimizer.learning_rates_at(tuple(published.model.tasks), 1000)
    assert at["backbone"] == pytest.approx(1e-4)
    assert at["recap.engagement.is_favorited"] == pytest.approx(8e-4 / 5)
    assert at["recap.engagement.is_video_playback_50"] == pytest.approx(3e-3)


def test_a_resolved_config_reads_back_as_itself(published: RecapConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(published))
    assert load_config(RecapConfig, path) == published


def test_keys_without_a_meaning_are_accepted_and_told() -> None:
    given = tree()
    more = {"cache": False, "file_batch_size": 16, "dataset_service_compression": "AUTO"}
    given["train_data"] |= {
        **more,
        "map_num_parallel_calls": 2,
        "interleave_num_parallel_calls": 4,
        "num_files_to_keep": None,
        "explicit_date_inputs": None,
        "explicit_datetime_inputs": None,
    }
    config = build_config(RecapConfig, given, "test")
    assert sorted(config.train_data.ignored_keys()) == sorted(more)


def test_a_task_that_the_data_lacks_is_refused_with_both_lists() -> None:
    given = tree()
    del given["train_data"]["tasks"]["recap.engagement.is_replied"]
    with pytest.raises(ConfigError) as error:
        build_config(RecapConfig, given, "test")
    text = str(error.value)
    assert "train_data.tasks: recap.engagement.is_replied of the model is missing" in text
    assert "Model: recap.engagement.is_favorited, " in text
    assert "train_data.tasks: recap.engagement.is_bookmarked, " in text


def test_a_learning_rate_of_no_task_is_refused() -> None:
    given = tree()
    rates = given["optimizer"]["multi_task_learning_rates"]["tower_learning_rates"]
    rates["recap.engagement.is_shared"] = {"constant": 0.1}
    with pytest.raises(ConfigError, match=r"no task of the model is called .*is_shared"):
        build_config(RecapConfig, given, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"num_train_steps": None, "num_epochs": None}}, "training would have no end"),
        (
            {"training": {"num_train_steps": 1, "initial_checkpoint_parts": ["inputs"]}},
            "set initial_checkpoint_dir",
        ),
        ({"validation_data": {"a/b": tree()["train_data"]}}, "a partition names a folder"),
        ({"calibration": {"partition": "test"}}, "'test' is not in validation_data"),
        (
            {
                "calibration": {"partition": "validation"},
                "training": {"num_train_steps": 1, "evaluated_by": "evaluator"},
            },
            "calibration is fitted and saved by the trainer",
        ),
        (
            {"optimizer": {"single_task_learning_rate": {"constant": 1}, "adam": {"lr": 1}}},
            "adam.lr",
        ),
    ],
)
def test_rules_between_parts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(RecapConfig, tree() | change, "test")


def test_probabilities_are_calibrated_only_where_rows_are_not_weighted() -> None:
    given = tree()
    task = "recap.engagement.is_replied"
    rates = {"pos_downsampling_rate": 0.5, "neg_downsampling_rate": 0.1}
    given["train_data"]["tasks"][task] = rates
    weighted = build_config(RecapConfig, given, "test")
    assert weighted.sampling_ratios() == {}
    given["training"]["downsampling_correction"] = "calibration"
    calibrated = build_config(RecapConfig, given, "test")
    assert calibrated.sampling_ratios()[task] == pytest.approx(0.2)


def test_the_weights_of_2023_are_shipped(published: RecapConfig) -> None:
    weights = read_weights(CONFIGS / "weights_2023.yaml", list(published.model.tasks))
    assert weights.keys() == published.model.tasks.keys()
    assert weights["recap.engagement.is_report_tweet_clicked"] == -369
    assert weights["recap.engagement.is_replied_reply_engaged_by_author"] == 75
    assert sum(weights.values()) == pytest.approx(-319.995)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("like: 1", "like: no task of the model"), ("click: x", "'x'")],
)
def test_bad_weights_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path / "weights.yaml", ["click"])
