"""TensorBoard on run folders: `python -m tml.tensorboard --logdir DIR [--host HOST] [--port PORT]`.

Every metrics.jsonl below DIR is a run, named by its folder. Its numbers become scalars, tagged by
kind and name (`train/loss`, `train/lr/user`), and those of the evaluator's marks
(`evaluation/<name>/<step>.json`) are tagged `evaluation/<name>/…`. They are written to a temporary
folder as TensorBoard's own files, and TensorBoard's own program shows them; records that come while
it runs follow within seconds. A run that goes on from a checkpoint takes records back: what
TensorBoard has of those steps is replaced.
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tml import logs
from tml.logs import Record

logger = logging.getLogger(__name__)

POLL_S = 2.0
MAX_POINTS = 10_000
"""Points of a tag that TensorBoard keeps: more are thinned out evenly."""
METRICS = "metrics.jsonl"
EVALUATION = "evaluation"
NOT_SHOWN = frozenset(["kind", "time", "step", "total_steps"])
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _Run:
    """How far one metrics.jsonl has been read."""

    path: Path
    writer: Any
    inode: int = 0
    offset: int = 0
    lines: list[int] = field(default_factory=list)
    """Hash of each line that was written."""
    marks: dict[Path, int] = field(default_factory=dict)
    """Mark → its time of change, of those that were written."""

    def update(self) -> None:
        """Write what has come since the last call."""
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())
            is_same = found.st_ino == self.inode and found.st_size >= self.offset
            if is_same:
                file.seek(self.offset)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # it is being written
        if not is_same:
            self.inode, self.offset = found.st_ino, 0
            self._rewind(lines)
        known = 0 if is_same else len(self.lines)
        for line in lines[known:]:
            self.lines.append(hash(line))
            self._write(json.loads(line))
        self.offset += sum(map(len, lines))
        self._write_marks()
        self.writer.flush()

    def _rewind(self, lines: list[bytes]) -> None:
        """Forget what another file said beyond the records that both begin with."""
        same = 0
        while same < min(len(lines), len(self.lines)) and hash(lines[same]) == self.lines[same]:
            same += 1
        if same < len(self.lines):
            last = json.loads(lines[same - 1])["step"] if same else -1
            _write_restart(self.writer, last + 1)
            self.marks.clear()
        del self.lines[same:]

    def _write(self, record: Record) -> None:
        shown = {name: value for name, value in record.items() if name not in NOT_SHOWN}
        _write_scalars(self.writer, record["kind"], shown, record.get("step", 0), record["time"])

    def _write_marks(self) -> None:
        folder = self.path.parent / EVALUATION
        new = []
        for path in folder.glob("*/*.json"):
            changed = path.stat().st_mtime_ns
            if path.stem.isdigit() and self.marks.get(path) != changed:
                new.append((int(path.stem), changed, path))
        for step, changed, path in sorted(new):
            self.marks[path] = changed
            kind = f"{EVALUATION}/{path.parent.name}"
            _write_scalars(self.writer, kind, json.loads(path.read_text()), step, changed / 1e9)


class Mirror:
    """TensorBoard's files in `target` for the runs below `logdir`."""

    def __init__(self, logdir: Path, target: Path) -> None:
        self._logdir, self._target = logdir, target
        self._runs: dict[Path, _Run] = {}

    def update(self) -> None:
        """Take over what is new; a file that cannot be read now is tried again the next time."""
        for path in _metric_files(self._logdir):
            if path not in self._runs:
                folder = self._target / path.parent.relative_to(self._logdir)
                self._runs[path] = _Run(path, _open_writer(folder))
                logger.info("run %s", path.parent)
            try:
                self._runs[path].update()
            except (OSError, ValueError, KeyError) as error:
                if path.exists():
                    logger.warning("%s cannot be shown: %s", path, error)


def _metric_files(logdir: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(logdir):
        # Step folders, and data in many files, hold no run.
        names[:] = sorted(n for n in names if not n.isdigit() and n != EVALUATION)
        if METRICS in files:
            yield Path(folder) / METRICS


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers of a JSON value, with their paths: nested names joined by /."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _open_writer(folder: Path) -> Any:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    _write_restart(writer, 0)  # TensorBoard takes the first for the start
    return writer


def _write_scalars(writer: Any, kind: str, value: Any, step: int, time_s: float) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=one) for tag, one in _numbers(value, kind)]
    writer.add_event(Event(wall_time=time_s, step=step, summary=Summary(value=values)))


def _write_restart(writer: Any, step: int) -> None:
    """Make TensorBoard drop what it has from `step` on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    session = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=0.0, step=step, session_log=session))


def serve(logdir: Path, host: str, port: int) -> int:
    """Show the runs below `logdir` until a signal comes; returns the exit code."""
    from tensorboard import program

    # Before any thread is made: all of them leave the signals to this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with tempfile.TemporaryDirectory(prefix="tml-tensorboard-") as folder:
        mirror = Mirror(logdir, Path(folder))
        mirror.update()
        board = program.TensorBoard()
        board.configure(
            logdir=folder,
            host=host,
            port=port,
            reload_interval=POLL_S,
            reload_multifile=True,
            load_fast="false",  # its faster reader forgets no points until others come
            samples_per_plugin={"scalars": MAX_POINTS},
        )
        try:
            url = board.launch()
        except program.TensorBoardServerException as error:
            logger.error("error: %s; choose another --port", error)
            return 2
        logger.info("TensorBoard on %s: %s", logdir, url)
        while (received := signal.sigtimedwait(SIGNALS, POLL_S)) is None:
            mirror.update()
    return 0 if received.si_signo == signal.SIGTERM else 128 + received.si_signo


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tml.tensorboard", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--logdir", type=Path, required=True, help="folder above run folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=6006, help="port; 0 takes a free one")
    arguments = parser.parse_args(argv)
    logs.set_up(0)
    if find_spec("tensorboard") is None:
        logger.error(
            "error: TensorBoard is not installed in %s: scripts/setup_venv.sh cpu installs what "
            "training needs; or docker compose --profile tensorboard up tensorboard",
            sys.prefix,
        )
        return 2
    if not arguments.logdir.is_dir():
        # The first run may make it; a parent that is not there either is a mistake.
        if arguments.logdir.exists() or not arguments.logdir.parent.is_dir():
            logger.error("error: --logdir %s: there is no such folder", arguments.logdir)
            return 2
        logger.warning("--logdir %s: waiting for the first run there", arguments.logdir)
    return serve(arguments.logdir, arguments.host, arguments.port)


if __name__ == "__main__":
    code = main()
    # At once: the interpreter would wait for TensorBoard's threads.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
