"""A folder of results that is there as a whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tml.data.parquet import DataError


@contextmanager
def replaced(folder: Path, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when the block has ended
    well, and is removed when it has not. `refuse_others` is asked first.
    """
    folder = Path(os.path.abspath(folder))
    refuse_others(folder, is_ours, what)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_others(folder: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Raise DataError where `folder` may not be replaced: it holds what is not of the kind that is
    written there. what: is written, for the message.
    """
    if folder.exists() and not (
        folder.is_dir() and all(path.is_file() and is_ours(path) for path in folder.iterdir())
    ):
        raise DataError(f"{folder} holds something else than {what}; choose another --output")
