"""Which files are read: by glob, by days or by hours (`input_files`)."""

import glob
import logging
import os
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from projects.home.recap.data.config import (
    ExplicitDateInputs,
    ExplicitDatetimeInputs,
    RecapDataConfig,
)
from tml.config import ConfigError
from tml.data.parquet import DataError

logger = logging.getLogger(__name__)

DAY, HOUR = "%Y-%m-%d", "%Y-%m-%d %H"


def input_files(config: RecapDataConfig) -> list[str]:
    """The files that `config` names, in order of their names (a day's or hour's files one after the
    other), `num_files_to_keep` at most.

    Raises DataError where there is none, or where more days or hours are missing than tolerated.
    """
    if config.inputs is not None:
        paths = _by_glob(config.inputs)
    elif config.explicit_date_inputs is not None:
        paths = _by_days(config.explicit_date_inputs)
    else:
        assert config.explicit_datetime_inputs is not None
        paths = _by_hours(config.explicit_datetime_inputs)
    return paths[: config.num_files_to_keep]


def _by_glob(pattern: str) -> list[str]:
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise DataError(
            f"inputs: no file matches {pattern}; check the path, or make the data first "
            "(projects/home/recap/script/create_random_data.sh makes random data)"
        )
    return paths


def _by_days(inputs: ExplicitDateInputs) -> list[str]:
    end = _parse(inputs.end_date, DAY, "explicit_date_inputs.end_date", "2023-01-31")
    days = [end - timedelta(days=back) for back in reversed(range(inputs.days))]
    folders = [Path(inputs.data_root, day.strftime("%Y/%m/%d")) for day in days]
    # A day's files lie in its folder or in those of its hours.
    found = [_files((folder, *sorted(folder.glob("[0-9][0-9]")))) for folder in folders]
    return _joined(found, folders, inputs.num_missing_days_tolerated, "days")


def _by_hours(inputs: ExplicitDatetimeInputs) -> list[str]:
    where = "explicit_datetime_inputs.end_datetime"
    end = _parse(inputs.end_datetime, HOUR, where, "2023-01-31 23")
    hours = [end - timedelta(hours=back) for back in reversed(range(inputs.hours))]
    folders = [Path(inputs.data_root, hour.strftime("%Y/%m/%d/%H")) for hour in hours]
    found = [_files((folder,)) for folder in folders]
    return _joined(found, folders, inputs.num_missing_hours_tolerated, "hours")


def _parse(text: str, form: str, where: str, example: str) -> datetime:
    try:
        return datetime.strptime(text, form)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is no time of the form {example}") from error


def _files(folders: Iterable[Path]) -> list[str]:
    """Files directly in the folders; names with a dot or an underscore in front are markers."""
    return [
        str(path)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith((".", "_"))
    ]


def _joined(found: list[list[str]], folders: list[Path], tolerated: int, unit: str) -> list[str]:
    missing = [str(folder) for folder, files in zip(folders, found, strict=True) if not files]
    message = (
        f"{len(missing)} of {len(folders)} {unit} have no file: {', '.join(missing)} "
        f"(num_missing_{unit}_tolerated is {tolerated})"
    )
    if len(missing) > tolerated or len(missing) == len(folders):
        raise DataError(f"{message}; bring the files there, or tolerate more missing {unit}")
    if missing:
        logger.warning("%s; going on without them", message)
    return [path for files in found for path in files]
