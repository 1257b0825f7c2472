"""The run folder (save_dir): what a run leaves there, and how an earlier run makes room.

A run owns its step folders, metrics.jsonl, metrics.json, config.yaml and the extra names that its
project gives; nothing else is ever removed or moved. One run at a time: two would save over each
other.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil

from tml import checkpoint
from tml.config import Config, ConfigError, load_config
from tml.distributed import Job

logger = logging.getLogger(__name__)

RECORDS = "metrics.jsonl"
"""A record each interval, as logs.MetricLog writes them."""
METRICS = "metrics.json"
"""What was measured at the end; it is written last, so a run that has it is finished."""
LOCK = ".lock"
"""Locked (flock) by the chief of the run that trains here; says who that is."""
_locks: dict[Path, TextIO] = {}
"""Kept open until this process ends: the lock ends with it, however it ends."""


def starts_anew(save_dir: Path, *, overwrite: bool, repeat: bool) -> bool:
    """Whether a run with these flags goes on from nothing that is in save_dir."""
    if overwrite or not checkpoint.complete_steps(save_dir):
        return True
    return repeat and is_finished(save_dir)


def make_room(
    save_dir: Path, extra: Collection[str], *, overwrite: bool = False, repeat: bool = False
) -> None:
    """Make save_dir ready for a run: one process calls it.

    extra: names below save_dir that the project writes. overwrite: an earlier run is removed;
    repeat: a finished one is moved to `<save_dir>.<n>`. Raises ConfigError where another run trains
    there.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    _claim(save_dir)
    if overwrite:
        for path in _run_files(save_dir, extra):
            # First of all, so that nobody who reads a step folder takes half of it for the whole.
            if path.is_dir():
                (path / checkpoint.COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink()
    elif repeat and is_finished(save_dir):
        _move_aside(save_dir, extra)


def _claim(save_dir: Path) -> None:
    path = save_dir.resolve() / LOCK
    held = _locks.get(path)
    if (
        held is not None
        and path.exists()
        and os.path.samestat(os.fstat(held.fileno()), path.stat())
    ):
        return  # ours already: a program may train there several times
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        who = file.read().strip() or "by another process"
        file.close()
        raise ConfigError(
            f"run folder {save_dir} is in use: a run trains there since {who}; stop it "
            "(python -m tml.docker ps, stop), or give another --save_dir"
        ) from error
    except OSError as error:
        logger.warning(
            "run folder %s cannot be locked (%s): see that nothing else trains there",
            save_dir,
            error.strerror,
        )
    file.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"{now}, process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file


def is_finished(save_dir: Path) -> bool:
    """Whether a run here has come to its end."""
    return (save_dir / METRICS).exists()


def end_again(save_dir: Path, job: Job) -> None:
    """Let those who follow a run that was finished before know that its trainer has nothing to do;
    the chief does.
    """
    if job.is_chief:
        os.utime(save_dir / METRICS)


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that the file is whole or absent."""
    # Of a name of its own: two may write it, as evaluators do.
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is nothing, or where a crash of the machine or a
    full disk has left what is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def provenance(job: Job) -> dict[str, Any]:
    """Time, world size and versions, for meta.json."""
    packages = ("torch", "numpy", "pyarrow")
    versions = {name: version(name) for name in packages}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    return {"time": time.time(), "world_size": job.world_size, "versions": versions}


def announce_changes(folder: Path, config: Config) -> None:
    """Say which settings differ from those of the step folder that the run goes on from."""
    saved = load_config(type(config), folder / checkpoint.CONFIG)
    before = _flatten(saved.model_dump(mode="json"))
    now = _flatten(config.model_dump(mode="json"))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            logger.warning(
                "config has changed since the checkpoint: %s %s → %s",
                key,
                before.get(key),
                now.get(key),
            )


def start_time(pid: int | None = None) -> float:
    """When a process, this one where none is named, began, in seconds since 1970."""
    created = float(psutil.Process(pid).create_time())
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return created
    # Linux counts it from the machine's start, of which the date is known to a second only.
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - (created - psutil.boot_time())
    return time.time() - age


def seconds_since_start() -> float:
    """Seconds since this process began."""
    return time.time() - start_time()


def _run_files(save_dir: Path, extra: Collection[str]) -> list[Path]:
    if not save_dir.is_dir():
        return []
    names = {RECORDS, METRICS, checkpoint.CONFIG, *extra}
    return [
        path
        for path in save_dir.iterdir()
        if path.name in names or (path.name.isdigit() and checkpoint.is_ours(path))
    ]


def _move_aside(save_dir: Path, extra: Collection[str]) -> None:
    number = next(n for n in range(1, 1 << 20) if not Path(f"{save_dir}.{n}").exists())
    target = Path(f"{save_dir}.{number}")
    target.mkdir()
    # metrics.json last: it is what says that the run is finished.
    for path in sorted(_run_files(save_dir, extra), key=lambda path: path.name == METRICS):
        path.rename(target / path.name)
    logger.info("the finished run was moved to %s", target)


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, item in items for k, v in _flatten(item, f"{path}.{key}").items()}
    return {path[1:]: tree}
