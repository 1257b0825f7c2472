"""Checkpoints: step folders that are complete or do not count.

`<save_dir>/<step>/` holds tensors (torch.distributed.checkpoint, one file a process), `meta.json`
and `config.yaml`; the empty file `COMPLETE` is written last. A folder without it is what a killed
run left behind: it is never read, and removed by the next save. Tensors are saved by name and can
be loaded by any number of processes.
"""

import errno
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tml import distributed

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
META = "meta.json"
CONFIG = "config.yaml"

State = dict[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which, why and what to
    do.
    """


def complete_steps(save_dir: Path) -> list[int]:
    """The steps of the complete step folders, ascending."""
    return sorted(int(folder.name) for folder in _step_folders(save_dir) if is_complete(folder))


def is_complete(folder: Path) -> bool:
    """Whether everything of this step folder had been written."""
    return (folder / COMPLETE).exists()


def save(
    save_dir: Path,
    step: int,
    state: State,
    meta: State,
    config: str,
    keep: int | None = None,
    protect: Collection[int] = (),
) -> Path:
    """Write `<save_dir>/<step>`, then remove all but the newest `keep` complete step folders and
    those of the steps `protect`. All processes call this.

    state: name → tensor, sharded tensor or nested dict of them; meta: JSON object; config: YAML
    text. Raises CheckpointError on every process when one fails; what was begun is removed, older
    folders stay.
    """
    folder = save_dir / str(step)
    _together(f"checkpoint {folder} could not be begun", lambda: _begin(folder))
    try:
        _write_tensors(folder, state)
        _together(
            f"checkpoint {folder} could not be written",
            lambda: _write_texts(folder, {**meta, "step": step}, config),
        )
    except CheckpointError as error:
        if _is_chief():
            shutil.rmtree(folder, ignore_errors=True)
        last = complete_steps(save_dir)
        kept = (
            f"the last complete checkpoint is {save_dir / str(last[-1])}"
            if last
            else "there is none before it"
        )
        raise CheckpointError(
            f"{error}; {kept}; make room and start the same command again"
        ) from error
    if _is_chief():
        remove_old(save_dir, keep, protect)
    return folder


def load_meta(folder: Path) -> State:
    """meta.json of a complete step folder."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist")
    if not is_complete(folder):
        raise CheckpointError(
            f"checkpoint {folder} is not complete (no file {COMPLETE}): the run was stopped "
            "while it wrote it; "
            "use an earlier step folder"
        )
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / META} cannot be read: {error}") from error
    assert isinstance(meta, dict)
    return meta


def load(folder: Path, state: State, *, strict: bool = False) -> None:
    """Read the tensors named in `state` into them, in place, whatever number of processes saved
    them.

    Raises CheckpointError where a name is missing or a shape differs; where strict, also when the
    folder holds a name that `state` has not.
    """
    _check_shapes(folder, state, strict=strict)
    alone = not dist.is_initialized()
    with _torch_checkpoint(f"checkpoint {folder} cannot be read") as dcp:
        dcp.state_dict_loader.load(state, checkpoint_id=str(folder), no_dist=alone)


