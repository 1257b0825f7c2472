"""The planted world: its probabilities are what the labels follow, and the best is what it says."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.planted import PlantedConfig, best_possible, ensure
from projects.home.recap.data.tables import describe
from tml.config import ConfigError

SMALL = PlantedConfig(num_rows=20_000, num_validation_rows=5000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure(SMALL, tmp_path_factory.mktemp("planted") / "world")


def test_labels_follow_their_true_probability(folder: Path) -> None:
    table = pq.read_table(folder / "train")
    for task, wanted in SMALL.tasks.items():
        p = table.column(f"true_probability.{task}").to_numpy()
        y = table.column(f"label.{task}").to_numpy()
        assert abs(p.mean() - wanted.rate) < 0.01
        # In each tenth by probability the labels stay within 5 standard errors of it.
        for part in np.array_split(np.argsort(p), 10):
            error = np.sqrt((p[part] * (1 - p[part])).sum())
            assert abs(y[part].sum() - p[part].sum()) < 5 * error


def test_the_best_possible_numbers_are_those_of_the_true_probabilities() -> None:
    labels = np.array([False, False, True, True])
    best = best_possible(np.array([0.25, 0.5, 0.4, 0.75]), labels)
    # Pairs: (.4, .25) (.75, .25) (.75, .5) in order, (.4, .5) not.
    assert best["auc"] == 3 / 4
    loss = -np.log([0.75, 0.5, 0.4, 0.75]).mean()
    assert best["log_loss"] == pytest.approx(loss)
    assert best["rce"] == pytest.approx(100 * (np.log(2) - loss) / np.log(2))


def test_no_true_probability_is_a_feature(folder: Path) -> None:
    config = RecapDataConfig(
        inputs=f"{folder}/train/*.parquet",
        feature_spec=str(folder / "spec.yaml"),
        tasks=dict.fromkeys(SMALL.tasks),
    )
    features = describe(config)
    assert not [n for n in features.continuous_names + features.ids if "true" in n]
    assert "true_probability" not in (folder / "spec.yaml").read_text()


def test_the_same_config_is_made_once_and_another_anew(tmp_path: Path) -> None:
    config = PlantedConfig(num_rows=500, num_validation_rows=100)
    made = ensure(config, tmp_path / "world") / "train" / "part-0.parquet"
    first = pl.read_parquet(made)
    before = made.stat().st_mtime_ns
    ensure(config, tmp_path / "world")
    assert made.stat().st_mtime_ns == before
    ensure(config.model_copy(update={"seed": 2}), tmp_path / "world")
    assert not pl.read_parquet(made).equals(first)
    ensure(config, tmp_path / "world")
    assert pl.read_parquet(made).equals(first)
    assert json.loads((tmp_path / "world/planted.json").read_text())["best"].keys() == {
        "click",
        "like",
        "reply",
    }


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        ensure(SMALL, tmp_path)
