"""The best step of a run: which one it is by the marks of its evaluation."""

import json
from pathlib import Path

from projects.twhin.ranking import Report
from tml import follow, run_folder

BEST = "best.json"
"""Below evaluation/: the step with the best MRR that the evaluator has measured."""


def write_best(save_dir: Path, split: str) -> Report:
    """Write evaluation/best.json: the step whose mark has the best MRR, the first of equals."""
    measured = {}
    for path in (save_dir / follow.EVALUATION / split).glob("*.json"):
        if path.stem.isdigit():
            mean = json.loads(path.read_text())["link_prediction"]["mean"]
            measured[int(path.stem)] = mean["mrr"]
    step = max(sorted(measured), key=lambda step: measured[step])
    best = {"step": step, "split": split, "mrr": measured[step]}
    run_folder.write_json(save_dir / follow.EVALUATION / BEST, best)
    return best


def forget_marks(save_dir: Path, step: int) -> None:
    """Remove the marks of steps after `step`, and name the best of those before it."""
    follow.forget_marks(save_dir, step)
    path = save_dir / follow.EVALUATION / BEST
    if path.exists():
        best = json.loads(path.read_text())
        if best["step"] > step:
            path.unlink()
            if any((save_dir / follow.EVALUATION / best["split"]).glob("*.json")):
                write_best(save_dir, best["split"])