def load_whole(folder: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The named tensors of a step folder (all where None), whole and in memory, in this process
    alone.
    """
    load_meta(folder)
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _read_metadata(folder).items()
        if hasattr(entry, "properties") and (names is None or name in names)
    }
    with _torch_checkpoint(f"checkpoint {folder} cannot be read") as dcp:
        dcp.state_dict_loader.load(dict(wanted), checkpoint_id=str(folder), no_dist=True)
    return wanted


@contextmanager
def _torch_checkpoint(what: str) -> Iterator[Any]:
    """torch.distributed.checkpoint, whose failures become CheckpointErrors that begin with `what`.

    Imported here: it takes most of a second, which the first step need not wait for.
    """
    with warnings.catch_warnings():
        # A single process saves as a single process, and ShardedTensor is what TorchRec has.
        warnings.simplefilter("ignore")
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            yield dcp
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            raise CheckpointError(f"{what}: {_cause(error)}") from error


def _begin(folder: Path) -> None:
    if folder.exists():
        if not is_ours(folder):
            raise OSError(f"{folder} is in the way and holds something else; move it")
        # COMPLETE goes first: a folder half removed must not count.
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_tensors(folder: Path, state: State) -> None:
    alone = not dist.is_initialized()
    needed = sum(_local_bytes(value) for value in state.values())
    free = shutil.disk_usage(folder).free
    short = distributed.any_process(needed > free)
    if short:
        raise CheckpointError(
            f"checkpoint {folder} could not be written: no space left on device "
            f"({needed / 2**20:,.1f} MiB needed by this process, {free / 2**20:,.1f} MiB free)"
        )
    with _torch_checkpoint(f"checkpoint {folder} could not be written") as dcp:
        dcp.state_dict_saver.save(state, checkpoint_id=str(folder), no_dist=alone)


def _write_texts(folder: Path, meta: State, config: str) -> None:
    _write_synced(folder / CONFIG, config)
    _write_synced(folder / META, json.dumps(meta, indent=2) + "\n")
    _sync(folder)
    _write_synced(folder / COMPLETE, "")
    _sync(folder)
    _sync(folder.parent)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(what: str, act: Callable[[], None]) -> None:
    """Run `act` on the chief; if it fails there, every process raises."""
    failure: OSError | None = None
    if _is_chief():
        try:
            act()
        except OSError as error:
            failure = error
    if distributed.any_process(failure is not None):
        reason = _cause(failure) if failure else "the chief's message says why"
        raise CheckpointError(f"{what}: {reason}") from failure


def remove_old(save_dir: Path, keep: int | None, protect: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` complete step folders (None: all stay) and those of the
    steps `protect`, and what killed runs left behind. One process calls it.
    """
    complete = complete_steps(save_dir)
    newest = complete[-1]
    old = [step for step in complete[:-keep] if step not in protect] if keep else []
    incomplete = [f for f in _step_folders(save_dir) if not is_complete(f) and int(f.name) < newest]
    for folder in [save_dir / str(step) for step in old] + incomplete:
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _step_folders(save_dir: Path) -> list[Path]:
    if not save_dir.is_dir():
        return []
    return [f for f in save_dir.iterdir() if re.fullmatch(r"\d+", f.name) and is_ours(f)]


def is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what `save` writes: the only kind that is ever removed."""
    ours = {COMPLETE, META, CONFIG, ".metadata", ".metadata.tmp"}
    try:
        found = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # a trainer beside may just have removed it
        return False
    return all(path.name in ours or path.suffix in (".distcp", ".tmp") for path in found)


def _read_metadata(folder: Path) -> dict[str, Any]:
    with _torch_checkpoint(f"checkpoint {folder} cannot be read") as dcp:
        return dict(dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata)


def _check_shapes(folder: Path, state: State, *, strict: bool) -> None:
    saved = _read_metadata(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of ShardedTensor, which TorchRec has
        shapes = {n: tuple(v.size()) for n, v in state.items() if not isinstance(v, dict)}
    if strict and (extra := sorted(set(saved) - set(state))):
        raise CheckpointError(
            f"checkpoint {folder} has {_some(extra)}, which the model has not: it is of another "
            "model; use its config, or another save_dir"
        )
    for name, shape in shapes.items():
        entry = saved.get(name)
        if entry is None:
            raise CheckpointError(
                f"checkpoint {folder} has no {name}; it has {_some(sorted(saved))}: "
                "it is of another model"
            )
        if tuple(entry.size) != shape:
            raise CheckpointError(
                f"checkpoint {folder}: {name} has shape {tuple(entry.size)}, the model's is "
                f"{shape}: it is of another model; use its config, or another save_dir"
            )


def _some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _local_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_local_bytes(item) for item in value.values())
    if isinstance(value, torch.Tensor) and hasattr(value, "local_shards"):
        return sum(_local_bytes(shard.tensor) for shard in value.local_shards())
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _cause(error: BaseException) -> str:
    """One line for what went wrong underneath; a full disk is named as such."""
    failures = getattr(error, "failures", None)
    if failures:
        found = next(iter(failures.values()))
        error = found[0] if isinstance(found, tuple) else found
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on device"
    return " ".join(str(error).split())[:500] or type(error).__name__


def _is_chief() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
