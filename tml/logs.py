"""Logs: who speaks, and the record of a run.

`set_up` gives rank 0 a voice and leaves other ranks theirs for warnings. `MetricLog` writes one
record an interval to `metrics.jsonl`; the line on the console is a rendering of that record, so the
two cannot disagree.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tml.layout import fold

Record = dict[str, Any]

MAX_RATES_SHOWN = 3
"""Learning rates in a line; of more, which have their names in the record, lowest and highest."""


def set_up(rank: int) -> None:
    """Log to stderr: ours on rank 0 from INFO on, everything else from WARNING on; other ranks say
    who they are.
    """
    prefix = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", force=True)
    for name in ("__main__", "projects", "tml"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


class MetricLog:
    """Appends records to `<folder>/metrics.jsonl` and renders them as lines; silent and writing
    nothing on ranks > 0.
    """

    def __init__(self, folder: Path, rank: int, console: Console | None = None) -> None:
        self._path = folder / "metrics.jsonl"
        self._speaks = rank == 0
        self.console = console or Console(soft_wrap=True, highlight=False)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: the run goes on from there and will write them again."""
        if not self._speaks or not self._path.exists():
            return
        kept = [record for record in read_records(self._path) if record.get("step", 0) <= step]
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, kind: str, record: Record) -> None:
        """Append one record of a `kind` ("train", "validation", "metrics", …) and flush it."""
        if not self._speaks:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **record}) + "\n")

    def holds(self, kind: str, step: int) -> bool:
        """Whether there is a record of a `kind` for a step; rank 0 alone knows."""
        if not self._speaks or not self._path.exists():
            return False
        return any(one["kind"] == kind and one["step"] == step for one in read_records(self._path))

    def train(self, record: Record) -> None:
        """Append a record of a training interval and print its line."""
        self.write("train", record)
        if self._speaks:
            self.console.print(train_line(record))

    def say(self, text: str) -> None:
        """Print a line for the person who watches, broken where it is wide; rank 0 only."""
        if self._speaks:
            self.console.print(fold(text), markup=False)


def read_records(path: Path) -> list[Record]:
    """The complete records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def train_line(record: Mapping[str, Any]) -> Text:
    """`step 120/900  loss 1.23457  lr 0.1  98,765 edges/s  1.2 GiB  left 1:23`."""
    total = record["total_steps"]
    step = f"{record['step']:,}" if total is None else f"{record['step']:>{len(f'{total:,}')},}"
    rates = sorted(set(record["lr"].values()))
    lr = "/".join(f"{value:.3g}" for value in dict.fromkeys(record["lr"].values()))
    if len(rates) > MAX_RATES_SHOWN:
        lr = f"{rates[0]:.2g}…{rates[-1]:.2g}"
    return Text.assemble(
        ("step ", "dim"),
        step if total is None else f"{step}/{total:,}",
        ("  loss ", "dim"),
        (f"{record['loss']:.5f}", "bold"),
        ("  lr ", "dim"),
        lr,
        "  ",
        (f"{record['rate']:,.0f}", "cyan"),
        (f" {record['unit']}/s", "dim"),
        f"  {record['memory_bytes'] / 2**30:.1f} GiB",
        *(() if total is None else (("  left ", "dim"), clock(record["left_s"]))),
    )


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
