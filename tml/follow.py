"""Following a run: each complete step folder is measured as it appears, by a process that does not
train (SPEC_TYPE=evaluator), and what was measured is kept as marks.

A mark is `<save_dir>/evaluation/<name>/<step>.json`; a name is what a project measures apart: a
split, a partition. The trainer writes marks too where it measures itself, and forgets those of
steps that it trains anew.
"""

import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tml import checkpoint, distributed, run_folder
from tml.checkpoint import CheckpointError
from tml.distributed import Job

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""Below save_dir: the marks."""
POLL_S = 2.0

Report = dict[str, Any]
"""Name → what was measured, JSON-able."""
Model = TypeVar("Model")
Identity = tuple[int, int] | None
"""Which file it is: another one of the same name has another."""


def mark_path(save_dir: Path, name: str, step: int) -> Path:
    """Where the result of `name` at `step` is kept."""
    return save_dir / EVALUATION / name / f"{step}.json"


def mark_done(save_dir: Path, step: int, report: Report, job: Job) -> None:
    """Write the marks of a step; the chief does."""
    if not job.is_chief:
        return
    for name, one in report.items():
        path = mark_path(save_dir, name, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, one)


def read_mark(save_dir: Path, name: str, step: int) -> Any:
    """The result of `name` at `step`; None where there is none, or none that can be read."""
    return run_folder.read_json(mark_path(save_dir, name, step))


def read_marks(save_dir: Path, step: int) -> Report:
    """What has been measured at a step: name → result."""
    paths = sorted((save_dir / EVALUATION).glob(f"*/{step}.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def unmarked(
    save_dir: Path,
    names: Iterable[str],
    step: int,
    counts: Callable[[Path], bool] = Path.exists,
) -> list[str]:
    """Those of `names` that are not measured at a step. counts: whether a mark is one."""
    return [name for name in names if not counts(mark_path(save_dir, name, step))]


def forget_marks(save_dir: Path, step: int) -> None:
    """Remove the marks of steps after `step`: a run that goes on from there makes them again."""
    for path in (save_dir / EVALUATION).glob("*/*.json"):
        if path.stem.isdigit() and int(path.stem) > step:
            path.unlink()


def follow(
    save_dir: Path,
    names: Iterable[str],
    load: Callable[[Path], Model],
    measure: Callable[[Model, list[str]], Report],
    tell: Callable[[int, Report], None],
    job: Job,
    timeout_s: float,
    *,
    once: bool = False,
    counts: Callable[[Path], bool] = Path.exists,
) -> int | None:
    """Measure the complete step folders of the run in `save_dir` that have no mark, as they appear,
    until the run is finished; all processes call this. Returns None, or the number of the signal
    that ended it.

    load: step folder → model. measure: (model, names without a mark) → report, the same on every
    process. tell: called on the chief with what was measured, once it is marked. counts: whether
    there is a mark at a path, and what it says was measured as it would be now.

    A run that was finished before this process began is one that the trainer of this job is about
    to move aside, to remove or to prolong: it is left alone until that has happened. once: nobody
    trains; what is there is measured, and that is all.

    Raises CheckpointError when no new step folder has appeared for `timeout_s`.
    """
    names = list(names)
    began = run_folder.start_time()
    last_found = time.monotonic()
    said = False
    try:
        with _interrupting():
            while True:
                # As the chief sees it: processes that look at different times see different
                # folders. Before looking for steps: the last one counts.
                finished = _finish_time(save_dir)
                stale = finished is not None and finished < began and not once
                steps = [] if stale else _unmeasured(save_dir, names, counts)
                waited = time.monotonic() - last_found
                seen = distributed.gather((finished, stale, steps, waited))[0]
                finished, stale, steps, waited = seen
                if stale and not said and job.is_chief:
                    logger.info(
                        "the run in %s was finished before: waiting for the trainer to begin "
                        "(--once measures what is there, and ends)",
                        save_dir,
                    )
                said = said or stale
                if once and not checkpoint.complete_steps(save_dir):
                    raise CheckpointError(f"{save_dir} holds no complete step folder; train first")
                for step in steps:
                    left = partial(unmarked, save_dir, names, step, counts)
                    _measure_step(save_dir, step, left, load, measure, tell, job)
                    last_found = time.monotonic()
                if once or (finished is not None and not stale):
                    return None
                if not steps and waited > timeout_s:
                    if stale:
                        return None
                    raise CheckpointError(
                        f"no new step folder in {save_dir} for {timeout_s:g} s "
                        "(training.eval_timeout_in_s): is the trainer running, with the same "
                        "save_dir?"
                    )
                if not steps:
                    time.sleep(min(POLL_S, timeout_s))
    except _Interrupted as interrupted:
        return interrupted.number


def _measure_step(
    save_dir: Path,
    step: int,
    find_left: Callable[[], list[str]],
    load: Callable[[Path], Model],
    measure: Callable[[Model, list[str]], Report],
    tell: Callable[[int, Report], None],
    job: Job,
) -> None:
    """Measure what has no mark at a step, unless the trainer removes the folder meanwhile."""
    folder = save_dir / str(step)
    left, identity = distributed.gather((find_left(), _identity(folder)))[0]
    with ExitStack() as stack:
        # What names the run: of a run that is moved aside its folders go along, of one that is
        # removed they are no longer to be written to, and another's marks are other folders.
        folders = {
            name: stack.enter_context(_opened(mark_path(save_dir, name, step).parent))
            for name in left
            if job.is_chief
        }
        model: Model | None = None
        failure: CheckpointError | None = None
        try:
            model = load(folder)
        except CheckpointError as error:
            failure = error
        if distributed.any_process(failure is not None):
            if failure is not None and _identity(folder) == identity is not None:
                raise failure
            if job.is_chief:
                logger.info("step %s was removed before it could be read", f"{step:,}")
            return
        assert model is not None
        report = measure(model, left)
        if not job.is_chief:
            return
        try:
            for name, one in report.items():
                _write_mark(folders[name], step, one)
        except FileNotFoundError:
            logger.info("the run was removed while step %s was measured", f"{step:,}")
            return
        tell(step, report)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_mark(folder: int, step: int, result: Any) -> None:
    """Write a mark, whole or not at all, below an open folder."""
    temporary = f".{step}.{secrets.token_hex(4)}.tmp"  # another evaluator may write it too

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666, dir_fd=folder)

    with open(temporary, "w", opener=opener) as file:
        file.write(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, f"{step}.json", src_dir_fd=folder, dst_dir_fd=folder)


def _unmeasured(save_dir: Path, names: list[str], counts: Callable[[Path], bool]) -> list[int]:
    steps = checkpoint.complete_steps(save_dir)
    return [step for step in steps if unmarked(save_dir, names, step, counts)]


def _finish_time(save_dir: Path) -> float | None:
    try:
        return (save_dir / run_folder.METRICS).stat().st_mtime
    except FileNotFoundError:
        return None


def _identity(folder: Path) -> Identity:
    """Of a complete step folder; None where there is none."""
    try:
        found = os.stat(folder / checkpoint.COMPLETE)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class _Interrupted(BaseException):
    """SIGTERM or SIGINT came; no Exception, so that nobody who handles errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _interrupting() -> Iterator[None]:
    """A signal ends what is being done at once: nothing of it is lost but time."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for signum in previous:  # torchrun passes on a signal that every process has already
            signal.signal(signum, signal.SIG_IGN)
        raise _Interrupted(number)

    previous: dict[signal.Signals, Any] = {}
    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
