"""A folder that is written whole or not at all: `new_folder`."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tml.config import ConfigError


class FolderError(ConfigError):
    """A folder that cannot be written; the message says why and what to do."""


class FolderBusyError(FolderError):
    """Another process writes the folder."""


@contextmanager
def new_folder(folder: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes the name `folder` once the block ends well; whatever else happens
    leaves nothing behind.

    Refuses a folder that has something in it, unless `overwrite`; then it stays until the new one
    is complete. A folder without the file `marker` is somebody else's and never overwritten.
    """
    folder = Path(os.path.abspath(folder))
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not overwrite and not empty:
        raise FolderError(
            f"output {folder} exists and is not empty; choose another or --overwrite it"
        )
    if not empty and not (folder / marker).exists():
        raise FolderError(
            f"output {folder} holds something else (it has no {marker}), it is not overwritten; "
            "choose another --output"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    with _locked(partial):
        try:
            yield partial
            _replace(folder, partial)
        except OSError as error:
            raise FolderError(
                f"output {folder} cannot be written: {error.strerror or error}; free space or "
                "choose another --output"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """An empty folder `partial` that no other process fills; what a killed one left in it is
    removed.
    """
    try:
        descriptor = _lock(partial)
    except BlockingIOError as error:
        raise FolderBusyError(
            f"another process is writing {partial}; wait for it or choose another --output"
        ) from error
    except OSError as error:
        raise FolderError(
            f"output {partial.parent} cannot be written: {error.strerror}; choose another --output"
        ) from error
    try:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(descriptor)


def _lock(partial: Path) -> int:
    """Descriptor of the locked folder; the lock ends with the process, however it ends."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and flock the folder may have been finished and renamed by its owner.
            if partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _replace(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
