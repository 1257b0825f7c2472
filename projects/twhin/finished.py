"""What a finished run has already: started again, it does only what is missing.

metrics.json says with what it was measured, the settings of `evaluation` and the edges themselves
(`measured`): other ones make it missing. Vectors are missing unless they are whole, and those of
the step that is to be exported. What cannot be read is missing.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from projects.twhin.config import TwhinConfig
from projects.twhin.evaluate import read_split
from projects.twhin.exported import DESCRIPTION, Exported
from projects.twhin.measured import measured_with
from projects.twhin.ranking import Report
from tml import checkpoint, run_folder
from tml.data.parquet import DataError
from tml.logs import read_records

MEASURED = "measured"
"""Key of metrics.json."""
ENDS = ("step", "best_step")
"""Keys of metrics.json that say of which step it is; the second where there is a best one."""


@dataclass(frozen=True)
class Found:
    """What is there of a run, as text for people: since when, or what is wrong with it."""

    vectors: str | None = None
    """Since when; None where they are missing."""
    metrics: str | None = None
    report: Report | None = None
    """metrics.json, where it is what would be measured."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.vectors is not None and self.metrics is not None

    @property
    def in_words(self) -> str:
        """`vectors and metrics are there since 2026-11-21 21:46`."""
        if self.vectors is not None and self.vectors == self.metrics:
            return f"vectors and metrics are there since {self.vectors}"
        parts = {"vectors": self.vectors, "metrics": self.metrics}
        return ", ".join(
            f"{what} are made now" if since is None else f"{what} are there since {since}"
            for what, since in parts.items()
        )


def how_measured(config: TwhinConfig, split: str) -> Report:
    """With what the metrics of a split are measured, as metrics.json says it."""
    edges = read_split(config, split)
    assert edges is not None
    settings = config.evaluation.model_dump(mode="json", exclude={"during_training"})
    return {"split": split, "settings": settings, "edges": measured_with(config, edges)}


def look(save_dir: Path, vectors: Path, ends: Report, measured: Report | None) -> Found:
    """What is there of the run that `ends` ({"step", "best_step"}) and is measured like that; where
    `measured` is None, nothing needs to be measured. vectors: the folder of the run's own.
    """
    has_vectors = _has_vectors(vectors, save_dir / str(ends.get("best_step", ends["step"])))
    report: Report | None = run_folder.read_json(save_dir / run_folder.METRICS)
    # Also of what `ends` has not: metrics of the best step are not those of the last.
    is_same = report is not None and all(report.get(key) == ends.get(key) for key in ENDS)
    if report is not None and measured is not None:
        is_same = is_same and report.get(MEASURED) == measured
    return Found(
        vectors=_in_words((vectors / DESCRIPTION).stat().st_mtime) if has_vectors else None,
        metrics=_in_words(_measured_at(save_dir)) if is_same else None,
        report=report if is_same else None,
    )


def _has_vectors(vectors: Path, step_folder: Path) -> bool:
    """Whether they are whole, and made of that step folder: not of an earlier one of its number."""
    try:
        exported = Exported.open(vectors)
        exported.refuse_cut_short()
    except DataError:
        return False
    made = (vectors / DESCRIPTION).stat().st_mtime
    is_newer = made >= (step_folder / checkpoint.COMPLETE).stat().st_mtime
    return exported.step == int(step_folder.name) and is_newer


def _measured_at(save_dir: Path) -> float:
    """When metrics.json was made. Its file says when the run came to its end last, which is later
    where it was started again; it counts where nothing was measured.
    """
    records = save_dir / run_folder.RECORDS
    known = read_records(records) if records.exists() else []
    times = [float(one["time"]) for one in known if one["kind"] == "metrics"]
    return times[-1] if times else (save_dir / run_folder.METRICS).stat().st_mtime


def _in_words(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
