"""What a finished run has already: started again, it does only what is missing.

metrics.json says with what it was measured, the settings of `evaluation` and the edges themselves
(`measured`): other ones make it missing. Vectors are missing unless they are those of the step that
is to be exported.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from projects.twhin.config import TwhinConfig
from projects.twhin.evaluate import read_split
from projects.twhin.exported import DESCRIPTION
from projects.twhin.measured import measured_with
from projects.twhin.ranking import Report
from tml import run_folder

MEASURED = "measured"
"""Key of metrics.json."""


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
    step = ends.get("best_step", ends["step"])
    exported = _read(vectors / DESCRIPTION)
    has_vectors = exported is not None and exported["step"] == step
    report = _read(save_dir / run_folder.METRICS)
    is_same = report is not None and {key: report.get(key) for key in ends} == ends
    if report is not None and measured is not None:
        is_same = is_same and report.get(MEASURED) == measured
    return Found(
        vectors=_since(vectors / DESCRIPTION) if has_vectors else None,
        metrics=_since(save_dir / run_folder.METRICS) if is_same else None,
        report=report if is_same else None,
    )


def _read(path: Path) -> Report | None:
    try:
        found: Report = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return found


def _since(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
