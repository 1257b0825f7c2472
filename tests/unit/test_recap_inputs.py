"""projects.home.recap.data.inputs: which files are read."""

import logging
from pathlib import Path
from typing import Any

import pytest

from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.inputs import input_files
from tml.config import ConfigError, build_config
from tml.data.parquet import DataError


def config(**keys: Any) -> RecapDataConfig:
    tree = {"feature_spec": "spec.yaml", "tasks": {"like": None}, **keys}
    return build_config(RecapDataConfig, tree, "test")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def found(folder: Path, config: RecapDataConfig) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in input_files(config)]


def test_a_glob_finds_files_in_order_also_below(tmp_path: Path) -> None:
    touch(tmp_path, "b.gz", "a.gz", "sub/deep/c.gz", "d.txt")
    (tmp_path / "folder.gz").mkdir()
    assert found(tmp_path, config(inputs=f"{tmp_path}/*.gz")) == ["a.gz", "b.gz"]
    everything = config(inputs=f"{tmp_path}/**/*.gz")
    assert found(tmp_path, everything) == ["a.gz", "b.gz", "sub/deep/c.gz"]
    first = config(inputs=f"{tmp_path}/**/*.gz", num_files_to_keep=2)
    assert found(tmp_path, first) == ["a.gz", "b.gz"]


def test_an_empty_glob_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"inputs: no file matches .*/\*\.gz"):
        input_files(config(inputs=f"{tmp_path}/*.gz"))


def test_days_run_up_to_the_end_and_hold_hours_or_files(tmp_path: Path) -> None:
    touch(tmp_path, "2023/02/28/b.gz", "2023/02/28/_SUCCESS", "2023/03/01/00/x.gz")
    touch(tmp_path, "2023/03/01/23/y.gz", "2023/02/27/early.gz", "2023/03/02/late.gz")
    days = {"data_root": str(tmp_path), "end_date": "2023-03-01", "days": 2}
    wanted = ["2023/02/28/b.gz", "2023/03/01/00/x.gz", "2023/03/01/23/y.gz"]
    assert found(tmp_path, config(explicit_date_inputs=days)) == wanted


def test_hours_run_over_midnight(tmp_path: Path) -> None:
    touch(tmp_path, "2023/02/28/23/b.gz", "2023/03/01/00/c.gz", "2023/02/28/22/a.gz")
    hours = {"data_root": str(tmp_path), "end_datetime": "2023-03-01 00", "hours": 2}
    wanted = ["2023/02/28/23/b.gz", "2023/03/01/00/c.gz"]
    assert found(tmp_path, config(explicit_datetime_inputs=hours)) == wanted


def test_missing_days_are_named_and_tolerated_to_a_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "2023/03/03/a.gz")
    days: dict[str, Any] = {"data_root": str(tmp_path), "end_date": "2023-03-03", "days": 3}
    with pytest.raises(DataError, match=r"2 of 3 days have no file: .*2023/03/01, .*2023/03/02 "):
        input_files(config(explicit_date_inputs=days))
    days["num_missing_days_tolerated"] = 2
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path, config(explicit_date_inputs=days)) == ["2023/03/03/a.gz"]
    assert "2023/03/01" in caplog.text


def test_all_hours_missing_is_not_tolerated(tmp_path: Path) -> None:
    hours = {"data_root": str(tmp_path), "end_datetime": "2023-03-01 00", "hours": 1}
    tolerant = config(explicit_datetime_inputs={**hours, "num_missing_hours_tolerated": 5})
    with pytest.raises(DataError, match="1 of 1 hours have no file"):
        input_files(tolerant)


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    days = {"data_root": str(tmp_path), "end_date": "1 March", "days": 1}
    with pytest.raises(ConfigError, match=r"explicit_date_inputs\.end_date: '1 March'"):
        input_files(config(explicit_date_inputs=days))
